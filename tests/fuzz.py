"""Seeded mutants of everything that is read: each is read right, or refused by an error that names the file.

    python -m tests.fuzz --mutants 10000 --seed 0

Each mutant is determined by its seed. Mutants run in child processes with bounded memory and time, so that a crash, a
hang or a blow-up is caught and has a seed. Exits with 1 on any failure; `--seed N --mutants 1` repeats that of seed N.

The outcomes that are allowed:
- refused: an InputError that names a file of the data set or run,
- right: the same samples, weights or state as before,
- found: a change in a shard that the reader cannot notice, as it hashes nothing, but that `verify` finds,
- consistent: a forgery whose hashes fit; the bytes of each key are its own, or it is refused. For a telescope's file,
  which has no checksums: only values of its own panel differ.
"""

import argparse
import faulthandler
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.mutants import Mutant, Mutants

ROOT = Path(__file__).resolve().parents[1]
SPARE_BYTES = 2 << 30
"""Address space (bytes) that a child may take beyond that of its imports and of the undamaged data."""
SECONDS = 60.0
"""Longest that one mutant may take, on a busy machine."""
START_SECONDS = 300.0  # to import torch on a machine that others keep busy


# ---- Reading them


class WrongError(Exception):
    """A mutant was read wrong, and nothing said so."""


class Oracle:
    """Reads the base once, and then says for each mutant what became of it."""

    def __init__(self, base: Path) -> None:
        from training.weights import load_weights

        self.base, self.shards, self.run, self.files = base, base / "shards", base / "run", base / "files"
        self.columns, self.records = self._read_data()
        self.images = self._read_images()
        self.weights = load_weights(self.run / "best.safetensors")
        self.state = RunState(self.shards)
        self.state.load(self.run)
        self.loaded = self.state.plain()
        self.config = json.loads((self.run / "config.json").read_text())
        self.observed = {extension: self._ingest(extension) for extension in ("fil", "h5")}

    def judge(self, mutant: Mutant) -> str:
        """The outcome in one word; raises on a failure."""
        from shard_tools.errors import InputError

        before = {path: path.read_bytes() for path in mutant.files}
        try:
            for path, data in mutant.files.items():
                path.write_bytes(data)
            if self.shards in next(iter(mutant.files)).parents:
                return self._judge_data(mutant)
            try:
                if self.files in next(iter(mutant.files)).parents:
                    return self._judge_telescope(mutant)
                return self._judge_run(mutant)
            except InputError as error:
                self._check_names_a_file(str(error))
                return "refused"
        finally:
            for path, data in before.items():
                path.write_bytes(data)

    def _judge_data(self, mutant: Mutant) -> str:
        from shard_tools.errors import InputError
        from shard_tools.verify import verify

        faults = list(verify(self.shards))
        for fault in faults:
            self._check_names_a_file(fault)
        if not faults and not mutant.consistent:
            raise WrongError("verify finds nothing")
        try:
            columns, records = self._read_data()
            images = self._read_images() if self._headers_differ(records) else self.images
        except InputError as error:
            self._check_names_a_file(str(error))
            return "refused"
        if mutant.consistent:
            # A forged table may give other labels and splits, but a key must still have its own bytes.
            if any(record[-self._array_bytes :] != self.records[key][-self._array_bytes :] for key, record in records):
                raise WrongError("a key was read with the bytes of another")
            return "consistent"
        same_images = all(np.array_equal(images[key], self.images[key]) for key in images)
        same_data = [record[-self._array_bytes :] for _, record in records] == [
            self.records[key][-self._array_bytes :] for key in columns["key"]
        ]
        if columns != self.columns:
            raise WrongError("the table of samples is another")
        return "right" if same_data and same_images else "found"

    def _judge_telescope(self, mutant: Mutant) -> str:
        """The files have no checksums: changes in the mutant's own panel may go unseen, but not in the other panels."""
        (path,) = mutant.files
        panel = sorted(self.files.glob(f"*{path.suffix}"), key=_by_time).index(path)
        found, expected = self._ingest(path.suffix[1:]), self.observed[path.suffix[1:]]
        if found.shape != expected.shape:
            if found.shape[2] < expected.shape[2]:
                return "consistent"  # fewer spectra: all panels are cropped, and a message says so
            raise WrongError(f"snippets of shape {found.shape}")
        if np.array_equal(found, expected):
            return "right"
        others = [position for position in range(6) if position != panel]
        if not np.array_equal(found[:, others], expected[:, others]) or not np.isfinite(found).all():
            raise WrongError("another panel was read wrong")
        return "consistent"

    def _ingest(self, extension: str) -> Any:
        """(N, P, T, F) of the six files, in processes as for a user, but with shorter time limits."""
        from shard_tools.observation import header_reader, read_watch
        from shard_tools.observation.ingest import ingest
        from shard_tools.observation.ingest_config import IngestConfig
        from shard_tools.sample import read_snippets

        header_reader.SECONDS = read_watch.SECONDS = SECONDS / 4
        out = self.base / "observed"
        shutil.rmtree(out, ignore_errors=True)
        paths = sorted(self.files.glob(f"*.{extension}"), key=_by_time)
        manifest = ingest(IngestConfig(str(out), tuple(paths), workers=1, max_drift=1.0))
        return read_snippets(manifest, np.arange(len(manifest)))

    def _headers_differ(self, records: Any) -> bool:
        return any(
            record[: -self._array_bytes] != self.records.get(key, record)[: -self._array_bytes]
            for key, record in records
        )

    def _read_data(self) -> tuple[dict[str, Any], Any]:
        """The table, and keys with their npy bytes: a dict for the base, which is read first, then lists."""
        from shard_tools.manifest import TAR_BLOCK, read_manifest
        from shard_tools.sample import read_record

        manifest = read_manifest(self.shards)
        rows = np.arange(len(manifest))
        data = [read_record(manifest, int(row))[TAR_BLOCK:].tobytes() for row in rows]
        names = ("split", "target", "fold", "shard", "offset", "size")
        columns = {"key": manifest.keys_of(rows), **{name: getattr(manifest, name).tolist() for name in names}}
        manifest.made["folds"] > 1  # noqa: B015 (as training asks)
        if not hasattr(self, "records"):
            self._array_bytes = 2 * int(np.prod(manifest.shape))
            return columns, dict(zip(columns["key"], data, strict=True))
        return columns, list(zip(columns["key"], data, strict=True))

    def _read_images(self) -> dict[str, Any]:
        """Each key's canvas, through the whole loader."""
        from pipeline.loader import Loader
        from pipeline.plan import Order, Share
        from shard_tools.manifest import read_manifest
        from tests.tiny import CANVAS

        manifest = read_manifest(self.shards)
        rows = np.arange(len(manifest))
        loader = Loader(manifest, Order(rows, manifest.target, "sequential"), Share(len(rows), 8), CANVAS)
        try:
            found = {}
            for batch in loader:
                for slot in batch.counts.nonzero().flatten().tolist():
                    found[manifest.key(int(batch.row[slot]))] = batch.image[slot].numpy().copy()
            return found
        finally:
            loader.close()

    def _judge_run(self, mutant: Mutant) -> str:
        import torch

        from training.config import check_same_run
        from training.run import _read_config
        from training.weights import load_weights

        if mutant.kind == "config":
            check_same_run(_read_config(self.run / "config.json"), self.config, self.run, ())
            return "right"
        if mutant.kind == "weights":
            weights, about = load_weights(self.run / "best.safetensors")
            same = about == self.weights[1] and weights.keys() == self.weights[0].keys()
            if not (same and all(torch.equal(weights[name], self.weights[0][name]) for name in weights)):
                raise WrongError("other weights")
            return "right"
        self.state.load(self.run)
        if mutant.consistent:
            return "consistent"
        if self.state.plain() != self.loaded:
            raise WrongError("another state")
        return "right"

    def _check_names_a_file(self, message: str) -> None:
        if str(self.base) not in message or "\n" in message:
            raise WrongError(f"names no file: {message!r}")


