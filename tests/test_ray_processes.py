"""Which process gets a call on a cluster whose nodes and processes fail; tests/fake_ray.py stands in for Ray."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install -r requirements-ray.txt)")

from ray.exceptions import ActorDiedError, OutOfMemoryError

from shard_tools.errors import InputError, StoreError
from shard_tools.observation.opening import open_filterbank
from shard_tools.storage.local import read_into
from shard_tools.tasks.base import Done, Need, Work, attempt
from shard_tools.tasks.ray_cluster import RayTasks
from shard_tools.tasks.ray_starters import Fault, _Holder
from tests.fake_ray import FakeRay, Reference

Start = Callable[[FakeRay], FakeRay]
GB = 10**9


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Replace Ray by a fake."""

    def put(fake: FakeRay) -> FakeRay:
        for module in ("ray_cluster", "ray_nodes", "ray_starters"):
            monkeypatch.setattr(f"shard_tools.tasks.{module}.ray", fake)
        return fake

    return put


def run(count: int, memory: int = 1) -> dict[int, Done[None]]:
    """Score `count` parts; return how each ended."""
    names = [f"part-{number}" for number in range(count)]
    calls = [(number,) for number in range(count)]
    work: Work[None] = Work(lambda *_: None, calls, "scoring", "cadences", names, Need(memory), prepare=lambda _: 1)
    return {done.number: done for done in RayTasks().run(work)}


def succeed(reference: Reference) -> Any:
    """The answer of a process when nothing fails."""
    node = reference.process.node
    return node if reference.number is None else (node, Done(reference.number))


@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "not-yet-noticed"])
def test_a_node_that_dies_with_idle_processes_costs_a_part_one_try(
    start: Start, caplog: pytest.LogCaptureFixture, is_noticed: bool
) -> None:
    died: list[Reference] = []

    def answer(reference: Reference) -> Any:
        if reference.process.node == "A" and reference.number in (4, *(each.number for each in died)):
            died.append(reference)
            if is_noticed:
                fake.gone.add("A")
            raise ActorDiedError
        return succeed(reference)

    fake = start(FakeRay({"A": 5, "B": 1}, answer, first="A"))
    ended = run(6)
    assert len(ended) == 6 and not any(done.error for done in ended.values())
    assert len(died) == 1 and "trying again (2 of 4)" in caplog.text


def refuse() -> None:
    raise StoreError("s3://b: no answer for 60 s")


@pytest.mark.parametrize(
    "fails",
    [
        refuse,
        lambda: Path("/nowhere/train/a.npy").read_bytes(),
        lambda: open_filterbank(Path("/nowhere/A1.h5")),
        lambda: read_into("/nowhere/train-000000.tar", 0, [np.zeros(3, np.uint8)]),
    ],
    ids=["store", "snippet", "observation", "shard"],
)
def test_a_task_that_cannot_reach_the_store_or_a_file_on_one_node_is_done_on_another_that_is_busy(
    start: Start, fails: Callable[[], object]
) -> None:
    """Even though the first node has an idle process."""

    def answer(reference: Reference) -> Any:
        if reference.number is not None and reference.process.node == "A":
            return "A", attempt(reference.number, fails, ())
        return succeed(reference)

    start(FakeRay({"A": 1, "B": 1}, answer, first="A"))
    ended = run(4)
    assert len(ended) == 4 and not any(done.error for done in ended.values())


def test_a_node_that_dies_while_its_processes_start_does_not_end_the_run(start: Start) -> None:
    failed = []

    def answer(reference: Reference) -> Any:
        if reference.number is None and reference.process.node == "A":
            failed.append(reference)
            fake.gone.add("A")
            raise ActorDiedError
        return succeed(reference)

    fake = start(FakeRay({"A": 6, "B": 2}, answer))
    assert len(run(8)) == 8 and len(failed) == 6


def test_processes_that_never_start_end_the_run_with_the_reason(start: Start) -> None:
    def answer(reference: Reference) -> Any:
        raise ActorDiedError

    start(FakeRay({"A": 2}, answer))
    with pytest.raises(InputError, match="processes for scoring do not start"):
        run(8)


