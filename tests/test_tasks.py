"""Tasks: how each ended comes back as it ends, wherever they run."""

import sys
from pathlib import Path

import pytest

from infer import InferConfig
from shard_tools.errors import InputError
from shard_tools.tasks.base import TaskConfig, Tasks, Work
from shard_tools.tasks.local import InTurn, Processes, Threads
from shard_tools.tasks.places import open_tasks, run_shown
from tests.conftest import Command, Layout
from tests.squares import take

PLACES = [InTurn(), Threads(2), Processes(2)]


def work(folder: Path, count: int) -> Work[int]:
    return Work(
        take, [(number, folder) for number in range(count)], "squaring", "numbers", list(map(str, range(count)))
    )


@pytest.mark.parametrize("tasks", PLACES, ids=lambda tasks: type(tasks).__name__)
def test_every_call_comes_back_once_with_its_value_or_its_error(tasks: Tasks, tmp_path: Path) -> None:
    ended = sorted(tasks.run(work(tmp_path, 5)), key=lambda done: done.number)
    assert [done.value for done in ended] == [0, None, 4, None, 16]
    with pytest.raises(InputError, match="3: odd"):
        ended[3].result()


@pytest.mark.parametrize("tasks", PLACES, ids=lambda tasks: type(tasks).__name__)
def test_calls_that_were_not_begun_are_dropped_where_one_gives_up(tasks: Tasks, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="odd"):
        for done in run_shown(tasks, work(tmp_path, 400)):
            done.result()
    assert len(list(tmp_path.iterdir())) < 400


def test_what_is_prepared_is_made_once_for_all_calls() -> None:
    made: list[int] = []

    def prepare() -> list[int]:
        made.append(1)
        return made

    ended = list(
        InTurn().run(Work(lambda held, number: len(held) + number, [(5,), (6,)], "", "", ["", ""], prepare=prepare))
    )
    assert [done.value for done in ended] == [6, 7]


def test_without_ray_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, sharded: Layout, tmp_path: Path, command: Command
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("ray_cluster", "ray_nodes", "ray_starters"):
        monkeypatch.delitem(sys.modules, f"shard_tools.tasks.{name}", raising=False)
    answer = command("pack", "--input", sharded.root, "--out", tmp_path / "out", "--folds", 3, "--on", "ray")
    assert answer.code == 1 and "pip install -r requirements-ray.txt" in answer.err


def test_an_address_of_a_cluster_without_ray_is_refused() -> None:
    with pytest.raises(InputError, match=r"--ray-address head:6379: .*--on ray"):
        TaskConfig(ray_address="head:6379")


def test_a_prediction_on_ray_needs_a_place_for_its_scores(tmp_path: Path) -> None:
    weights = tmp_path / "best.safetensors"
    weights.touch()
    with pytest.raises(InputError, match="--on ray: needs --scores"):
        InferConfig(("shards",), (weights,), tasks=TaskConfig("ray"))


def test_on_this_machine_no_cluster_is_asked_for() -> None:
    place = InTurn()
    with open_tasks(TaskConfig(), place) as tasks:
        assert tasks is place
