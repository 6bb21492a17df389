"""What the pages name exists: files, tests, options, commands, targets and figures; and their examples run."""

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from tests.tiny import pack_tiny, tiny_config

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, GUIDE, *DOCS]
MOST_WORDS = 1000  # five minutes of reading
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)
PROGRAM = r"(?:shard_tools|pipeline|training|reports|tests|benchmarks)"
# Options of other programs that the pages name.
OTHERS = {
    "help", "multi-gpu", "num-machines", "num-processes", "machine-rank", "main-process-ip", "main-process-port",
    "mixed-precision", "dynamo-backend", "ntasks-per-node", "strict", "build-arg", "gpus", "logdir",
    "head", "address", "port", "resources",  # of ray start
}  # fmt: skip
# Parses each command line as its program does, and stops before the program does anything.
PARSE = """
import json, os, runpy, sys, traceback
import tyro

class Parsed(BaseException):
    pass

parse = tyro.cli

def parse_only(*arguments, **options):
    found = parse(*arguments, **options)
    if options.get("return_unknown_args"):
        return found
    raise Parsed

tyro.cli = parse_only
failed = []
for line, is_module, program, arguments in json.loads(sys.stdin.read()):
    sys.argv = [program, *arguments]
    try:
        (runpy.run_module if is_module else runpy.run_path)(program, run_name="__main__")
    except Parsed:
        pass
    except SystemExit as error:
        if error.code:
            failed.append(line)
print(json.dumps(failed))
"""

on_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def prose(page: Path) -> str:
    """The text of a page, without code, tables and markup."""
    text = re.sub(r"^ *\|.*$", "", without_code(page), flags=re.M)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def commands_of(page: Path) -> list[str]:
    """Command lines in code blocks and in the text, with continued lines joined."""
    text = page.read_text()
    blocks = [block for language, block in FENCE.findall(text) if not language]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@functools.cache
