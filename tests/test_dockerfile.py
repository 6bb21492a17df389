"""The Dockerfile runs steps of the Makefile. Nothing here can build it, so its text is checked."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from tests.conftest import ROOT
from tests.test_cuda_choice import CPU, CUDA12, PLAIN, Checkout, installed_from

# The programs of the base image (Debian with Python) that are used, besides the shell's own commands.
PROGRAMS = {"apt-get", "rm"}
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def steps(*kinds: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their text, without comments."""
    parser = DockerfileParser(str(ROOT / "Dockerfile"), env_replace=False)
    found = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
    return [step for step in found if not kinds or step[0] in kinds]


def commands() -> list[list[str]]:
    """Each command of each RUN."""
    return [shlex.split(part) for _, value in steps("RUN") for part in value.split("&&")]


def comments() -> str:
    return "\n".join(line[1:] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("#"))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))


def test_every_instruction_and_every_command_exists() -> None:
    assert {kind for kind, _ in steps()} <= INSTRUCTIONS
    installed = {
        word for words in commands() if words[:2] == ["apt-get", "install"] for word in words[2:] if word[0] != "-"
    }
    assert {"make", "g++"} <= installed  # the Makefile and torch.compile need these
    assert {words[0] for words in commands()} <= PROGRAMS | installed
    makes = [words for words in commands() if words[0] == "make"]
    assert makes and {word for words in makes for word in words[1:] if "=" not in word} <= targets()


def test_a_container_is_make_and_its_example_runs_a_target() -> None:
    assert json.loads(dict(steps())["ENTRYPOINT"]) == ["make"]
    assert set(json.loads(dict(steps())["CMD"])) <= targets()
    (words,) = re.findall(r"docker run (.*?) needlestream (\w+)", comments().replace("\\\n", " "), re.S)
    assert words[1] in targets()
    mounted = re.findall(r":/needlestream/(\w+)", words[0])
    assert sorted(mounted) == ["input", "runs", "shards"]  # the folders that `make infer` reads and writes


def test_no_registry_but_that_of_the_base_image_is_named() -> None:
    (base,) = [value for _, value in steps("FROM")]
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim", base)
    text = "\n".join(value for _, value in steps())
    assert not re.search(r"https?://|\b[\w-]+\.(com|org|io|net)\b|index-url|find-links", text)
    assert [value for _, value in steps("ARG") if "INDEX" in value] == ["PIP_EXTRA_INDEX_URL"]  # empty unless given


def test_the_python_is_one_that_the_program_runs_on() -> None:
    (version,) = [value.partition("=")[2] for _, value in steps("ARG") if value.startswith("PYTHON=")]
    least = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert least and tuple(map(int, version.split("."))) >= tuple(map(int, least.groups()))


@pytest.mark.parametrize(("cuda", "file"), [(None, PLAIN), ("12", CUDA12), ("cpu", CPU)])
def test_its_make_steps_work_with_what_was_copied_before_them(tmp_path: Path, cuda: str | None, file: str) -> None:
    """Run the steps in their order, with an interpreter that only notes what pip is asked for."""
    image = Checkout(tmp_path)
    image.script(".venv/bin/python", f'echo "$@" >> {tmp_path}/calls.txt')
    image.script("bin/nvidia-smi", "exit 9")  # there is no GPU while an image is built
    values = dict(value.partition("=")[::2] for _, value in steps("ARG")) | ({"CUDA": cuda} if cuda else {})
    asked: list[str] = []
    for kind, value in steps("COPY", "RUN"):
        if kind == "COPY":
            sources = shlex.split(value)[:-1]
            for source in sources if sources != ["."] else ["Makefile", *map(str, requirements())]:
                shutil.copy2(ROOT / source, tmp_path)  # keeps the file's time, as the builder does
        elif value.startswith("make "):
            asked += image.make(*re.sub(r"\$\{(\w+)\}", lambda name: values[name[1]], value).split()[1:])[0]
    assert [installed_from(call)[0] for call in asked] == [file]
    assert image.make("install")[0] == []  # and the container installs nothing again


def requirements() -> list[Path]:
    return [path.relative_to(ROOT) for path in ROOT.glob("requirements*.txt")]


def test_what_git_ignores_and_secrets_stay_out_of_the_image() -> None:
    patterns = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()]
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    missing = [name for name in [*ignored, ".git"] if not any(fnmatch.fnmatch(name, each) for each in patterns)]
    assert missing == []
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    kept_out = [path for path in tracked if any(fnmatch.fnmatch(path.split("/")[0], each) for each in patterns)]
    assert kept_out == []
