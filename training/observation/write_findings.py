"""Score an observation and write what was found: the command behind `infer.py --candidates`."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.canvas import CanvasConfig
from pipeline.loader import LoaderConfig
from shard_tools.atomic_files import is_stream
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.observation.candidates_table import (
    COLUMNS,
    HITS,
    INTERFERENCE,
    PICTURES,
    Candidate,
    beside,
    foreign_pictures,
    remove_pictures,
    write_candidates,
)
from training.observation import interference
from training.observation.hits import ADDED, LEAST_SNR, Known, place_hits, read_hits, write_scored_hits
from training.observation.interference import write_interference
from training.observation.observed import check_searched_once, read_observed
from training.observation.ranking import rank_events
from training.observation.search_observation import Findings, How, Judge, search_observation
from training.observation.turbo_seti import check_replaced, write_turbo_seti
from training.prediction import Trained, load_trained, plan_judges, warn_of_known
from training.search.candidates import WindowModel

NO_WEIGHTS = Path("none")
"""The value of --weights that stands for the search alone."""


@dataclass(frozen=True)
class CandidatesConfig:
    """What is written about an observation."""

    candidates: Path | None = None
    """For shards that `python -m shard_tools ingest` cut: instead of a submission, write a ranked table of candidates
    here, such as candidates.csv, and interference.csv beside it (for another name X.csv: X.interference.csv).
    --weights none ranks them by the search alone."""
    min_snr: float = 6.0
    """Least signal to noise ratio of a candidate, in its three ON panels together. Noise alone reaches 6 in about one
    of several thousand snippets."""
    pictures: int = 20
    """Number of candidates that get a picture."""
    turbo_seti: Path | None = None
    """Folder for what was found, in turboSETI's formats: a .dat file for each telescope file, and events.csv. Files of
    an earlier run are replaced; other files of these names are an error."""
    hits: Path | None = None
    """Table of hits (.dat) or events (.csv) that turboSETI wrote: copy it with the score of the best line near each row
    to hits.csv beside candidates.csv, or to X.hits.csv beside X.csv."""

    def __post_init__(self) -> None:
        if not 4 <= self.min_snr <= 1e6:
            raise InputError(f"--min-snr {self.min_snr}: expected 4 or more; noise alone reaches 4 in every snippet")
        if self.candidates is None and (self.turbo_seti is not None or self.hits is not None):
            raise InputError("--turbo-seti, --hits: are for an observation; give --candidates too")
        if self.pictures < 0:
            raise InputError(f"--pictures {self.pictures}: expected 0 or more")


@dataclass(frozen=True)
class ObservationSearch:
    """Which snippets are searched, and with what."""

    manifest: Manifest
    split: str
    weights: Sequence[Path]
    """Files of weights; NO_WEIGHTS alone: the search alone."""
    loader: LoaderConfig
    device: torch.device


@dataclass(frozen=True)
class Written:
    """What was found and written."""

    candidates: list[Candidate]
    findings: Findings
    paths: list[Path]


def load_judges(weights: Sequence[Path], manifest: Manifest, split: str, device: torch.device) -> list[Judge]:
    """What scores the lines of which rows: the search alone, one model, or the models of all folds of a training.

    With models of several folds, each row is scored by the one that was not trained on it. Raises InputError if weights
    are of another kind, for another shape, or do not belong together.
    """
    rows = manifest.rows(split)
    if tuple(weights) == (NO_WEIGHTS,):
        return [Judge(None, 1, rows)]
    trained = [load_trained(path, manifest, tta=False) for path in weights]
    models = [
        _to_line_model(path, each, manifest).to(device).eval() for path, each in zip(weights, trained, strict=True)
    ]
    first, *others = plan_judges(manifest, trained, rows)
    if others:
        raise InputError(
            f"--weights {' '.join(map(str, weights))}: trained on different data, expected one file, or those of the "
            "folds of one training on this observation (train.py --fold all)"
        )
    warn_of_known(manifest, trained, rows)
    return [Judge(models[part.model], trained[part.model].canvas.sum_time_bins, part.rows) for part in first]


def _to_line_model(path: Path, trained: Trained, manifest: Manifest) -> WindowModel:
    model, config = trained.model, trained.canvas
    time_bins, channels = manifest.shape[1:]
    summed = config.sum_time_bins
    plain = CanvasConfig("panels", time_bins // summed, channels, summed, normalise=False)
    if not isinstance(model, WindowModel) or config != plain:
        raise InputError(
            f"{path}: trained with --canvas {config.canvas} to give one score for a snippet, expected weights that "
            "score lines: train with a preset that has --stem sums on panels that are neither resized nor normalised, "
            "or give --weights none to rank by the search alone"
        )
    return model


def _check_out(config: CandidatesConfig, out: Path) -> None:
    """Make the output folders. Raises InputError, before the search, for an output that cannot be written."""
    if out.suffix != ".csv" or out.is_dir() or is_stream(out):
        raise InputError(f"--candidates {out}: expected the name of a .csv table, such as candidates.csv")
    if out.name in (INTERFERENCE, HITS):
        raise InputError(f"--candidates {out}: a table of that name is written beside candidates.csv; choose another")
    tables = [out, beside(out, INTERFERENCE), beside(out, HITS)]
    _check_hits(config, tables)
    for path, is_folder in (*((table, False) for table in tables), (beside(out, PICTURES), True)):
        if path.exists() and path.is_dir() != is_folder:
            found, expected = ("file", "folder") if is_folder else ("folder", "file")
            raise InputError(
                f"--candidates {out}: {path} is a {found}, expected a {expected} or nothing; choose another place"
            )
    _check_replaced(out, tables[0], COLUMNS)
    _check_replaced(out, tables[1], interference.COLUMNS)
    if config.hits is not None:
        _check_replaced(out, tables[2], ADDED)
    _check_pictures(out, config.pictures)
    _make_folder("--candidates", out, out.parent)
    if config.turbo_seti is not None:
        _make_folder("--turbo-seti", config.turbo_seti, config.turbo_seti)


def _check_replaced(out: Path, table: Path, columns: Sequence[str]) -> None:
    """Raise InputError if a file would be replaced whose first line does not end with our columns."""
    if not table.exists():
        return
    with table.open("rb") as file:
        first = file.readline(1 << 16).decode("utf-8", "replace").strip()
    if first and not f",{first}".endswith(f",{','.join(columns)}"):
        raise InputError(
            f"--candidates {out}: {table} would be replaced, but its first line is not one of infer.py's; choose "
            "another name, or remove the file if an earlier version of infer.py wrote it"
        )


def _check_pictures(out: Path, most: int) -> None:
    """Raise InputError if a picture could replace a file that no earlier run wrote."""
    if foreign := foreign_pictures(out, most):
        raise InputError(
            f"--candidates {out}: a picture could replace {foreign[0]}, which no table of an earlier run names; move "
            "or remove that file, or choose another name for the table"
        )


def _check_hits(config: CandidatesConfig, tables: Sequence[Path]) -> None:
    """Raise InputError if the table of hits that is read would be overwritten."""
    if config.hits is None:
        return
    hits = config.hits.resolve()
    in_folder = config.turbo_seti is not None and hits.is_relative_to(config.turbo_seti.resolve())
    if in_folder or hits in [table.resolve() for table in tables]:
        raise InputError(
            f"--hits {config.hits}: would be overwritten; choose another place for "
            f"{'--turbo-seti' if in_folder else '--candidates'}"
        )


def _make_folder(option: str, value: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {value}: cannot be written ({error.strerror}); choose another place") from None


def find_candidates(config: CandidatesConfig, search: ObservationSearch) -> Written:
    """Search the snippets of an observation, rank what was found, and write the tables.

    Raises InputError if the data set is no observation, the weights do not fit, or no snippet can be searched.
    """
    assert config.candidates is not None
    manifest, split = search.manifest, search.split
    _check_out(config, config.candidates)
    observed = read_observed(manifest)
    check_searched_once(observed)
    if config.turbo_seti is not None:
        check_replaced(config.turbo_seti, observed)
    placed = None if config.hits is None else place_hits(read_hits(config.hits), observed)
    judges = load_judges(search.weights, manifest, split, search.device)
    is_trained = judges[0].model is not None
    watched = frozenset(int(row) for rows in placed.rows for row in rows) if placed else frozenset()
    how = How(judges, config.min_snr, search.device, search.loader, watched, LEAST_SNR)
    findings = search_observation(manifest, observed, split, how)
    folder = beside(config.candidates, PICTURES).name
    pictures = [f"{folder}/{rank}.png" for rank in range(1, min(config.pictures, len(findings.events)) + 1)]
    candidates, events = rank_events(findings, observed, manifest, trained=is_trained, pictures=pictures)
    ranked = list(zip(candidates, events, strict=True))
    paths = [config.candidates, beside(config.candidates, INTERFERENCE)]
    remove_pictures(paths[0])
    write_candidates(paths[0], candidates)
    write_interference(paths[1], findings.interference, [(each.source, each.start_mjd) for each in observed.cadences])
    if config.turbo_seti is not None:
        paths += write_turbo_seti(config.turbo_seti, findings, ranked, observed)
    if placed is not None:
        paths.append(beside(config.candidates, HITS))
        known = Known(ranked, findings.interference, findings.faint, is_trained)
        write_scored_hits(paths[-1], placed, known, manifest)
    return Written(candidates, findings, paths)
