"""What the benchmarks' tools promise: an intact history, a report of all that it holds, goals that can be missed."""

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from benchmarks import gpu_check, gpu_tests, history, train_bench
from benchmarks import report as bench_report
from benchmarks.chart_panels import latest_panels
from benchmarks.history_tables import other_tables
from benchmarks.model_figures import count_flops, peak_flops
from benchmarks.pack_bench import PACK, START, SYNCED, TAR, PackBenchConfig, above_goal
from benchmarks.pack_bench import to_figures as pack_figures
from benchmarks.rates import Held, below_goal, infer_rates, to_figures, train_rates, verdict
from benchmarks.ray_bench import raw_bytes
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader
from pipeline.plan import Order, Share
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from tests.conftest import NO_SNIPPETS
from tests.observation_files import CHANNELS, SPECTRA, write_cadence
from tests.tiny import CANVAS, SHAPE, tiny_config
from training.accelerator import build_accelerator
from training.config import TrainConfig
from training.model import ModelConfig
from training.run import Run, build_run
from training.system_info import output_of

MACHINE = {"cpu": "A CPU", "cores": 2, "memory_gb": 8.0, "gpu": None, "gpus": 0, "driver": None, "os": "Linux"}
LOADERS = {"ours": 900.0, "torch": 300.0, 'dali <&> "co"': 250.0, "memory copy": 4000.0}
WRITERS, LINES = 4, 8
NO_MODULE = "ModuleNotFoundError: No module named"


def append_lines(path: Path, writer: int) -> None:
    for number in range(LINES):
        history.record("loader", {"writer": writer}, [{"number": number, "long": "x" * 50_000}], path)


def entry(loaders: dict[str, float], time: str = "2026-01-02T03:04:05+00:00", **changes: Any) -> dict[str, Any]:
    figures = [
        {"workload": workload, "source": "page-cache", "loader": name, "cadences_per_s": rate, "lowest": rate * 0.9,
         "highest": rate * 1.1, "gb_per_s": 1.0, "cpu_ms": 2.0, "peak_mb": 300.0, "first_batch_s": 0.1, "workers": 0}
        for workload in ("raw", "canvas") for name, rate in loaders.items()
    ]  # fmt: skip
    figures.append(
        {"workload": "raw", "source": "page-cache", "loader": "broken", "kind": "peer", "failed": "no <disk>"}
    )
    versions = {"python": "3", "torch": "<i>2</i>"}
    base = {"benchmark": "loader", "time": time, "commit": "0123456789abcdef", "machine": MACHINE, "versions": versions}
    return {**base, "config": {}, "figures": figures, **changes}


@pytest.fixture
def write_history(tmp_path: Path) -> Callable[..., Path]:
    def write(*entries: dict[str, Any]) -> Path:
        path = tmp_path / "history.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in entries))
        return path

    return write


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return train_bench.make_shards(tmp_path_factory.mktemp("bench"), 32, shape=SHAPE)


@pytest.fixture(scope="module")
def plan(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return tiny_config(manifest.root, tmp_path_factory.mktemp("run"), ema=0.9)


@pytest.fixture
def run(plan: TrainConfig, manifest: Manifest) -> Any:
    built = build_run(plan, build_accelerator(plan.precision), manifest)
    yield built
    train_bench.close(built)


def test_concurrent_writers_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_lines, args=(path, number)) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    entries = history.read(path)
    found = sorted((each["config"]["writer"], each["figures"][0]["number"]) for each in entries)
    assert found == [(writer, number) for writer in range(WRITERS) for number in range(LINES)]


def test_a_line_says_where_when_and_with_what_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    figure = {
        "loader": "ours",
        "cadences_per_s": 1.5,
        "lowest": None,
        "unit": "cadences/s, both / model, 12 /s, s3://a/b/, ~/x/y, <p>a</p>",
    }
    config = {"data_dir": tmp_path / "some" / "folder", "rounds": 3, "workloads": ("raw",), "text": f"--out={tmp_path}"}
    died = {"failed": f"ImportError:{tmp_path}/lib/some.py:21: no module 'a/b' ({tmp_path})"}
    written = history.record("loader", config, [figure, died], path)
    assert history.read(path) == [written]
    assert written["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "numpy", "timm", "accelerate", "nvidia-dali"} <= written["versions"].keys()
    assert written["machine"].keys() == MACHINE.keys() and written["machine"]["cores"] > 0
    # A history is published, so it must not hold folders of the machine that it was made on.
    assert written["config"] == {
        "data_dir": "folder",
        "rounds": 3,
        "workloads": ["raw"],
        "text": f"--out={tmp_path.name}",
    }
    assert written["figures"] == [
        figure,
        {"failed": f"ImportError:some.py:21: no module 'a/b' ({tmp_path.name})"},
    ]
    assert written["time"].endswith("+00:00")


def test_a_number_of_numpy_is_refused_and_not_recorded_as_text(tmp_path: Path) -> None:
    for number in (np.int64(5), np.float32("nan")):
        with pytest.raises(TypeError):
            history.record("loader", {}, [{"cadences_per_s": number}], tmp_path / "history.jsonl")


def test_a_number_that_is_not_finite_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        history.record("loader", {}, [{"cadences_per_s": float("nan")}], tmp_path / "history.jsonl")
    assert not (tmp_path / "history.jsonl").exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"benchmark": "loader"}', "", '"'])