def _by_time(path: Path) -> int:
    """The place of a telescope's file in its cadence."""
    from tests.observation_files import NAMES

    return NAMES.index(path.stem)


class RunState:
    """What a checkpoint restores, for a network of one layer."""

    def __init__(self, shards: Path) -> None:
        import torch

        from pipeline.augment import DrawConfig
        from pipeline.loader import Loader
        from pipeline.plan import Order, Share
        from shard_tools.manifest import read_manifest
        from tests.tiny import CANVAS
        from training.accelerator import build_accelerator
        from training.run import Progress

        torch.manual_seed(0)
        manifest = read_manifest(shards)
        rows = manifest.rows("train")
        order = Order(rows, manifest.target[rows])
        self.loader = Loader(manifest, order, Share(len(rows), 2), CANVAS, DrawConfig())
        self.progress = Progress(3, 0.75, [{"epoch": 1.0, "auc": 0.75}], 0.5)
        self.accelerator = build_accelerator("float32")
        model = torch.nn.Linear(4, 3)
        self.model, self.optimiser = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimiser.step()
        self.accelerator.register_for_checkpointing(self.progress, self.loader)

    def load(self, run: Path) -> None:
        from training.checkpoint import load_last_checkpoint

        assert load_last_checkpoint(self.accelerator, run)

    def plain(self) -> str:
        """All of it as text."""
        import random

        import torch

        parts = [self.model.state_dict(), self.optimiser.state_dict(), vars(self.progress), self.loader.state_dict()]
        random_states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()]  # noqa: NPY002
        return repr(parts + random_states)


