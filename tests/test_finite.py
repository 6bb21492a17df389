"""A loss or gradient that is not finite is reported with its step, before it reaches weights, average or checkpoint."""

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train as train_module
from pipeline.augment import DrawConfig
from pipeline.loader import Batch, Loader
from pipeline.plan import Share
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from tests.conftest import folder_bytes
from tests.launch import command_line, flags
from tests.tiny import pack_tiny, tiny_config
from train import soft_target_loss, train, train_step
from training import run as run_module
from training.accelerator import build_accelerator
from training.config import TrainConfig
from training.finite import FiniteWatch
from training.run import Run, build_run

ROOT = Path(__file__).resolve().parents[1]
GLOBAL_BATCH = 6  # 40 training cadences: 7 steps an epoch
SPOILT = 19  # a position in the epoch, in step 4
QUIET = DrawConfig(flip_time=0, shift_time=0, erase=0, gain=0, offset=0, cutmix=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("finite"))


@pytest.fixture
def _spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Loader", SpoiltLoader)


def quiet_config(manifest: Manifest, run_dir: Path, **changes: object) -> TrainConfig:
    """A run without CutMix, so that each cadence affects only its own image."""
    options = {"epochs": 1, "draws": QUIET, "batch_size": GLOBAL_BATCH, "checkpoint_every": 1, **changes}
    return tiny_config(manifest.root, run_dir, **options)


class SpoiltLoader(Loader):
    """The loader, except that one cadence in each training epoch has an image of NaN."""

    in_training = True
    spoilt = SPOILT

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.in_training == (self._draws is not None):
                batch.image[torch.from_numpy(batch.position == self.spoilt)] = math.nan
            yield batch


class SpoiltValidation(SpoiltLoader):
    in_training = False
    spoilt = 2


def tensors_of(run_dir: Path) -> dict[str, Tensor]:
    """All floating-point tensors of the last checkpoint: weights, moving average and optimiser."""
    last = (run_dir / "checkpoints" / "last").resolve()
    found = load_file(last / "model.safetensors")
    for name in ("optimizer.bin", *(path.name for path in last.glob("custom_checkpoint_*.pkl"))):
        state = torch.load(last / name, map_location="cpu")
        flat = torch.utils._pytree.tree_flatten_with_path(state)[0]
        found |= {f"{name}{path}": value for path, value in flat if isinstance(value, Tensor)}
    return {name: value for name, value in found.items() if value.is_floating_point()}


def assert_checkpoint_is_sound(config: TrainConfig, step: int) -> None:
    assert (config.run_dir / "checkpoints" / "last").resolve().name.startswith(f"step-{step:08d}")
    tensors = tensors_of(config.run_dir)
    assert len(tensors) > 100
    assert [name for name, value in tensors.items() if not value.isfinite().all()] == []


