"""The notebooks run from data to a submission, as readers run them, and are kept without outputs."""

import csv
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from shard_tools.manifest import read_manifest
from shard_tools.simulate import SimulateConfig, simulate
from tests.conftest import ROOT

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A small network, for snippets with three time bins summed into one while packing.
SMALL = (
    "--preset demo --model swin_nano --stem none --canvas on_off --height 56 --width 56 --sum-time-bins 1 --epochs 1 "
    "--batch-size 8 --loader-threads 1 --precision float32 --tracker none"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated cadences of the competition's shape, in its layout."""
    folder = tmp_path_factory.mktemp("notebooks") / "data"
    simulate(SimulateConfig(folder, train=24, test=5, workers=1, positive_share=0.5, snr_min=300, snr_max=3000))
    return folder


def with_parameters(book: Any, **parameters: object) -> Any:
    """The notebook with other values of parameters, set after its own; each name must be one of its own."""
    (number,) = [n for n, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ())]
    own = set(re.findall(r"^(\w+) = ", book.cells[number].source, re.M))
    assert parameters.keys() <= own, parameters.keys() - own
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    book.cells.insert(number + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    return book


def execute(name: str, folder: Path, **parameters: object) -> str:
    """Run a notebook in a folder; return what its cells printed. Raises CellExecutionError if one fails."""
    book = with_parameters(nbformat.read(ROOT / "notebooks" / name, as_version=4), **parameters)
    folder.mkdir(exist_ok=True)
    NotebookClient(book, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    return "".join(output.get("text", "") for output in outputs)


def ids_in(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row["id"] for row in csv.DictReader(file)]


def kaggle(data: Path, folder: Path, **parameters: object) -> str:
    given = {"PROGRAM": str(ROOT), "DATA": str(data), "WORK": str(folder / "work"), "ENVIRONMENT": "", "OPTIONS": SMALL}
    return execute("kaggle.ipynb", folder, **{**given, **parameters})


def test_the_kaggle_notebook_makes_a_submission_on_two_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    said = kaggle(data, tmp_path, PROCESSES=2)
    assert "training on 2 ranks" in said and "validation ROC AUC" in said
    assert ids_in(work / "submission.csv") == ids_in(data / "sample_submission.csv")
    assert (work / "run" / "report.html").is_file()
    # No shards or links are left: they would not fit on the disk, or would go into the notebook's output.
    assert sorted(path.name for path in work.iterdir()) == ["candidates.png", "run", "submission.csv"]


def test_the_kaggle_notebook_trains_on_a_part_and_stops_where_a_step_fails(data: Path, tmp_path: Path) -> None:
    """Half of the cadences are packed, with three time bins in one; then the training gets an unknown option."""
    with pytest.raises(CellExecutionError, match="its own words are above"):
        kaggle(data, tmp_path, SHARE=0.5, OPTIONS="--no-such-option")
    manifest = read_manifest(tmp_path / "work" / "shards-train")
    assert manifest.splits["train"]["samples"] == 12 and manifest.shape == (6, 91, 256)
    assert not (tmp_path / "work" / "submission.csv").exists()


def test_the_colab_notebook_makes_a_submission(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    said = execute(
        "colab.ipynb", tmp_path, PROGRAM=str(ROOT), DATA=str(data), WORK=str(work), SHARDS=str(tmp_path / "shards"),
        ENVIRONMENT="", PACKING="--time-bin 3", OPTIONS=SMALL.replace("--preset demo ", ""),
    )  # fmt: skip
    assert "validation ROC AUC" in said
    assert ids_in(work / "submission.csv") == ids_in(data / "sample_submission.csv")
    assert read_manifest(tmp_path / "shards").shape == (6, 91, 256)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code and not [cell for cell in code if cell.outputs or cell.execution_count is not None]
    # Nothing about the machine that it was written on.
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert book.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}


def test_there_is_a_notebook_for_kaggle_and_one_for_colab() -> None:
    assert [path.stem for path in BOOKS] == ["colab", "kaggle"] and os.access(BOOKS[0], os.R_OK)