def test_a_damaged_line_is_refused_by_number(write_history: Callable[..., Path], damage: str) -> None:
    path = write_history(entry(LOADERS), entry(LOADERS), entry(LOADERS))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, lines[2]]) + "\n")
    with pytest.raises(InputError, match=r"history.jsonl, line 2: "):
        history.read(path)


def test_half_a_line_is_refused_and_not_added_to(write_history: Callable[..., Path]) -> None:
    path = write_history(entry(LOADERS), entry(LOADERS))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(InputError, match="line 2: cut short"):
        history.read(path)
    with pytest.raises(InputError, match="cut short"):
        history.record("loader", {}, [], path)
    assert path.read_bytes() == whole[:-5]


def test_no_history_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no history yet"):
        history.read(tmp_path / "history.jsonl")


def test_the_report_shows_every_loader_of_the_latest_run(write_history: Callable[..., Path], tmp_path: Path) -> None:
    # A newer machine of the same size replaces the older one; a machine with a GPU has tables of its own.
    old = entry({"ours": 1.0, "gone": 2.0}, commit="f" * 40, machine={**MACHINE, "cpu": "Another"})
    path = write_history(old, entry(LOADERS, machine={**MACHINE, "gpu": "A GPU"}), entry(LOADERS))
    bench_report.main(bench_report.ReportConfig(path, tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text()
    panels = latest_panels(history.read(path))
    assert len(panels) == 4 and page.count("<h2>") == 4
    for panel in panels:
        assert {figure["name"] for figure in panel.figures} == set(LOADERS)
        assert [figure["name"] for figure in panel.failed] == ["broken"] * (panel.workload == "raw")
        assert panel.best == {"ours": 900.0, "peer": 300.0, "ceiling": 4000.0}
    assert page.count("<td>900") == 4 and page.count("<td>4,000") == 4 and "gone" not in page
    assert page.count("<td>broken<td>failed: no &lt;disk&gt;") == 2
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page.replace("https://", "").lower().split("<style>")[0] and "<script" not in page
    for name in ("loader.png", "trend.png"):
        height, width, _ = matplotlib.image.imread(tmp_path / "out" / name).shape
        assert min(height, width) > 300


def test_the_page_escapes_what_comes_from_the_data(write_history: Callable[..., Path], tmp_path: Path) -> None:
    path = write_history(entry(LOADERS, commit="<script>$x_1$", machine={**MACHINE, "cpu": "<b>$\\frac{"}))
    bench_report.main(bench_report.ReportConfig(path, tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "dali &lt;&amp;&gt; &#34;co&#34;" in page and "&lt;b&gt;" in page and "&lt;i&gt;2" in page
    assert not any(word in page for word in ("<script", "<b>", "<i>", "dali <"))


def test_the_readme_block_is_replaced_and_nothing_else(write_history: Callable[..., Path], tmp_path: Path) -> None:
    path, readme = write_history(entry(LOADERS)), tmp_path / "README.md"
    before, after = (
        "# Title\r\n\n<!-- benchmarks:begin -->",
        "<!-- benchmarks:end --> tail\n\n  \t no newline at the end",
    )
    for old in ("", "\nold | table\n"):
        readme.write_bytes(f"{before}{old}{after}".encode())
        bench_report.main(bench_report.ReportConfig(path, tmp_path / "results", readme))
        text = readme.read_bytes().decode()
        assert text.startswith(before + "\n") and text.endswith("\n" + after) and "old" not in text
        block = text.removeprefix(before).removesuffix(after)
        assert "(results/loader.png)" in block and "2026-01-02" in block and "2 cores of A CPU" in block
        assert '| dali &lt;&amp;> "co" | 250 | 250 |' in block


@pytest.mark.parametrize(
    "text", ["none", "<!-- benchmarks:begin -->", "<!-- benchmarks:end --><!-- benchmarks:begin -->"]
)
def test_a_readme_without_the_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match="each once"):
        bench_report.replace_block(readme, "table")
    assert readme.read_text() == text


def test_the_other_benchmarks_have_their_tables_without_empty_columns(write_history: Callable[..., Path]) -> None:
    rates = {"loader": [30.0], "model": [10.0], "both": [9.0]}
    trained = entry({}, benchmark="train", figures=to_figures("train", rates, 1))  # type: ignore[arg-type]
    packed = entry({}, benchmark="pack", figures=pack_figures(PackBenchConfig(cadences=100), packing(4.0)))
    tables = {table.title: table for table in other_tables([trained, packed])}
    assert tables["train"].headings == ("loader alone", "model alone", "both", "both / model", "stall", "bound by")
    assert tables["train"].rows == [["30", "10", "9", "0.900", "10.0%", "model"]]
    assert [row[0] for row in tables["pack"].rows] == [PACK, START, TAR, SYNCED]


def test_a_part_of_the_needle_benchmark_does_not_replace_a_whole_one() -> None:
    whole, part, later = (
        entry({}, benchmark="needle", config=config, figures=[{"workload": "needles", "row": row}])
        for row, config in (("whole", {}), ("part", {"is_part": True}), ("later", {"is_part": False}))
    )
    for *entries, shown in ((part, "part"), (part, whole, "whole"), (whole, part, "whole"), (whole, later, "later")):
        (table,) = other_tables(entries)
        assert table.rows == [[shown]]


def test_the_needle_table_is_the_last_one_of_each_form_whatever_the_machine() -> None:
    first, second, on_gpu = (
        {**entry({}, benchmark="needle", config={"form": form}, figures=[{"workload": "needles", "row": row}]),
         "machine": {"cpu": row, "cores": 2, "gpu": None}}
        for row, form in (("first", "cpu"), ("second", "cpu"), ("third", "gpu"))
    )  # fmt: skip
    shown = [table.rows for table in other_tables([first, second, on_gpu])]
    assert shown == [[["second"]], [["third"]]]


def test_training_has_its_three_rates(run: Run) -> None:
    rates = train_rates(run, rounds=1)
    check_rates(rates, to_figures("train", rates, views=1))
    # The epoch has its full length: every batch of it was read again, and the model was trained on all of them.
    assert sum(int(batch.counts.sum()) for batch in run.train_loader) == 32
    assert run.progress.step == 0


def test_prediction_has_its_three_rates(run: Run, manifest: Manifest) -> None:
    rows = manifest.rows("train", 0)
    order = Order(rows, manifest.target[rows], "sequential")
    loader = Loader(manifest, order, Share(len(order), 16), CANVAS, None, CANVAS.views)
    rates = infer_rates(run.accelerator, run.bare_model, loader, rounds=1)
    loader.close()
    figures = to_figures("infer", rates, views=len(CANVAS.views))
    check_rates(rates, figures)
    assert verdict(figures)["images_per_s"] == pytest.approx(4 * figures[2]["cadences_per_s"])


def check_rates(rates: Any, figures: list[dict[str, Any]]) -> None:
    assert {name: len(values) for name, values in rates.items()} == {"loader": 1, "model": 1, "both": 1}
    assert all(value > 0 for values in rates.values() for value in values)
    assert [figure.get("rate") for figure in figures] == ["loader", "model", "both", None]
    found = verdict(figures)
    assert found["lowest_ratio"] <= found["ratio"] <= found["highest_ratio"] and 0 <= found["stall"] < 1


def test_the_held_batch_is_the_loaders_first_and_takes_nothing_from_it(run: Run) -> None:
    held = Held(run.train_loader)
    batches = list(run.train_loader)
    assert len(held) == len(list(held)) == len(batches) == 4
    torch.testing.assert_close(held.batch.image, batches[0].image, rtol=0, atol=0)


@pytest.mark.parametrize(("loader", "both", "bound_by"), [(90.0, 60.0, "loader"), (400.0, 99.0, "model")])
def test_the_verdict_follows_from_the_three_rates(loader: float, both: float, bound_by: str) -> None:
    figures = to_figures("train", {"loader": [loader] * 3, "model": [100.0] * 3, "both": [both] * 3}, views=1)
    found = verdict(figures)
    assert (found["bound_by"], found["ratio"]) == (bound_by, both / 100)
    assert found["stall"] == pytest.approx(1 - both / 100)
    assert below_goal(figures, 0.95, 1.0) == (both < 95) and not below_goal(figures, 0.95, 0.6)


def test_the_check_fails_below_the_goal(
    manifest: Manifest, plan: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(train_bench, "record", lambda *entry: recorded.append(entry))
    monkeypatch.setattr(train_bench, "train_config", lambda *_, **__: plan)
    config = train_bench.TrainBenchConfig(what="infer", shards=manifest.root, rounds=1, batch_size=32, check=True)
    for goal, code in ((1e-6, 0), (1e6, 1)):
        monkeypatch.setitem(train_bench.GOALS, ("infer", "cpu"), goal)
        assert train_bench.main(config) == code
        assert ("error: both / model is below" in capsys.readouterr().err) == bool(code)
    assert [name for name, _, _ in recorded] == ["infer", "infer"] and len(recorded[0][2]) == 4
    assert {"preset", "precision", "gflop_per_image", "tflop_per_s", "mfu"} <= recorded[0][2][-1].keys()


def packing(seconds: float) -> dict[str, list[float]]:
    return {PACK: [seconds + 1] * 3, START: [1.0] * 3, TAR: [1.0] * 3, SYNCED: [2.0] * 3}


def test_packs_check_leaves_its_start_out_and_wants_at_most_twice_the_synced_tar() -> None:
    config = PackBenchConfig(cadences=100)
    figures = pack_figures(config, packing(3.9))
    assert [figure.get("multiple") for figure in figures] == pytest.approx([None, None, 3.9, 1.95])
    assert not above_goal(figures, 1.0) and above_goal(pack_figures(config, packing(4.1)), 1.0)
    assert not above_goal(pack_figures(config, packing(4.1)), 0.8)


def test_the_arithmetic_of_swin_small_is_the_papers() -> None:
    """8.7 G multiply-adds at 224 x 224 (Liu et al. 2021, table 1); three times as many in training."""
    square = CanvasConfig("panels", 224, 224)
    forward = count_flops(ModelConfig("swin_small_patch4_window7_224"), square, training=False)
    assert forward == pytest.approx(2 * 8.7e9, rel=0.03)
    nano = ModelConfig("swin_nano")
    ratio = count_flops(nano, CANVAS, training=True) / count_flops(nano, CANVAS, training=False)
    assert 2.8 < ratio <= 3


def test_peaks_are_those_of_the_device_that_is_named() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "no") is None and peak_flops("A GPU", "bf16") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_check_refuses_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sees no NVIDIA GPU"):
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_gpu_check_needs_no_more_than_a_gpu_machine_has() -> None:
    """Its own imports work in a process that cannot import the other packages."""
    script = "import sys; sys.modules.update(dict.fromkeys(('tyro', 'wandb', 'setigen', 'webdataset', 'torch')));"
    done = output_of(sys.executable, "-c", f"{script} import benchmarks.gpu_check; print('imported')")
    assert done == "imported"


def test_gpu_check_shows_a_failed_part_and_runs_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = (
        "import sys; sys.path.insert(0, '.'); from benchmarks.history import record; "
        "record('train', {}, [{'workload': 'train', 'ratio': 0.5}])"
    )
    commands = [
        gpu_check.Part("breaks", ("-c", "print('the reason'); raise SystemExit(3)"), 20),
        gpu_check.Part("hangs", ("-c", "import time; print('so far', flush=True); time.sleep(60)"), 2),
        gpu_check.Part("works", ("-c", recorded), 30),
    ]
    check, printed = gpu_check.check, [""]

    def look_and_check(part: gpu_check.Part, out: Path) -> gpu_check.Outcome:
        printed.append(capsys.readouterr().out)
        return check(part, out)

    monkeypatch.setattr(gpu_check, "check_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "parts", lambda out, wanted: commands)
    monkeypatch.setattr(gpu_check, "check", look_and_check)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    # Even if the run is cut off, each finished part has been printed.
    assert all(word in shown for word, shown in zip(("commit", "the reason", "so far"), printed[1:], strict=True))
    printed.append(capsys.readouterr().out)
    content, text = json.loads((tmp_path / "gpu-check.json").read_text()), (tmp_path / "gpu-check.txt").read_text()
    broken, hanging, working = content["parts"]
    assert not content["passed"] and (broken["passed"], hanging["passed"], working["passed"]) == (False, False, True)
    assert broken["last_lines"] == ["the reason"] and broken["summary"] == "exit code 3"
    assert hanging["last_lines"] == ["so far"] and "not done within 2 s" in hanging["summary"]
    assert working["figures"] == [{"workload": "train", "ratio": 0.5}] and "ratio 0.5" in text
    assert "".join(printed) == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.txt"]


def test_gpu_check_fits_eight_minutes_and_runs_both_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "collect_gpu_tests", gpu_tests.GpuTests)  # no tests: another test covers them
    parts = gpu_check.parts(tmp_path)
    assert [part.words[0] for part in gpu_check.parts(tmp_path, ["infer", "loader"])] == [
        "benchmarks/loader_bench.py", "benchmarks/train_bench.py"
    ]  # fmt: skip
    start = 15  # seconds to import torch before the first part
    assert start + gpu_tests.COLLECTING_SECONDS + sum(part.seconds for part in parts) <= 480
    assert {word for part in parts for word in part.words if word.startswith("benchmarks/")} == {
        "benchmarks/loader_bench.py", "benchmarks/train_bench.py"
    }  # fmt: skip


def test_gpu_check_leaves_no_test_marked_gpu_out_on_a_machine_without_the_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds tests that get the mark through another file's parameters too, and excuses nothing else."""
    monkeypatch.setattr(gpu_tests, "COLLECTING_SECONDS", 300)  # other tests run at the same time
    everything = gpu_tests.collect_gpu_tests()
    assert not everything.broken and everything.counts["tests/test_gpu.py"] > 10
    assert everything.counts["tests/test_symmetries.py"] > 100
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({gpu_tests.NOT_NEEDED}))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    without = gpu_tests.collect_gpu_tests()
    assert without.counts == everything.counts
    assert without.broken and not without.unexpected
    words = without.words(tmp_path / "junit.xml")
    assert set(words[-len(without.counts) :]) == set(everything.counts)


@pytest.mark.parametrize(
    ("outcomes", "broken", "passed", "said"),
    [
        ("<testcase/><testcase/>", {}, True, "2 passed"),
        ("<testcase/>", {}, False, "2 were collected"),
        ("<testcase/><testcase><skipped/></testcase>", {}, False, "1 skipped"),
        ("<testcase/><testcase/>", {"tests/test_s3.py": f"{NO_MODULE} 'moto.server'"}, True, "need moto"),
        ("<testcase/><testcase/>", {"tests/test_gpu.py": f"{NO_MODULE} 'timm'"}, False, "'timm'"),
        ("<testcase/><testcase/>", {"tests/test_gpu.py": "SyntaxError: invalid syntax"}, False, "invalid syntax"),
    ],
)  # fmt: skip
def test_gpu_check_fails_where_a_collected_test_did_not_run_or_a_file_was_not_collected(
    tmp_path: Path, outcomes: str, broken: dict[str, str], passed: bool, said: str
) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(f"<testsuites><testsuite>{outcomes}</testsuite></testsuites>")
    found = gpu_tests.judge(gpu_tests.GpuTests({"tests/test_gpu.py": 2}, broken), junit)
    assert found[0] == passed and said in found[1]


def test_gpu_check_says_which_versions_are_not_the_pinned_ones() -> None:
    pinned = gpu_check.pinned_versions()
    assert {"torch", "timm", "nvidia-dali"} <= pinned.keys()
    as_built = {**pinned, "torch": f"{pinned['torch']}+cu130"}
    assert gpu_check.not_as_pinned(as_built) == []
    found = {**as_built, "timm": "1.0.29"}
    del found["wandb"]
    assert gpu_check.not_as_pinned(found) == [
        f"timm 1.0.29 (pinned: {pinned['timm']})", f"no wandb (pinned: {pinned['wandb']})"
    ]  # fmt: skip


@pytest.mark.parametrize(("cases", "expected"), [
    ("<testcase/><testcase><skipped/></testcase>", {"passed": 1, "failed": 0, "skipped": 1}),
    (
        f"""<testcase/><testcase><skipped message="could not import 'setigen': so"/></testcase>
        <testcase><skipped message="{NO_SNIPPETS}"/></testcase>""",
        {"passed": 1, "failed": 0, "skipped": 0, "without setigen, real snippets or a second GPU": 2},
    ),
    ("<testcase><failure/></testcase><testcase><error/></testcase>", {"passed": 0, "failed": 2, "skipped": 0}),
])  # fmt: skip
def test_gpu_check_counts_what_pytest_found(tmp_path: Path, cases: str, expected: dict[str, int]) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert gpu_tests.count_outcomes(path) == expected


def test_the_rate_of_an_ingest_and_the_day_of_a_telescope_are_in_bytes_of_float32(tmp_path: Path) -> None:
    """Not in bytes of the files, which are compressed by different factors."""
    assert raw_bytes(write_cadence(tmp_path / "cadence")) == 6 * SPECTRA * 4 * CHANNELS