@pytest.mark.parametrize(
    "changes",
    [{"clip": 0.0}, {"ema": 0.9}, {"batch_size": 2, "accumulate": 3}],
    ids=["no clipping", "running mean", "accumulation"],
)
@pytest.mark.usefixtures("_spoilt")
def test_a_cadence_that_makes_the_loss_nan_is_stopped_at_its_step_and_the_checkpoint_before_it_is_kept(
    manifest: Manifest, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = quiet_config(manifest, tmp_path / "run", **changes)
    with pytest.raises(InputError, match=r"step 4, in epoch 1: the loss or its gradient is not finite"):
        train(config)
    assert_checkpoint_is_sound(config, step=3)


SPOILT_RUN = """
import sys
sys.path.insert(0, {root!r})
import train
from training import run
from tests.test_finite import SpoiltLoader
run.Loader = SpoiltLoader
sys.exit(train.run_command(train.main))
"""


def test_the_bad_cadence_of_one_rank_is_named_by_all(manifest: Manifest, tmp_path: Path) -> None:
    config = quiet_config(manifest, tmp_path / "run", batch_size=GLOBAL_BATCH // 2)
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT_RUN.format(root=str(ROOT)))
    done = launched(command_line(str(script), *flags(config), "--checkpoint-every", 1, processes=2))
    assert done.returncode != 0
    assert done.stderr.count("step 4, in epoch 1: the loss or its gradient is not finite") == 2
    assert_checkpoint_is_sound(config, step=3)


def launched(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_rate_that_is_too_high_is_named_and_a_sound_one_goes_on_from_the_checkpoint(
    manifest: Manifest, tmp_path: Path
) -> None:
    config = quiet_config(manifest, tmp_path / "run", checkpoint_every=0, clip=0.0)
    train(config)
    wild = dataclasses.replace(
        config, epochs=2, resume=True, learning_rate=1e30, min_learning_rate=1e29, checkpoint_every=3,
        override=("epochs", "learning_rate", "min_learning_rate"),
    )  # fmt: skip
    before = folder_bytes((config.run_dir / "checkpoints" / "last").resolve())
    for _ in range(2):  # both times from the same checkpoint
        with pytest.raises(
            InputError, match=r"step 9, in epoch 2: .*from before it.*lower --learning-rate than 1e\+30"
        ):
            train(wild)
        assert_checkpoint_is_sound(config, step=7)
    assert folder_bytes((config.run_dir / "checkpoints" / "last").resolve()) == before
    train(dataclasses.replace(wild, learning_rate=1e-4, min_learning_rate=1e-5))
    history = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 2 and 1e-5 < history[1]["learning_rate"] < 1e-4
    fresh = dataclasses.replace(wild, run_dir=tmp_path / "fresh", resume=False, override=())
    with pytest.raises(InputError, match=r"step \d, in epoch 1: .*nothing was saved yet"):
        train(fresh)
    assert all(math.isfinite(value) for line in history for value in line.values())


@pytest.mark.parametrize("checkpoint_every", [0, 1], ids=["end of the epoch", "after the step"])
def test_weights_that_the_last_step_made_useless_are_not_saved(
    manifest: Manifest, tmp_path: Path, checkpoint_every: int
) -> None:
    """The weights are finite, but their output is not, which only the next step would show."""
    config = quiet_config(manifest, tmp_path / "run", clip=0.0, batch_size=40)  # one step per epoch
    train(config)
    small = {} if checkpoint_every == 0 else {"batch_size": GLOBAL_BATCH}
    wild = dataclasses.replace(
        config, **small, epochs=3, resume=True, learning_rate=1e30, min_learning_rate=1e29,
        checkpoint_every=checkpoint_every, override=("epochs", "learning_rate", "min_learning_rate", "global_batch"),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"step 2, in epoch \d: it left weights whose output is not finite"):
        train(wild)
    assert_checkpoint_is_sound(config, step=1)


def test_a_loss_that_overflows_in_one_micro_batch_is_noticed_though_its_gradient_is_finite(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(logit: Tensor, batch: Batch, share: Share) -> Tensor:
        loss = soft_target_loss(logit, batch, share)
        return loss + math.inf if SPOILT - 1 in batch.position else loss  # the first of the step's three parts

    monkeypatch.setattr(train_module, "soft_target_loss", overflowing)
    config = quiet_config(manifest, tmp_path / "run", batch_size=2, accumulate=3)
    with pytest.raises(InputError, match=r"step 4, in epoch 1: the loss or its gradient is not finite"):
        train(config)
    assert_checkpoint_is_sound(config, step=3)


def test_an_output_that_is_not_finite_in_validation_alone_is_named_not_scored(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "Loader", SpoiltValidation)
    with pytest.raises(InputError, match=r"epoch 1: the model's output is not finite .* lower --learning-rate"):
        train(quiet_config(manifest, tmp_path / "run"))


def built(config: TrainConfig, manifest: Manifest) -> Run:
    return build_run(config, build_accelerator(config.precision), manifest)


@pytest.mark.usefixtures("_spoilt")
def test_steps_that_are_read_late_leave_the_weights_alone_and_the_first_is_named(
    manifest: Manifest, tmp_path: Path
) -> None:
    """This imitates a GPU, where the host learns of a bad step a few steps later."""
    run = built(quiet_config(manifest, tmp_path, ema=0.9), manifest)
    run.watch.steps_late = 2
    run.model.train()
    weights: list[list[Tensor]] = []
    losses = []
    with pytest.raises(InputError, match=r"step 4, in epoch 1"):
        for batch in run.train_loader:
            losses.append(train_step(run, batch))
            weights.append([weight.detach().clone() for weight in run.bare_model.parameters()])
    assert len(losses) == 5 and losses[3].isnan()
    assert same(weights[2], weights[4]) and not same(weights[1], weights[2])
    assert all(value.isfinite().all() for value in run.judged_model.state_dict().values())
    run.train_loader.close()
    run.valid_loader.close()


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def watch_of(scaler: torch.amp.GradScaler | None) -> FiniteWatch:
    accelerator = build_accelerator("float32")
    accelerator.scaler = scaler
    config = tiny_config(Path("shards"), Path("run"))
    return FiniteWatch(config, accelerator, torch.optim.Adam([torch.zeros(1)], fused=True), steps_per_epoch=5)


@pytest.mark.parametrize(("loss", "norm"), [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_either_of_loss_and_gradient_is_enough(loss: float, norm: float) -> None:
    watch = watch_of(None)
    watch.add_loss(torch.tensor(1.0))
    watch.before_update(5, torch.tensor(1e30))
    watch.add_loss(torch.tensor(loss))
    watch.add_loss(torch.tensor(1.0))
    with pytest.raises(InputError, match="step 6, in epoch 2"):
        watch.before_update(6, torch.tensor(norm))


def test_under_fp16_an_overflow_of_the_gradient_is_no_fault_but_one_at_any_scale_or_of_the_loss_is() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    watch = watch_of(scaler)
    weight = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([weight], fused=True)
    with pytest.raises(InputError, match="step 3, in epoch 1: the loss is not finite, or fp16 overflows"):
        for step in range(1, 9):
            watch.add_loss(torch.tensor(1.0))
            scaler.scale(weight.sum()).backward()
            weight.grad.fill_(math.inf)
            watch.before_update(step, torch.tensor(math.inf))
            scaler.step(optimiser)
            scaler.update()
    assert scaler.get_scale() == 0.5 and weight.item() == 0
    watch = watch_of(torch.amp.GradScaler("cpu"))
    watch.add_loss(torch.tensor(math.nan))
    with pytest.raises(InputError, match="step 1, in epoch 1: the loss is not finite"):
        watch.before_update(1, torch.tensor(1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.usefixtures("_spoilt")
def test_a_gpu_names_the_step_and_keeps_its_checkpoint_too(manifest: Manifest, tmp_path: Path, precision: str) -> None:
    config = quiet_config(manifest, tmp_path / "run", precision=precision)
    with pytest.raises(InputError, match=r"step 4, in epoch 1"):
        train(dataclasses.replace(config, ema=0.9))
    assert_checkpoint_is_sound(config, step=3)


TWO_RANKS = """
import math, pathlib, sys
sys.path.insert(0, {root!r})
import torch
from training import run as run_module
import train as train_module
from training.accelerator import build_accelerator
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from tests.tiny import tiny_config

config = tiny_config(pathlib.Path({shards!r}), pathlib.Path({run_dir!r}), ema=0.9)
accelerator = build_accelerator("float32")
rank = accelerator.process_index
at_once = run_module.build_model

def build_model(*words):
    model = at_once(*words)
    with torch.no_grad():
        for weight in model.parameters():
            weight += rank  # as if this rank had found other pretrained weights
    return model

run_module.build_model = build_model
run = run_module.build_run(config, accelerator, read_manifests(config.shards))
for name, model in (("weights", run.bare_model), ("running mean", run.ema.module)):
    total = torch.stack([value.double().sum() for value in model.parameters()])
    alike = accelerator.gather(total).view(2, -1)
    print(f"rank {{rank}}: {{name}} alike: {{torch.equal(alike[0], alike[1])}}", flush=True)
print(f"rank {{rank}}: buffers sent: {{run.model.broadcast_buffers}}", flush=True)
run.watch.add_loss(torch.tensor(math.inf if rank else 1.0))  # of the second rank alone, with a gradient that is finite
try:
    run.watch.before_update(1, torch.tensor(1.0))
except InputError as error:
    print(f"rank {{rank}}: {{error}}", flush=True)
"""


def test_ranks_that_built_other_weights_train_and_judge_those_of_the_first_and_agree_on_a_bad_loss(
    manifest: Manifest, tmp_path: Path
) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), shards=str(manifest.root), run_dir=str(tmp_path / "run")))
    done = launched(command_line(str(script), processes=2))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: weights alike: True" in done.stdout
        assert f"rank {rank}: running mean alike: True" in done.stdout
        assert f"rank {rank}: step 1, in epoch 1: the loss or its gradient is not finite" in done.stdout
        assert f"rank {rank}: buffers sent: False" in done.stdout
    assert "rank 1 began with other weights than rank 0" in done.stderr
