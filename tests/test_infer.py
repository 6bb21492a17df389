"""Prediction's promises: the right ids, the right averages, and only whole submissions."""

import csv
import dataclasses
import itertools
import json
import os
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from infer import InferConfig, infer
from pipeline import open_loader
from pipeline.augment import DrawConfig
from pipeline.loader import LoaderConfig
from reports.candidates import Scored
from reports.page import read_section
from reports.sections import Prediction, write_prediction_report
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.sample import read_snippets
from tests import twin
from tests.faulty_proxy import FaultyProxy
from tests.range_server import RangeServer, serving
from tests.tiny import CANVAS, pack_tiny, write_tiny_data
from training import load_model, predict
from training.accelerator import build_accelerator
from training.metrics import roc_auc, sigmoid
from training.model import ModelConfig, build_model
from training.prediction import PredictConfig, load_trained, predict_all
from training.submission import check_out, hold_pipe
from training.weights import fill_model, load_weights, save_weights

ABOUT = {
    "model": "swin_nano",
    "canvas": dataclasses.asdict(CANVAS),
    "shape": [6, 14, 56],
    "fold": 0,
    "auc": 0.5,
    "shards_identity": "",
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("infer"))


def write_weights(path: Path, seed: int, scale: float = 40, bias: float = 0) -> Path:
    torch.manual_seed(seed)
    state = build_model(ModelConfig("swin_nano"), 2, 28, 56).state_dict()
    state["head.fc.weight"] *= scale  # so that scores differ
    state["head.fc.bias"] += bias
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, state, ABOUT)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("weights")
    return [write_weights(folder / f"{seed}.safetensors", seed) for seed in (1, 2)]


def config_of(manifest: Manifest, weights: list[Path], out: Path, **options: object) -> InferConfig:
    values = {"batch_size": 4, "precision": "float32", **options}
    return InferConfig(manifest.root, tuple(weights), out, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("split", "other", "count"), [("test", "train", 20), ("train", "test", 6)])
def test_a_split_without_cadences_is_refused_by_name_with_what_to_do(
    weights: list[Path], tmp_path: Path, split: str, other: str, count: int
) -> None:
    data = write_tiny_data(tmp_path / "data", 20, 6)
    shutil.rmtree(data / split)
    (data / {"train": "train_labels.csv", "test": "sample_submission.csv"}[split]).unlink()
    packed = pack(PackConfig(data, str(tmp_path / "shards")))
    message = rf"--split {split}: {packed.root} has no cadences of {split}/; pack .* the {count} of {other}/"
    with pytest.raises(InputError, match=message):
        infer(config_of(packed, weights, tmp_path / "submission.csv", split=split))
    assert not (tmp_path / "submission.csv").exists()


def scores_in(path: Path) -> dict[str, float]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["id"]: float(row["target"]) for row in rows}
    assert len(found) == len(rows)
    return found


def logits_by_hand(manifest: Manifest, path: Path, views: tuple[str, ...], split: str = "test") -> dict[str, float]:
    """The model's logits for the twin's canvases, view by view."""
    model = build_model(ModelConfig("swin_nano"), 2, 28, 56).eval()
    fill_model(model, load_weights(path)[0], str(path))
    rows = manifest.rows(split)
    found = {}
    for key, snippet in zip(manifest.keys_of(rows), read_snippets(manifest, rows), strict=True):
        image = twin.resize(twin.to_planes(snippet, CANVAS), CANVAS)
        with torch.inference_mode():
            logits = model(torch.from_numpy(twin.make_views(image, CANVAS, views)).float())
        found[key] = float(logits.double().mean())
    return found