def test_a_part_that_ran_out_of_memory_gets_a_process_with_twice_as_much_though_idle_ones_hold_the_rest(
    start: Start,
) -> None:
    """A node of 4 GB has room for a process of 2 GB only after an idle one of 1 GB has ended."""
    tried: list[int] = []

    def answer(reference: Reference) -> Any:
        if reference.number == 3:
            tried.append(reference.process.options["memory"])
            if tried[-1] < 2 * GB:
                raise OutOfMemoryError("memory ran out")
        return succeed(reference)

    start(FakeRay({"A": 4}, answer, memory=4 * GB))
    ended = run(4, GB)
    assert len(ended) == 4 and tried == [GB, 2 * GB]


def test_a_call_for_another_node_does_not_wait_for_one_that_has_died(start: Start) -> None:
    """The call failed on A; B, the only other node, dies while it works on the call, which is then tried on A again."""
    tried: list[str] = []

    def answer(reference: Reference) -> Any:
        node = reference.process.node
        if reference.number == 0:
            tried.append(str(node))
            if tried == ["A"]:
                return node, Done(0, error=FileNotFoundError(2, "No such file"))
            if node == "B":
                fake.gone.add("B")
                raise ActorDiedError
        return succeed(reference)

    fake = start(FakeRay({"A": 1, "B": 1}, answer, first="A"))
    assert len(run(2)) == 2 and tried == ["A", "B", "A"]


def test_a_fault_of_the_program_on_a_node_is_one_line_with_the_file_and_the_node(start: Start) -> None:
    def answer(reference: Reference) -> Any:
        if reference.number is None:
            return succeed(reference)
        return reference.process.node, Fault("RuntimeError: CUDA error: no kernel image", "Traceback ...")

    start(FakeRay({"A": 1}, answer))
    with pytest.raises(InputError, match=r"^part-0: node A/A: RuntimeError: CUDA error: no kernel image$"):
        run(1)


def test_an_idle_process_of_a_node_that_is_gone_gets_no_call(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard_tools.tasks.ray_nodes.LOOK_SECONDS", 0.0)
    tried: list[str] = []

    def answer(reference: Reference) -> Any:
        node = str(reference.process.node)
        if reference.number == 1:
            tried.append(node)
            fake.gone.add("A")
            if node == "A":
                raise ActorDiedError
            if node == "B":
                return node, Done(1, error=FileNotFoundError(2, "No such file"))
        return succeed(reference)

    fake = start(FakeRay({"A": 1, "B": 1, "C": 1}, answer, first="A"))
    assert len(run(2)) == 2 and tried == ["B", "C"]


@pytest.fixture
def on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one of Ray's, with three cores."""
    about = SimpleNamespace(get_node_id=lambda: "A", get_assigned_resources=lambda: {"CPU": 3.0})
    monkeypatch.setattr("shard_tools.tasks.ray_starters.ray", SimpleNamespace(get_runtime_context=lambda: about))


@pytest.mark.usefixtures("on_a_node")
def test_what_a_process_holds_is_made_once_for_the_cores_that_it_was_given() -> None:
    made: list[int | None] = []
    holder = _Holder(lambda cores: made.append(cores) or "model")
    assert [holder.call(n, lambda held, n: (held, n), (n,)) for n in (0, 1)] == [
        ("A", Done(0, ("model", 0))),
        ("A", Done(1, ("model", 1))),
    ]
    assert made == [3]


@pytest.mark.usefixtures("on_a_node")
@pytest.mark.parametrize("where", ["prepare", "function"])
def test_a_fault_on_a_node_comes_back_as_its_kind_and_its_text(where: str) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error:\nno kernel image")

    holder = _Holder(fail if where == "prepare" else lambda _: 1)
    node, fault = holder.call(0, fail, (0,))
    assert node == "A" and isinstance(fault, Fault) and fault.what == "RuntimeError: CUDA error: no kernel image"
    assert "in fail" in fault.traceback


def test_a_part_that_waits_for_another_node_keeps_no_other_from_a_core_that_is_free(start: Start) -> None:
    """A process on A dies at the first part while B is busy: A gets a new process for the parts that are left."""
    tried: list[tuple[int, str]] = []

    def answer(reference: Reference) -> Any:
        if reference.number is not None:
            tried.append((reference.number, str(reference.process.node)))
            if tried == [(0, "A")]:
                raise ActorDiedError
        return succeed(reference)

    start(FakeRay({"A": 1, "B": 1}, answer, first="A"))
    assert len(run(5)) == 5
    assert tried == [(0, "A"), (2, "A"), (3, "A"), (4, "A"), (1, "B"), (0, "B")]
