"""Training on backgrounds: cadences without needles, to which the plan adds signals."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train as train_module
from pipeline import open_loader
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import Batch, Engine, LoaderConfig
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.simulate import SimulateConfig, plan_tasks, simulate, simulate_cadence
from tests.conftest import write_table
from tests.tiny import CANVAS, SHAPE, pack_tiny, tiny_config
from train import train
from training.config import TrainConfig
from training.model import ModelConfig
from training.presets import parse_train_config
from training.run import trained_on
from training.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
COUNT = 37
NEEDLES = DrawConfig(needles=0.5, cutmix=0.0)
QUIET = DrawConfig(
    flip_frequency=0.0, flip_time=0.0, roll_frequency=0.0, shift_time=0.0, erase=0.0, gain=0.0, offset=0.0, cutmix=0.0
)
ENGINES: tuple[Engine, ...] = ("cpu", "dali")
on_each_engine = pytest.mark.parametrize("engine", ENGINES)

_HASHED = """
import hashlib, sys
from pathlib import Path
from pipeline import open_loader
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig

canvas = CanvasConfig("on_off", 56, 224, sum_time_bins=3, subtract="lines_bursts", compress="asinh")
for augment in (None, DrawConfig(needles=0.5)):
    with open_loader(Path(sys.argv[1]), "test", batch_size=8, canvas=canvas, augment=augment) as loader:
        images = b"".join(batch.image.float().numpy().tobytes() for batch in loader)
    print(hashlib.sha256(images).hexdigest())
