"""Each device is the one that is meant, in tests that run one after another and on machines with several GPUs.

No GPU is needed: torch.cuda is replaced by a made-up machine that notes what it is asked.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import pipeline.dali_engine
from pipeline.dali_engine import DaliImages
from pipeline.dali_graph import PREFETCH_DEPTH, GraphPlace
from pipeline.devices import with_index
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from pipeline.stall import StallTimer
from shard_tools.manifest import Manifest
from tests.tiny import CANVAS, pack_tiny
from training.accelerator import build_accelerator

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_test_sees_neither_device_nor_precision_of_the_one_before(precision: str) -> None:
    """Each of the two runs changes the state as a test marked gpu would."""
    assert not PartialState._shared_state and not AcceleratorState._shared_state
    accelerator = build_accelerator(precision)
    assert accelerator.device.type == "cpu" and accelerator.mixed_precision == precision.replace("float32", "no")
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(_cpu=False, device=torch.device("cuda"))


@dataclass
class TwoGpus:
    """Answers as torch.cuda on a machine with two GPUs, and notes on which GPU's stream each event was recorded."""

    current: int = 1
    recorded: list[int] = field(default_factory=list)
    waited_for: list[int] = field(default_factory=list)
    """The numbers of the events that were waited for."""

    def current_device(self) -> int:
        return self.current

    def current_stream(self, device: torch.device | None = None) -> int:
        return self.current if device is None or device.index is None else device.index

    def event(self, enable_timing: bool = False) -> "Event":
        return Event(self)


class Event:
    def __init__(self, machine: TwoGpus) -> None:
        self.machine, self.number, self.stream = machine, -1, -1

    def record(self, stream: int | None = None) -> None:
        self.number = len(self.machine.recorded)
        self.stream = self.machine.current_stream() if stream is None else stream
        self.machine.recorded.append(self.stream)

    def synchronize(self) -> None:
        self.machine.waited_for.append(self.number)

    def elapsed_time(self, later: "Event") -> float:
        assert self.stream == later.stream, "times of two GPUs"
        return 1000.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> TwoGpus:
    made_up = TwoGpus()
    monkeypatch.setattr(torch.cuda, "current_device", made_up.current_device)
    monkeypatch.setattr(torch.cuda, "current_stream", made_up.current_stream)
    monkeypatch.setattr(torch.cuda, "Event", made_up.event)
    return made_up


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("devices"), train=20, test=2)


def loader_of(manifest: Manifest, device: torch.device) -> Loader:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "sequential")
    return Loader(manifest, order, Share(len(rows), 4), CANVAS, device=device, config=LoaderConfig(engine="dali"))


def test_a_gpu_without_a_number_is_the_current_one(machine: TwoGpus) -> None:
    assert with_index(torch.device("cuda")) == SECOND
    assert with_index(FIRST) == FIRST and with_index(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(("asked", "meant"), [(torch.device("cuda"), SECOND), (FIRST, FIRST), (SECOND, SECOND)])
def test_dali_makes_images_on_the_gpu_that_torch_means(
    manifest: Manifest, machine: TwoGpus, monkeypatch: pytest.MonkeyPatch, asked: torch.device, meant: torch.device
) -> None:
    places: list[GraphPlace] = []
    monkeypatch.setattr(pipeline.dali_engine, "DaliImages", lambda *arguments: places.append(arguments[-1]))
    loader = loader_of(manifest, asked)
    machine.current = 1 - machine.current  # the GPU that becomes current later does not matter
    assert loader.device == meant and [place.device_id for place in places] == [meant.index]


def test_dali_gets_its_memory_back_after_the_copy_on_the_images_own_gpu(manifest: Manifest, machine: TwoGpus) -> None:
    """Images are made on the CPU here, but treated as those of the first GPU while the second is current."""
    loader = loader_of(manifest, torch.device("cpu"))
    expected = [batch.image.clone() for batch in loader]
    images: Any = loader._images
    assert isinstance(images, DaliImages)
    images._place = GraphPlace(images._place.max_batch, images._place.threads, FIRST.index)
    found = [batch.image for batch in loader]
    assert machine.recorded == [FIRST.index] * len(expected)
    assert machine.waited_for == list(range(len(expected) - PREFETCH_DEPTH))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    loader.close()


@pytest.mark.parametrize(("asked", "meant"), [(torch.device("cuda"), SECOND), (FIRST, FIRST)])
def test_the_stall_is_that_of_the_gpu_it_was_asked_of(
    machine: TwoGpus, asked: torch.device, meant: torch.device
) -> None:
    batches: Any = range(3)
    timed = StallTimer(batches, asked)
    for _ in timed:
        machine.current = 1 - machine.current
    assert timed.seconds == 4.0  # waiting for the end counts too
    assert machine.recorded == [meant.index] * 8
