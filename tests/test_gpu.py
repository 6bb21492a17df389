"""Promises that need an NVIDIA GPU: DALI's engine, mixed precision, resumption, memory over a long run."""

import dataclasses
import itertools
import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_module
from pipeline.augment import DrawConfig
from pipeline.loader import Batch, Loader, LoaderConfig
from pipeline.plan import Order, Share
from pipeline.stall import StallTimer
from shard_tools.axes import kaggle_axes
from shard_tools.manifest import Manifest
from tests.tiny import CANVAS, pack_tiny, tiny_config
from train import train
from training.accelerator import build_accelerator
from training.checkpoint import save_checkpoint
from training.metrics import roc_auc
from training.model import ModelConfig, build_model
from training.prediction import predict_rows
from training.search.candidates import Candidates

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
BATCHES, WARM_UP = 1000, 100


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("gpu"), train=203)


def loader_of(manifest: Manifest, device: torch.device, train: bool, batch_size: int = 16) -> Loader:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform" if train else "sequential", seed=3)
    draws = DrawConfig(cutmix=0.6, erase=0.5, mixup=0.3, inject=0.6) if train else None
    views = ("identity",) if train else CANVAS.views
    config = LoaderConfig(engine="dali")  # for the CPU too, as a machine with a GPU may lack Numba
    return Loader(manifest, order, Share(len(rows), batch_size), CANVAS, draws, views, device, config)


@pytest.mark.parametrize("train_batches", [True, False])
def test_batches_on_the_gpu_are_those_of_the_cpu(manifest: Manifest, train_batches: bool) -> None:
    """Batches of an odd size, so that some CutMix partners are outside; two epochs, kept while later ones are made."""
    ours, theirs = (loader_of(manifest, device, train_batches, 15) for device in (GPU, torch.device("cpu")))
    kept = [list(itertools.chain(loader, loader)) for loader in (ours, theirs)]
    for on_gpu, on_cpu in zip(*kept, strict=True):
        assert on_gpu.image.device == GPU
        torch.testing.assert_close(on_gpu.image.cpu(), on_cpu.image, atol=1e-3, rtol=1e-3)
        assert torch.equal(on_gpu.target.cpu(), on_cpu.target) and torch.equal(on_gpu.row.cpu(), on_cpu.row)
    ours.close()
    theirs.close()


def check_late_batches(manifest: Manifest, device: torch.device) -> None:
    """Check a GPU's batches against the CPU's while the GPU's work on each is far behind."""
    ours, theirs = loader_of(manifest, device, True), loader_of(manifest, torch.device("cpu"), True)
    kept = []
    for batch in ours:
        kept.append(batch.image)
        with torch.cuda.device(device):
            torch.cuda._sleep(10**7)  # about 5 ms, for which the next copies wait, but DALI does not
    for image, on_cpu in zip(kept, theirs, strict=True):
        assert image.device == device
        torch.testing.assert_close(image.cpu(), on_cpu.image, atol=1e-3, rtol=1e-3)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("stream", ["default", "own"])
def test_batches_stay_what_they_are_where_the_work_on_them_is_late(manifest: Manifest, stream: str) -> None:
    with torch.cuda.stream(torch.cuda.Stream(GPU) if stream == "own" else None):
        check_late_batches(manifest, GPU)


@pytest.mark.parametrize("number", [0, 1])
def test_batches_stay_what_they_are_beside_another_gpu_that_is_current(manifest: Manifest, number: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second NVIDIA GPU")
    with torch.cuda.device(1 - number):
        check_late_batches(manifest, torch.device("cuda", number))
        loader = loader_of(manifest, torch.device("cuda"), train=False)
        assert next(iter(loader)).image.device == torch.device("cuda", 1 - number)
        loader.close()


def test_candidates_on_the_gpu_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 6, 39, 256)
    images[:4, :3, :, 100] += 3
    images[4:, 3:, :, 100] += 3
    candidates = Candidates(kaggle_axes(39, 256), 1)
    with torch.no_grad():
        cutouts, evidence = candidates(images)
        for found, expected in zip(candidates.to(GPU)(images.to(GPU)), (cutouts, evidence), strict=True):
            # The first four images' needles and the last four's controls. The rest is noise: its best line may differ.
            for there, here in zip(found.cpu().chunk(4)[::3], expected.chunk(4)[::3], strict=True):
                torch.testing.assert_close(there, here, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "config", [ModelConfig("swin_pico", stem="candidates"), ModelConfig("convnext_window", stem="sums")]
)
def test_a_model_with_candidates_gives_the_cpus_logits_in_mixed_precision(config: ModelConfig) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 6, 39, 256)
    for number in range(8):
        images[number, :3, :, 20 + 25 * number] += 1 + number / 4
    model = build_model(config, 6, 39, 256).eval()
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cuda", torch.bfloat16):
            found = model.to(GPU)(images.to(GPU)).cpu()
    torch.testing.assert_close(found[:8], expected[:8], atol=0.5, rtol=0.03)  # in noise the best line may differ
    assert found[:8].min() > found[8:].max()