"""


def pack_backgrounds(
    folder: Path,
    name: str = "b",
    shape: tuple[int, int, int] = SHAPE,
    targets: Callable[[int], int] | None = None,
    time_bin: int = 1,
) -> Manifest:
    """White noise under test/, or with `targets` under train/. Panel p of snippet k has the mean 10 p + k / 8."""
    root, rng = folder / f"{name}-data", np.random.default_rng(3)
    split = "test" if targets is None else "train"
    keys = [f"{name}{number:04d}" for number in range(COUNT)]
    for number, key in enumerate(keys):
        path = root / split / key[0] / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        mean = 10 * np.arange(6) + number / 8
        np.save(path, (rng.standard_normal(shape) + mean[:, None, None]).astype(np.float16))
    if targets is not None:
        write_table(root / "train_labels.csv", [(key, targets(number)) for number, key in enumerate(keys)])
    return pack(PackConfig(root, str(folder / name), folds=2, workers=1, shard_mb=1, time_bin=time_bin))


@pytest.fixture(scope="module")
def backgrounds(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_backgrounds(tmp_path_factory.mktemp("backgrounds"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("labelled"), train=30, test=2)


def config_of(
    labelled: Manifest, backgrounds: Manifest | tuple[Manifest, ...], run_dir: Path, **changes: object
) -> TrainConfig:
    sets = backgrounds if isinstance(backgrounds, tuple) else (backgrounds,)
    changes = {"draws": replace(NEEDLES, cutmix=0.5), "model": ModelConfig("swin_nano", drop_path=0.1), **changes}
    return tiny_config(labelled.root, run_dir, backgrounds=tuple(str(each.root) for each in sets), **changes)


def epoch_of(batches: list[Batch]) -> dict[int, tuple[torch.Tensor, float]]:
    """Image and target of each row of one epoch."""
    return {
        int(batch.row[slot]): (batch.image[slot].clone(), float(batch.target[slot]))
        for batch in batches
        for slot in batch.counts.nonzero().flatten().tolist()
    }


# ---- The loader


@on_each_engine
def test_an_epoch_has_every_background_of_both_splits_once_with_other_signals_in_the_next(
    backgrounds: Manifest, engine: Engine
) -> None:
    config = replace(QUIET, needles=1.0, permute_panels=0.0)
    with open_loader(backgrounds, batch_size=5, canvas=CANVAS, augment=config, config=LoaderConfig(engine)) as loader:
        first, second = (epoch_of(list(loader)) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert all(not torch.equal(first[row][0], second[row][0]) for row in first)


def test_images_are_the_same_whether_this_process_compiled_the_kernels_or_found_them(
    tmp_path: Path,
) -> None:
    backgrounds = pack_backgrounds(tmp_path, shape=(6, 42, 256))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    command = [sys.executable, "-c", _HASHED, str(backgrounds.root)]
    compiled, found = (
        subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert len(compiled.split()) == 2
    assert compiled == found


@on_each_engine
def test_a_target_is_1_where_the_plan_added_a_needle_whatever_the_labels_say(
    tmp_path: Path, backgrounds: Manifest, engine: Engine
) -> None:
    zeros = pack_backgrounds(tmp_path, "z", targets=lambda _: 0)
    for manifest in (zeros, backgrounds):
        options = {"batch_size": 8, "canvas": CANVAS, "seed": 4, "config": LoaderConfig(engine)}
        with open_loader(manifest, augment=replace(QUIET, needles=0.5), **options) as loader:  # type: ignore[arg-type]
            batches = list(loader)
            planned = [loader._planner.plan(0, number) for number in range(len(loader))]
        for batch, plan in zip(batches, planned, strict=True):
            assert plan.draws is not None
            assert batch.target.tolist() == plan.draws.has_needle[: len(batch.target)].astype(float).tolist()
        targets = np.concatenate([batch.target.numpy() for batch in batches])
        assert set(targets.tolist()) == {0.0, 1.0}


def test_both_engines_make_the_same_batches_of_backgrounds(backgrounds: Manifest) -> None:
    """Batches of an odd size, so that some CutMix partners are outside; with panels in another order."""
    for sum_time_bins in (1, 2):
        canvas = replace(CANVAS, sum_time_bins=sum_time_bins)
        config = DrawConfig(needles=0.6, permute_panels=0.7, cutmix=0.5, mixup=0.3, erase=0.5)
        ours, theirs = (
            open_loader(backgrounds, batch_size=7, canvas=canvas, augment=config, config=LoaderConfig(engine))
            for engine in ENGINES
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.image, other.image, atol=1e-3, rtol=1e-3)
            assert torch.equal(one.target, other.target) and torch.equal(one.row, other.row)
        ours.close()
        theirs.close()


def test_images_of_backgrounds_do_not_depend_on_the_batch_size_or_the_number_of_threads(backgrounds: Manifest) -> None:
    config, found = DrawConfig(needles=0.6, cutmix=0.5), []
    for batch_size, threads in ((5, 1), (8, 3), (64, 2)):
        with open_loader(
            backgrounds,
            batch_size=batch_size,
            canvas=CANVAS,
            augment=config,
            seed=9,
            config=LoaderConfig("cpu", threads),
        ) as loader:
            found.append(epoch_of(list(loader)))
    for other in found[1:]:
        assert all(torch.equal(other[row][0], found[0][row][0]) for row in range(COUNT))
        assert all(other[row][1] == found[0][row][1] for row in range(COUNT))


@on_each_engine
def test_permuted_panels_show_on_panels_in_on_positions_in_an_order_of_their_own(
    backgrounds: Manifest, engine: Engine
) -> None:
    """Each panel is recognised by its mean: 10 times its number, and a little more for each snippet."""
    canvas = CanvasConfig("stack6", 6 * SHAPE[1], SHAPE[2], normalise=False)
    config = replace(QUIET, permute_panels=0.8)
    options = {"split": "test", "sampling": "uniform", "batch_size": 4, "config": LoaderConfig(engine)}
    with open_loader(backgrounds, canvas=canvas, augment=config, **options) as loader:  # type: ignore[arg-type]
        found = epoch_of(list(loader))
        plans = [loader._planner.plan(0, number) for number in range(len(loader))]
    planned = {
        row: tuple(order) for plan in plans if plan.draws
        for row, order in zip(plan.rows.tolist(), plan.draws.panel_order.tolist(), strict=True)
    }  # fmt: skip
    orders = set()
    for row, (image, _) in found.items():
        number = int(backgrounds.key(row)[1:])
        order = (image.reshape(6, -1).mean(dim=1) - number / 8) / 10
        assert (order - order.round()).abs().max() < 0.05
        orders.add(tuple(order.round().int().tolist()))
        assert tuple(order.round().int().tolist()) == planned[row]
    assert all(set(order[::2]) == {0, 2, 4} and set(order[1::2]) == {1, 3, 5} for order in orders)
    assert (0, 1, 2, 3, 4, 5) in orders and len(orders) > 12


def test_a_loader_of_backgrounds_takes_no_fold_and_no_other_sampling(backgrounds: Manifest) -> None:
    for options in ({"fold": 0}, {"fold": 0, "held_out": True}, {"sampling": "weighted"}):
        with pytest.raises(InputError, match="fold, held_out, sampling"):
            open_loader(backgrounds, canvas=CANVAS, augment=NEEDLES, **options)  # type: ignore[arg-type]


# ---- Training


def test_a_run_trains_on_all_backgrounds_and_validates_on_a_fold(
    labelled: Manifest, backgrounds: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = pack_backgrounds(tmp_path, "c", targets=lambda _: 0)
    config = config_of(labelled, (backgrounds, other), tmp_path / "run", epochs=1, report=True)
    with caplog.at_level("INFO"):
        train(config)
    assert f"{2 * COUNT} cadences, validation on 6 of fold 0" in caplog.text
    content = json.loads((config.run_dir / "config.json").read_text())
    assert content["backgrounds"] == list(config.backgrounds) and content["draws"]["needles"] == 0.5
    assert len(content["backgrounds_identity"]) == 64 and content["shards_identity"] == labelled.identity
    _, about = load_weights(config.run_dir / "best.safetensors")
    assert about["backgrounds"] == [backgrounds.identity, other.identity]
    assert trained_on([about]) == {backgrounds.identity, other.identity}
    assert "backgrounds of" in (config.run_dir / "report.html").read_text()


@pytest.mark.parametrize("stops_after", [3, 7])
def test_a_run_on_backgrounds_that_was_cut_ends_as_the_uncut_one_bit_for_bit(
    labelled: Manifest, backgrounds: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int
) -> None:
    """Cut in the middle of an epoch or of the next; it goes on with another number of threads."""
    common = {"epochs": 2, "checkpoint_every": 1}
    whole, cut = (
        config_of(labelled, backgrounds, tmp_path / name, loader=LoaderConfig(loader_threads=1), **common)
        for name in ("whole", "cut")
    )
    train(whole)
    save, saved = train_module.save_checkpoint, itertools.count(1)

    def save_and_stop(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        if next(saved) == stops_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    train(replace(cut, resume=True, loader=LoaderConfig(loader_threads=3, read_ahead=2)))
    ours, theirs = (load_file(config.run_dir / "best.safetensors") for config in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [(config.run_dir / "metrics.jsonl").read_text().splitlines() for config in (cut, whole)]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_a_run_goes_on_only_with_its_own_backgrounds(labelled: Manifest, backgrounds: Manifest, tmp_path: Path) -> None:
    config = config_of(labelled, backgrounds, tmp_path / "run", epochs=1)
    train(config)
    other = pack_backgrounds(tmp_path, "c")
    with pytest.raises(InputError, match="backgrounds_identity"):
        train(replace(config, backgrounds=(str(other.root),), resume=True))
    with pytest.raises(InputError, match="backgrounds_identity"):
        train(replace(config, backgrounds=(), draws=replace(config.draws, needles=None), resume=True))
    with pytest.raises(InputError, match="draws"):
        train(replace(config, draws=replace(config.draws, needles=0.4), resume=True))
    train(replace(config, resume=True))


def test_cross_validation_trains_each_fold_on_the_backgrounds(
    labelled: Manifest, backgrounds: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(labelled, backgrounds, tmp_path / "run", epochs=1, fold="all")
    train_module.train_folds(config, train, lambda *_: None)
    for fold in range(5):
        content = json.loads((config.run_dir / f"fold{fold}" / "config.json").read_text())
        assert content["fold"] == fold and "backgrounds_identity" in content


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("p", {"targets": lambda number: int(number < 2)}, r"p: 2 cadences with target 1, expected cadences without"),
        ("s", {"shape": (6, 14, 64)}, r"s and .*: snippets of shape \(6, 14, 64\) and \(6, 14, 56\)"),
        ("t", {"shape": (6, 28, 56), "time_bin": 2}, r"t and .*: time bins summed by 2 and 1"),
    ],
)
def test_backgrounds_that_do_not_fit_are_refused(
    labelled: Manifest, tmp_path: Path, name: str, options: dict[str, object], said: str
) -> None:
    wrong = pack_backgrounds(tmp_path, name, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said):
        train(config_of(labelled, wrong, tmp_path / "run"))


def test_a_background_that_is_validated_on_is_refused_and_one_of_the_other_folds_is_not(
    labelled: Manifest, tmp_path: Path
) -> None:
    for held_out, key_row in (
        (True, labelled.rows("train", 0, held_out=True)[0]),
        (False, labelled.rows("train", 0)[0]),
    ):
        root = tmp_path / f"{held_out}-data"
        key = labelled.key(int(key_row))
        (root / "test" / key[0]).mkdir(parents=True)
        np.save(root / "test" / key[0] / f"{key}.npy", np.zeros(SHAPE, np.float16))
        wrong = pack(PackConfig(root, str(tmp_path / f"{held_out}"), folds=2, workers=1))
        config = config_of(labelled, wrong, tmp_path / f"{held_out}-run", epochs=1)
        if held_out:
            with pytest.raises(InputError, match=f"{key}: is in .* validated on"):
                train(config)
        else:
            train(config)


def test_options_that_contradict_backgrounds_are_refused_by_the_name_of_their_flag(tmp_path: Path) -> None:
    words = ["--shards", "a", "--run-dir", str(tmp_path)]
    config = parse_train_config([*words, "--backgrounds", "b", "s3://c/d"])
    assert config.backgrounds == ("b", "s3://c/d") and config.draws.needles == 0.5 and config.draws.permuted == 0.5
    assert parse_train_config(words).draws.needles is None
    for more, said in (
        (["--needles", "0.3"], "--needles 0.3: needs --backgrounds"),
        (["--backgrounds", "b", "--sampling", "weighted"], "--sampling weighted"),
        (["--backgrounds", "b", "--needles", "0"], "--needles 0"),
        (["--backgrounds", "b", "--needles", "0.5", "--inject", "0.5"], "--inject 0.5"),
    ):
        with pytest.raises(InputError, match=said):
            parse_train_config([*words, *more])


# ---- Simulated backgrounds


def test_simulated_backgrounds_have_no_narrowband_signal_and_no_label_and_are_packed(tmp_path: Path) -> None:
    config = SimulateConfig(tmp_path / "data", backgrounds=5, workers=1, seed=2)
    simulate(config)
    assert not (tmp_path / "data" / "train").exists() and not (tmp_path / "data" / "train_labels.csv").exists()
    truth = (tmp_path / "data" / "truth.csv").read_text()
    assert truth.count("\n") == 6 and "narrowband" not in truth and "blip" in truth
    manifest = pack(PackConfig(tmp_path / "data", str(tmp_path / "shards"), workers=1))
    assert len(manifest) == 5 and (read_manifest(tmp_path / "shards").target == -1).all()


def test_simulated_backgrounds_are_no_cadences_of_a_labelled_data_set_of_the_same_seed(tmp_path: Path) -> None:
    labelled, ours = SimulateConfig(tmp_path, train=3, test=3, seed=2), SimulateConfig(tmp_path, backgrounds=3, seed=2)
    assert not {task.key for task in plan_tasks(labelled)} & {task.key for task in plan_tasks(ours)}
    # Compare the noise only, since two skies may resemble each other.
    first, second = (
        np.diff(np.diff(simulate_cadence(config, plan_tasks(config)[-3])[0].astype(np.float32), axis=1), axis=2)
        for config in (labelled, ours)
    )
    assert abs(np.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1]) < 0.5