def test_the_submission_has_the_sample_submissions_ids_in_its_order(
    manifest: Manifest, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(config_of(manifest, weights[:1], tmp_path / "submission.csv"))
    with (manifest.root.parent / "data" / "sample_submission.csv").open(newline="") as file:
        expected = [row["id"] for row in csv.DictReader(file)]
    found = scores_in(tmp_path / "submission.csv")
    assert list(found) == expected and expected != sorted(expected)
    assert all(0 <= score <= 1 for score in found.values())
    assert (tmp_path / "candidates.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "submission.csv" in said and "candidates.png" in said and "1.safetensors" in said and "ROC AUC" in said


@pytest.mark.parametrize("tta", [False, True])
def test_scores_are_the_mean_logit_over_weights_and_views(
    manifest: Manifest, weights: list[Path], tmp_path: Path, tta: bool
) -> None:
    infer(config_of(manifest, weights, tmp_path / "submission.csv", tta=tta))
    views = CANVAS.views if tta else CANVAS.views[:1]
    each = [logits_by_hand(manifest, path, views) for path in weights]
    found = scores_in(tmp_path / "submission.csv")
    expected = {key: float(sigmoid(np.array((each[0][key] + each[1][key]) / 2))) for key in each[0]}
    assert found == pytest.approx(expected, abs=2e-3)
    assert len({round(score, 3) for score in found.values()}) > 3


def test_the_training_split_is_scored_with_its_roc_auc(
    manifest: Manifest, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(config_of(manifest, weights[:1], tmp_path / "train.csv", split="train"))
    assert set(scores_in(tmp_path / "train.csv")) == set(manifest.keys_of(manifest.rows("train")))
    assert "on the train split: 0." in capsys.readouterr().out


def incomplete(tmp_path: Path) -> Manifest:
    """Shards that lack one snippet of the submission."""
    from shard_tools.pack import PackConfig, pack
    from tests.tiny import write_tiny_data

    data = write_tiny_data(tmp_path / "data", 20, 6)
    next((data / "test").rglob("*.npy")).unlink()
    return pack(PackConfig(data, tmp_path / "shards", allow_missing=True))


def test_ids_without_a_snippet_are_an_error_or_get_the_score_they_are_told(weights: list[Path], tmp_path: Path) -> None:
    manifest = incomplete(tmp_path)
    out = tmp_path / "submission.csv"
    with pytest.raises(InputError, match=r"1 of the 6 ids .* --fill-missing"):
        infer(config_of(manifest, weights[:1], out))
    assert not out.exists()
    infer(config_of(manifest, weights[:1], out, fill_missing=0.25))
    assert len(scores_in(out)) == 6 and 0.25 in scores_in(out).values()


def broken_weights(kind: str, good: Path, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    state, about = load_weights(good)
    if kind == "text":
        path.write_text("not weights")
    elif kind == "cut":
        path.write_bytes(good.read_bytes()[:5000])
    elif kind == "unfit":
        save_weights(path, {**state, "head.fc.weight": torch.zeros(2, 3)}, about)
    elif kind == "foreign":
        save_weights(path, state, {"model": "swin_nano"})
    elif kind == "silent":
        save_weights(path, state, {name: value for name, value in about.items() if name != "auc"})
    elif kind == "shape":
        save_weights(path, state, {**about, "shape": [6, 16, 56]})
    elif kind == "nan":
        save_weights(path, {name: torch.full_like(value, float("nan")) if value.is_floating_point() else value
                            for name, value in state.items()}, about)  # fmt: skip
    return path


BROKEN = [
    ("missing", "no such weights"),
    ("text", "not a safetensors file"),
    ("cut", "not a safetensors file"),
    ("unfit", "do not fit the model"),
    ("foreign", "another version of the program"),
    ("shape", r"trained on snippets of shape \(6, 16, 56\)"),
    ("nan", "not finite"),
    ("silent", "another version of the program"),
]


@pytest.fixture
def unreadable(manifest: Manifest, tmp_path: Path) -> Manifest:
    """A data set whose test part gives another error as soon as one of its cadences is read."""
    shutil.copytree(manifest.root, tmp_path / "unreadable")
    for shard in (tmp_path / "unreadable").glob("test*.tar"):
        os.truncate(shard, 1000)
    return read_manifest(tmp_path / "unreadable")


@pytest.mark.parametrize(("kind", "message"), BROKEN)
def test_bad_weights_are_refused_by_name_before_any_cadence_is_read_and_an_earlier_submission_stays(
    unreadable: Manifest, weights: list[Path], tmp_path: Path, kind: str, message: str
) -> None:
    """Also if only the second of two files is bad."""
    out = tmp_path / "submission.csv"
    out.write_text("earlier")
    with pytest.raises(InputError, match=message) as error:
        infer(config_of(unreadable, [weights[1], broken_weights(kind, weights[0], tmp_path)], out))
    assert "weights.safetensors" in str(error.value)
    assert out.read_text() == "earlier"


def test_a_submission_that_could_not_be_written_is_refused_before_any_cadence_is_read(
    unreadable: Manifest, weights: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o555)
    places = [tmp_path / "file" / "s.csv", Path("/proc/self/s.csv")]
    for out in places if os.geteuid() == 0 else [*places, tmp_path / "locked" / "s.csv"]:
        with pytest.raises(InputError, match=rf"--out {out}: cannot be written \("):
            infer(config_of(unreadable, weights[:1], out))
    with pytest.raises(InputError, match="a folder"):
        infer(config_of(unreadable, weights[:1], tmp_path))


def test_room_for_the_submission_is_asked_for_and_given_back(tmp_path: Path) -> None:
    keys = ["k" * 1000] * 100_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, before[1]))
    try:
        with pytest.raises(InputError, match="free some space"):
            check_out(tmp_path / "s.csv", keys)
        check_out(tmp_path / "s.csv", keys[:1000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    check_out(Path(os.devnull), keys)  # a device needs no room


def test_ids_that_the_shards_lack_are_refused_before_any_cadence_is_read(weights: list[Path], tmp_path: Path) -> None:
    manifest = incomplete(tmp_path)
    for shard in manifest.root.glob("test*.tar"):
        os.truncate(shard, 1000)
    with pytest.raises(InputError, match=r"1 of the 6 ids .* --fill-missing"):
        infer(config_of(manifest, weights[:1], tmp_path / "submission.csv"))


def test_weights_of_one_canvas_share_one_pass_over_the_shards(
    manifest: Manifest, weights: list[Path], tmp_path: Path
) -> None:
    """A store that counts is asked for every cadence once; scores are those of each file alone, bit for bit."""
    third = write_weights(tmp_path / "third.safetensors", 3)
    state, about = load_weights(third)
    save_weights(third, state, {**about, "canvas": {**about["canvas"], "compress": "asinh"}})
    cadences = len(manifest.rows("test"))
    with RangeServer(manifest.root.parent) as server, serving(server), FaultyProxy(server.server_port) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        root = f"{proxy.url}/shards"
        for paths, passes in ((weights, 1), ([weights[0], third, weights[1]], 2)):
            accelerator, copy = build_accelerator("float32"), read_manifest(root)
            trained = [load_trained(path, copy, False) for path in paths]
            proxy.requests.clear()
            # All cadences are in one batch, so that none is repeated to fill up the last batch.
            rows, together = predict_all(accelerator, copy, trained, PredictConfig("test", cadences, LoaderConfig()))
            assert sum(request.of_shard for request in proxy.requests) == passes * cadences
            for logits, each in zip(together, trained, strict=True):
                alone = predict_all(accelerator, manifest, [each], PredictConfig("test", cadences, LoaderConfig()))
                assert (alone[0] == rows).all() and (alone[1][0] == logits).all()
        proxy.shutdown()


def test_candidates_whose_scores_are_all_one_keep_their_order_everywhere(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_weights(tmp_path / "weights" / "loud.safetensors", 1, scale=400, bias=300)
    infer(config_of(manifest, [path], tmp_path / "submission.csv", split="train"))
    logits = logits_by_hand(manifest, path, ("identity",), "train")
    found = scores_in(tmp_path / "submission.csv")
    assert min(logits.values()) > 40 and min(found.values()) > 1 - 1e-9
    ordered = sorted(logits, key=logits.__getitem__)
    far = [key for key, after in itertools.pairwise(ordered) if logits[after] - logits[key] > 0.1]
    assert len(far) > 10 and far == sorted(far, key=found.__getitem__) and len(set(found.values())) == len(found)
    target = {manifest.key(row): manifest.target[row] for row in manifest.rows("train")}
    auc = roc_auc(np.array([target[key] for key in found]), np.array([*found.values()]))
    assert f"on the train split: {auc:.4f}" in capsys.readouterr().out and auc != 0.5
    page = (tmp_path / "submission.report.html").read_text()
    assert "rank 1 of 50" in page and f"logit {logits[ordered[-1]]:.1f}" in page


def test_a_prediction_in_parts_is_that_of_one_pass_and_goes_on_where_it_stopped(
    manifest: Manifest, weights: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.scoring.ROWS", 8)
    whole = config_of(manifest, weights, tmp_path / "whole.csv", split="train")
    infer(whole)
    in_parts = dataclasses.replace(whole, out=tmp_path / "parts.csv", scores=str(tmp_path / "scores"))
    infer(in_parts)
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()
    parts = sorted((tmp_path / "scores").glob("*/*.parquet"))
    keys = [key for path in parts for key in pq.read_table(path)["key"].to_pylist()]
    assert len(parts) == 7 and keys == manifest.keys_of(manifest.rows("train"))
    parts[2].unlink()
    before = {path: path.stat().st_mtime_ns for path in parts if path != parts[2]}
    infer(in_parts)
    assert parts[2].is_file() and {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()


@pytest.mark.parametrize("damage", ["cut", "of others"])
def test_a_part_that_is_damaged_or_of_other_cadences_is_refused_by_name(
    manifest: Manifest, weights: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr("training.scoring.ROWS", 8)
    config = config_of(manifest, weights[:1], tmp_path / "a.csv", split="train", scores=str(tmp_path / "scores"))
    infer(config)
    first, second, *_ = sorted((tmp_path / "scores").glob("*/*.parquet"))
    first.write_bytes(first.read_bytes()[:-9] if damage == "cut" else second.read_bytes())
    with pytest.raises(InputError, match=f"{first}: (damaged|holds other cadences).*delete it"):
        infer(config)


def test_other_weights_or_another_split_share_no_part(manifest: Manifest, weights: list[Path], tmp_path: Path) -> None:
    config = config_of(manifest, weights[:1], tmp_path / "a.csv", scores=str(tmp_path / "scores"))
    for changes in ({}, {"weights": weights[1:]}, {"split": "train"}, {"tta": True}):
        infer(dataclasses.replace(config, **changes))
    assert len(list((tmp_path / "scores").iterdir())) == 4


def test_a_shard_cut_short_leaves_no_submission(manifest: Manifest, weights: list[Path], tmp_path: Path) -> None:
    shutil.copytree(manifest.root, tmp_path / "shards")
    copy = read_manifest(tmp_path / "shards")
    shard = copy.root / next(each.name for each in copy.shards if each.name.startswith("test"))
    os.truncate(shard, 20_000)
    with pytest.raises(InputError, match=shard.name):
        infer(config_of(copy, weights[:1], tmp_path / "submission.csv"))
    assert not (tmp_path / "submission.csv").exists()


def test_impossible_options_are_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    for options, message in [({"batch_size": 0}, "--batch-size 0"), ({"fill_missing": 2.0}, "--fill-missing 2")]:
        with pytest.raises(InputError, match=message):
            config_of(manifest, [tmp_path], tmp_path, **options)
    with pytest.raises(InputError, match="--weights"):
        config_of(manifest, [], tmp_path)


def test_weights_carry_what_is_needed_to_use_them(weights: list[Path]) -> None:
    state, about = load_weights(weights[0])
    assert about == json.loads(json.dumps(ABOUT))
    fill_model(build_model(ModelConfig("swin_nano"), 2, 28, 56), state, "here")


def test_a_pipe_gets_the_submission_and_nothing_is_written_beside_it(
    manifest: Manifest, weights: list[Path], tmp_path: Path
) -> None:
    """The run's page stays as it is too, since what a pipe got is gone."""
    run_dir, pipe = tmp_path / "run", tmp_path / "pipe"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    shutil.copy(weights[0], run_dir / "best.safetensors")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    infer(config_of(manifest, [run_dir / "best.safetensors"], pipe))
    found = os.read(reader, 1 << 16)
    os.close(reader)
    assert found.startswith(b"id,target\n") and found.count(b"\n") == 12
    assert pipe.is_fifo() and sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "run"]
    assert sorted(path.name for path in run_dir.iterdir()) == ["best.safetensors", "config.json"]


def test_a_pipe_that_nobody_reads_is_refused_before_any_cadence_is_read_and_one_that_is_read_sees_no_early_end(
    tmp_path: Path,
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="a pipe that nobody reads; start its reader first"), hold_pipe(pipe):
        pytest.fail("would have begun")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with hold_pipe(pipe):
        with pytest.raises(BlockingIOError):  # nothing to read yet, and no end
            os.read(reader, 1)
        write_whole(pipe, "id,target\n")
    assert os.read(reader, 100) == b"id,target\n" and os.read(reader, 1) == b""
    os.close(reader)


def test_a_submission_may_go_to_a_descriptor_that_is_a_pipe() -> None:
    """/dev/stdout is one in `infer.py --out /dev/stdout | gzip`, and so is >(gzip) in a shell."""
    ends = os.pipe()
    try:
        check_out(Path(f"/dev/fd/{ends[1]}"), ["a"])
        write_whole(Path(f"/dev/fd/{ends[1]}"), "id,target\n")
        assert os.read(ends[0], 100) == b"id,target\n"
    finally:
        for end in ends:
            os.close(end)


def test_a_second_prediction_with_a_runs_weights_leaves_the_first_on_its_page(
    manifest: Manifest, weights: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each submission has its own section, and making it again replaces only that section."""
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(weights[0], tmp_path / "best.safetensors")
    rows = manifest.rows("test")[:1].astype(np.int64)

    def predict_to(out: Path, score: float) -> None:
        scored = Scored(rows, manifest.target[rows], np.array([score]))
        prediction = Prediction(out, 1, "test", [tmp_path / "best.safetensors"])
        write_prediction_report(prediction, manifest, scored)

    for name, score in (("one.csv", 0.125), ("two.csv", 0.25), ("three.csv", 0.5), ("two.csv", 0.75)):
        predict_to(tmp_path / name, score)
    monkeypatch.chdir(tmp_path)  # the same submission, named without its folder
    predict_to(Path("three.csv"), 0.5)
    sections = [read_section(path) for path in sorted((tmp_path / "report").glob("*.json"))]
    assert [section.about.partition(",")[0] for section in sections] == ["one.csv", "two.csv", "three.csv"]
    page = (tmp_path / "report.html").read_text()
    assert [f"score {score:.4f}" in page for score in (0.125, 0.25, 0.5, 0.75)] == [True, False, True, True]


@pytest.mark.parametrize("tta", [False, True])
def test_a_model_loaded_by_another_program_gives_the_scores_of_the_submission(
    manifest: Manifest, weights: list[Path], tmp_path: Path, tta: bool
) -> None:
    infer(config_of(manifest, weights[:1], tmp_path / "submission.csv", tta=tta))
    model, canvas = load_model(weights[0], "cpu")
    views = canvas.views if tta else canvas.views[:1]
    with open_loader(manifest.root, split="test", canvas=canvas, views=views, batch_size=4, device="cpu") as loader:
        table = predict(model, loader, "float32")
    assert list(table.columns) == ["key", "logit", "score"]
    assert table["key"].tolist() == manifest.keys_of(manifest.rows("test"))
    found = scores_in(tmp_path / "submission.csv")
    np.testing.assert_allclose(table["score"], [found[key] for key in table["key"]], rtol=1e-6)
    np.testing.assert_allclose(sigmoid(table["logit"].to_numpy()), table["score"])


def test_training_batches_are_not_scored(manifest: Manifest, weights: list[Path]) -> None:
    model, canvas = load_model(str(weights[0]), "cpu")
    opened = open_loader(manifest, canvas=canvas, augment=DrawConfig(), device="cpu")
    with opened as loader, pytest.raises(InputError, match="without augment"):
        predict(model, loader)


def test_a_file_that_is_no_trained_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: no such weights"):
        load_model(tmp_path / "none.safetensors")
