"""Tasks report how they ended as soon as they end, wherever they run."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from infer import InferConfig
from pipeline.loader import LoaderConfig
from shard_tools.errors import InputError
from shard_tools.fingerprint import FingerprintConfig
from shard_tools.observation.cut_jobs import cut_work
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.pack import PackConfig
from shard_tools.storage.local import LocalStore
from shard_tools.tasks.base import Done, Need, T, TaskConfig, Tasks, Work, attempt
from shard_tools.tasks.local import InTurn, Processes, Threads
from shard_tools.tasks.opening import open_tasks, run_shown
from shard_tools.verify import verify
from tests.conftest import Command, Layout
from tests.squares import take
from tests.tiny import pack_tiny
from training.prediction import PredictConfig
from training.scoring import SCORES_SCHEMA, PartFiles, Scorer

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

    def prepare(_: int | None) -> list[int]:
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


def test_relative_paths_are_those_of_the_driver_where_other_machines_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.safetensors").touch()
    on = TaskConfig("ray")
    packing, finding = PackConfig(Path("in"), "out", tasks=on), FingerprintConfig(Path("in"), Path("x.csv"), tasks=on)
    cutting = IngestConfig("out", (Path("a.h5"),), tasks=on)
    listed = IngestConfig("s3://bucket/out", cadences=Path("all.lst"), tasks=on)
    scoring = InferConfig(("sets", "s3://bucket/set"), (Path("best.safetensors"),), scores="scores", tasks=on)
    paths = [packing.input, packing.out, finding.input, cutting.out, *cutting.files, listed.cadences, scoring.scores]
    expected = ["in", "out", "in", "out", "a.h5", "all.lst", "scores"]
    assert [str(path) for path in paths] == [str(tmp_path / name) for name in expected]
    assert scoring.shards == (str(tmp_path / "sets"), "s3://bucket/set") and listed.out == "s3://bucket/out"
    assert PackConfig(Path("in"), "out").input == Path("in")


class Blind(Tasks):
    """Tasks on machines that see no file of this one."""

    def run(self, work: Work[T]) -> Iterator[Done[T]]:
        for number, (contents,) in enumerate(work.calls):
            yield attempt(number, work.function, (replace(contents, store=LocalStore(Path("/nowhere"))),))


def test_files_that_no_node_sees_are_verified_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = pack_tiny(tmp_path, 12, 3)
    monkeypatch.setattr("shard_tools.verify.open_tasks", lambda *_: contextlib.nullcontext(Blind()))
    assert list(verify(manifest.root, where=TaskConfig("ray"))) == []
    (lost := manifest.root / "train-000000.tar").unlink()
    assert list(verify(manifest.root, where=TaskConfig("ray"))) == [f"{lost}: No such file or directory"]


def test_a_task_that_uploads_a_shard_asks_for_what_is_sent_at_once_and_for_its_disk() -> None:
    assert Need(300_000_000).uploading(256_000_000) == Need(556_000_000, 256_000_000)
    assert Need(300_000_000).uploading(2_000_000_000) == Need(824_288_000, 2_000_000_000)
    assert cut_work([], 10**6).need == Need(601_000_000, 10**6) and cut_work([]).need == Need(600_000_000)


def test_a_process_with_a_gpu_loads_with_all_cores_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters export OMP_NUM_THREADS=1, as for processes of one core each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    how = PredictConfig("test", 4, LoaderConfig(loader_threads=8))
    threads = [Scorer((), "float32", how, cores)._how.loader.loader_threads for cores in (6, 16, None)]
    assert threads == [6, 8, 1]


def test_a_part_that_is_not_there_once_it_was_written_asks_for_a_folder_that_all_machines_see(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"part-000000.parquet: was written, but is not there; --scores must be"):
        PartFiles(str(tmp_path / "scores")).read("part-000000.parquet")


def test_a_machine_that_does_not_see_the_folder_of_the_scores_makes_none_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PartFiles(str(tmp_path / "scores")).write("part-000000.parquet", SCORES_SCHEMA.empty_table())
    assert not (tmp_path / "scores").exists()