def test_snippets_as_they_are_reach_the_gpu_unchanged(manifest: Manifest) -> None:
    rows = manifest.rows("train")
    order, share = Order(rows, manifest.target[rows], "sequential"), Share(len(rows), 16)
    loaders = [Loader(manifest, order, share, None, device=device) for device in (GPU, torch.device("cpu"))]
    for on_gpu, on_cpu in zip(*[list(loader) for loader in loaders], strict=True):
        assert torch.equal(on_gpu.image.cpu(), on_cpu.image)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32"])
def test_training_learns_in_every_precision(manifest: Manifest, tmp_path: Path, precision: str) -> None:
    # At twice this rate and without a warm-up 4 of 16 seeds collapse, also in bf16 on a CPU.
    rate = {"learning_rate": 5e-4, "warmup_epochs": 1.0}
    train(tiny_config(manifest.root, tmp_path, epochs=6, draws=DrawConfig(cutmix=0), precision=precision, **rate))
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in history for value in line.values())
    assert max(line["auc"] for line in history) > 0.9


def test_waiting_for_the_gpu_is_no_stall_and_an_idle_gpu_is(manifest: Manifest) -> None:
    loader = loader_of(manifest, GPU, train=True)
    batch = next(iter(loader))
    loader.close()
    cycles, seconds = 10**8, 0.03

    def late(idle: bool) -> Iterator[Batch]:
        for _ in range(8):
            torch.cuda.synchronize(GPU)  # as in a loader that waits for its memory
            if idle:
                time.sleep(seconds)
            yield batch

    stalled = []
    for idle in (False, True):
        timed = StallTimer(late(idle), GPU)
        for _ in timed:
            torch.cuda._sleep(cycles)  # about 50 ms of work
        stalled.append(timed.seconds)
    assert stalled[1] - stalled[0] > 8 * seconds / 2
    assert stalled[0] < stalled[1] / 4


class Killed(BaseException):
    """Ends a run as a power cut might."""


def test_a_killed_run_goes_on_to_the_result_of_an_undisturbed_one(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal within rounding, since a GPU sums in no fixed order."""
    whole, cut = (
        tiny_config(manifest.root, tmp_path / name, epochs=2, batch_size=16, checkpoint_every=4)
        for name in ("whole", "cut")
    )
    train(whole)

    def save_and_die(*arguments: object, **options: object) -> None:
        save_checkpoint(*arguments, **options)  # type: ignore[arg-type]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(cut)
    train(dataclasses.replace(cut, resume=True))
    ours, theirs = (
        [json.loads(line)["loss"] for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        for config in (whole, cut)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_logits_over_views_are_those_of_the_cpu(manifest: Manifest) -> None:
    torch.manual_seed(0)
    pool = torch.nn.Sequential(torch.nn.AvgPool2d(7), torch.nn.Flatten(), torch.nn.LazyLinear(1))
    pool(torch.zeros(1, CANVAS.channels, CANVAS.height, CANVAS.width))
    accelerator = build_accelerator("float32")
    assert accelerator.device.type == "cuda"
    found = []
    for device in (GPU, torch.device("cpu")):
        loader = loader_of(manifest, device, train=False)
        rows, logit = (
            predict_rows(accelerator, pool.to(device), loader, "prediction")
            if device == GPU
            else by_hand(pool.to(device), loader)
        )
        found.append(logit[np.argsort(rows)])
        loader.close()
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)
    target = manifest.target[manifest.rows("train")]
    assert roc_auc(target, found[0]) == pytest.approx(roc_auc(target, found[1]), abs=0.01)


def by_hand(model: torch.nn.Module, loader: Loader) -> tuple[np.ndarray, np.ndarray]:
    """Rows and mean logits over views, computed without the code under test."""
    rows, logits = [], []
    with torch.no_grad():
        for batch in loader:
            logit = torch.stack([model(view).squeeze(1) for view in batch.image.unbind(1)]).double().mean(0)
            rows += batch.row[batch.counts].tolist()
            logits += logit[batch.counts].tolist()
    return np.array(rows), np.array(logits)


def test_memory_stays_flat_over_a_thousand_batches(manifest: Manifest) -> None:
    """The GPU's memory, DALI's part included, and the process's."""
    loader = loader_of(manifest, GPU, train=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def used() -> tuple[float, float]:
        torch.cuda.synchronize(GPU)
        free, total = torch.cuda.mem_get_info(GPU)
        return (total - free) / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    for batch in itertools.islice(batches, WARM_UP):
        assert batch.image.shape[0] == 16
    gpu_before, process_before = used()
    for _ in itertools.islice(batches, BATCHES):
        pass
    gpu_after, process_after = used()
    loader.close()
    assert gpu_after - gpu_before < 32 and process_after - process_before < 64  # MB