def sources() -> list[str]:
    paths = [*ROOT.glob("*.py"), *(path for room in ROOT.glob("*/__init__.py") for path in room.parent.rglob("*.py"))]
    return [path.read_text() for path in paths]


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"\b(test_\w+)\b(?!\.py)", page.read_text())}
    defined = {
        name for path in ROOT.glob("tests/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 200 and named <= defined, named - defined


@on_each_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(rf"`((?:{PROGRAM}|docs)/[\w/]+\.\w+|\w+\.py)`", without_code(page))
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing + [link for link in linked if not (page.parent / link).is_file()]


@functools.cache
def options() -> set[str]:
    """The options: fields of dataclasses, which tyro turns into options, and those of argparse."""
    trees = [ast.parse(text) for text in sources()]
    fields = {
        item.target.id.replace("_", "-")
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    return fields | {name for text in sources() for name in re.findall(r'add_argument\(\s*"--([\w-]+)"', text)}


@on_each_page
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    text = " ".join(line for line in commands_of(page) if not line.startswith("pip "))
    named = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", text)}
    assert named <= options() | OTHERS, named - options() - OTHERS


def test_every_command_line_of_the_pages_is_one_that_its_program_takes() -> None:
    lines = {line for page in PAGES for line in commands_of(page)}
    asked = []
    for line in sorted(lines):
        found = re.search(r"(?:^python |\s)(-m )?((?:\w+/)*\w+\.py|shard_tools)\s(.*)", line)
        if found and re.match("python |accelerate launch ", line):
            asked.append((line, bool(found[1]), found[2], shlex.split(found[3], comments=True)))
    assert len(asked) > 12
    run = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(asked), cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [], run.stdout


@on_each_page
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets, settings = (
        set(re.findall(r"^([a-z][\w-]*):", makefile, re.M)),
        set(re.findall(r"^\s*([A-Z_]+) +[?:]=", makefile, re.M)),
    )
    for line in commands_of(page):
        words = shlex.split(line, comments=True) if line.startswith("make ") else []
        for word in words[1:]:
            name, is_setting, _ = word.partition("=")
            assert name in (settings if is_setting else targets), line


def test_readme_is_read_in_five_minutes_and_leads_to_every_page() -> None:
    assert len(prose(README).split()) <= MOST_WORDS
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", README.read_text()))
    assert linked >= {str(page.relative_to(ROOT)) for page in (GUIDE, *DOCS)}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_page_of_docs_begins_with_the_question_that_it_answers(page: Path) -> None:
    assert re.fullmatch(r"# .+\?", page.read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("heading", "page", "mark", "count"),
    [("How fast", "performance", "benchmarks", 16), ("How well", "recipe", "curve", 20)],
)
def test_readmes_tables_have_the_figures_that_were_measured(heading: str, page: str, mark: str, count: int) -> None:
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    measured = (
        (ROOT / "docs" / f"{page}.md").read_text().split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0]
    )
    cells = [cell for line in section.splitlines() if line.startswith("|") for cell in line.split("|")[2:-1]]
    figures = [found[0] for cell in cells[8:] if (found := re.match(r"[\d,.]+\b", cell.strip()))]
    known = {cell.strip() for line in measured.splitlines() for cell in line.split("|")}
    assert len(figures) == count and set(figures) <= known, set(figures) - known


def run_worked_example(page: Path, folder: Path) -> None:
    """Run the commands of its worked example in `folder`, and check that they print what the page shows."""
    example = page.read_text().split("## A worked example\n")[1].split("```python")[0]
    blocks = FENCE.findall(example)
    (commands,) = [block for language, block in blocks if not language]
    commands = commands.replace("source .venv/bin/activate", "").replace("infer.py", str(ROOT / "infer.py"))
    run = subprocess.run(
        ["bash", "-e", "-c", commands.replace("python ", f"{sys.executable} ")],
        cwd=folder, capture_output=True, text=True, timeout=250, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    printed = re.sub(r" +$", "", run.stdout, flags=re.M)
    for language, shown in blocks:
        assert language != "text" or shown in printed, shown + "\n" + printed


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_the_python_examples_run(page: Path, tmp_path: Path) -> None:
    """They run one after the other, as a reader runs them, in a folder with small shards and a small trained run."""
    examples = [block for language, block in FENCE.findall(page.read_text()) if language == "python"]
    pack_tiny(tmp_path)
    from train import train

    train(tiny_config(tmp_path / "shards", tmp_path / "runs" / "full", epochs=1))
    if page.name == "observations.md":
        run_worked_example(page, tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(examples)], cwd=tmp_path, capture_output=True, text=True, timeout=250,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def test_make_bench_writes_its_tables_into_pages_that_have_a_place_for_them(tmp_path: Path) -> None:
    commands = set(re.findall(r"report\.py --readme (\S+) --recipe (\S+)", (ROOT / "Makefile").read_text()))
    (pages,) = commands  # `make bench` and `make needles` run the same command
    copies = [tmp_path / Path(page).name for page in pages]
    for page, copy in zip(pages, copies, strict=True):
        copy.write_bytes((ROOT / page).read_bytes())
    report.main(report.ReportConfig(out=tmp_path / "results", readme=copies[0], recipe=copies[1]))
    for copy, row in zip(copies, ("| memory-copy |", "| de-Doppler |"), strict=True):
        assert copy.read_text().count(row) == 1


def test_every_name_that_the_guide_gives_of_a_file_is_in_it() -> None:
    """If a line begins with a file's name in bold, every other name in code on it occurs in that file."""
    for line in re.sub(r"\n +", " ", without_code(GUIDE)).splitlines():
        if found := re.match(r"(?:\d\.|-) \*\*`([\w/]+\.py)`\*\*(.*)", line):
            text = (ROOT / found[1]).read_text()
            missing = [name for name in re.findall(r"`(\w+)`", found[2]) if not re.search(rf"\b{name}\b", text)]
            assert not missing, f"{found[1]}: {missing}"