def write_base(base: Path) -> None:
    """A tiny data set, and one file of each kind that a tiny training writes."""
    import torch

    from tests.observation_files import NAMES, fields, power, write_fil, write_h5
    from tests.tiny import pack_tiny, tiny_config
    from training.checkpoint import save_checkpoint
    from training.config import run_identity
    from training.weights import save_weights

    for extension, write in (("fil", write_fil), ("h5", write_h5)):
        (base / "files").mkdir(exist_ok=True)
        for position, name in enumerate(NAMES):
            header = fields(position, nchans=8192, nfpc=4096)
            write(base / "files" / f"{name}.{extension}", power(position, channels=8192), header)
    manifest = pack_tiny(base, train=20, test=6)
    run = base / "run"
    state = RunState(manifest.root)
    save_checkpoint(state.accelerator, run, 3, best=True)
    identity = run_identity(tiny_config(manifest.root, run), manifest.identity, 1)
    (run / "config.json").write_text(json.dumps(identity, indent=1) + "\n")
    tensors = {"a.weight": torch.randn(4, 5), "a.bias": torch.zeros(4), "b": torch.arange(6), "c": torch.tensor(1.5)}
    save_weights(run / "best.safetensors", tensors, {"model": "swin_nano", "shape": [6, 14, 56], "auc": 0.5})


# ---- Children and their parent


def run_child(base: Path, seeds: range) -> None:
    """Judge these mutants in this process; a line of JSON before and after each."""
    faulthandler.dump_traceback_later(0.8 * START_SECONDS)  # prints where it hangs, before it is killed
    print(json.dumps({"seed": seeds.start, "kind": "start of a child"}), flush=True)
    oracle, mutants = Oracle(base), Mutants(base)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in seeds:
        faulthandler.dump_traceback_later(0.8 * SECONDS)
        kind = "?"
        try:
            mutant = mutants.make(seed)
            kind = mutant.kind
            print(json.dumps({"seed": seed, "kind": kind}), flush=True)
            outcome, detail = oracle.judge(mutant), ""
        except Exception as error:
            outcome, detail = "FAILURE", f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({"seed": seed, "kind": kind, "outcome": outcome, "detail": detail}), flush=True)


def results(base: Path, seeds: range, batch: int) -> Iterator[dict[str, Any]]:
    """What became of every mutant, from one child process after another."""
    start = seeds.start
    while start < seeds.stop:
        stop = min(start + batch, seeds.stop)
        words = [sys.executable, "-m", "tests.fuzz", "--child", str(base), "--seed", str(start)]
        errors = base / "stderr.txt"
        with errors.open("wb") as sink:
            child = subprocess.Popen(
                [*words, "--mutants", str(stop - start)], cwd=ROOT, stdout=subprocess.PIPE, stderr=sink, text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(child.stdout, lines), daemon=True).start()
        begun: dict[str, Any] = {"seed": start, "kind": "?"}
        while True:
            seconds = START_SECONDS if begun.get("kind") in ("?", "start of a child") else SECONDS
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                child.kill()
                where = errors.read_text(errors="replace")[-1500:]
                yield {**begun, "outcome": "FAILURE", "detail": f"hangs for {seconds:.0f} s: {where}"}
                break
            if line is None:
                if child.wait() or begun:
                    detail = f"exit {child.wait()}: {errors.read_text(errors='replace')[-600:]}"
                    yield {**(begun or {"seed": start, "kind": "?"}), "outcome": "FAILURE", "detail": detail}
                break
            begun = json.loads(line)
            if "outcome" in begun:
                yield begun
                start, begun = begun["seed"] + 1, {}
        child.wait()
        if begun:  # the child died: go on after its mutant, whose files may still lie there
            start = begun["seed"] + 1
            shutil.rmtree(base)
            write_base_in_child(base)
        elif start < stop:
            start = stop


def _pass_on(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


def write_base_in_child(base: Path) -> None:
    base.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "tests.fuzz", "--write-base", str(base)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(words, cwd=ROOT, check=True, env=environment, capture_output=True)


def fuzz(mutants: int, seed: int, batch: int = 1000) -> tuple[Counter[tuple[str, str]], list[dict[str, Any]]]:
    """Counts by kind and outcome, and the failures."""
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_base_in_child(base)
        for result in results(base, range(seed, seed + mutants), batch):
            counts[result["kind"], result["outcome"]] += 1
            if result["outcome"] == "FAILURE":
                failures.append(result)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutate whatever is read, and read it.")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant; each has the next number")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write-base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_base:
        write_base(options.write_base)
        return 0
    if options.child:
        run_child(options.child, range(options.seed, options.seed + options.mutants))
        return 0
    counts, failures = fuzz(options.mutants, options.seed)
    outcomes = ["refused", "right", "found", "consistent", "FAILURE"]
    print(f"{'':28}" + "".join(f"{outcome:>12}" for outcome in outcomes))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:28}" + "".join(f"{counts[kind, outcome]:12,}" for outcome in outcomes))
    print(f"{'all':28}" + "".join(f"{sum(n for (_, o), n in counts.items() if o == name):12,}" for name in outcomes))
    for failure in failures[:50]:
        print(f"seed {failure['seed']} ({failure['kind']}): {failure['detail']}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
