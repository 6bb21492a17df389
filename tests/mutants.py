"""Mutants of a data set, a run and a telescope's files, each determined by its seed.

Flipped bits, cuts, swaps, insertions, huge numbers; and forgeries whose hashes fit.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator


# ---- Mutations of bytes


def flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), rng.choice([1, 1, 1, 8])).tolist():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def some_range(data: bytes, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(0, len(data)))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 12)))


def cut_end(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def cut_range(data: bytes, rng: Rng) -> bytes:
    start, end = some_range(data, rng)
    return data[:start] + data[end:]


def swap_ranges(data: bytes, rng: Rng) -> bytes:
    (a, b), (c, d) = sorted([some_range(data, rng), some_range(data, rng)])
    b = min(b, c)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def insert_bytes(data: bytes, rng: Rng) -> bytes:
    start, end = some_range(data, rng)
    return data[:start] + rng.bytes(end - start) + data[start:]


def duplicate_range(data: bytes, rng: Rng) -> bytes:
    start, end = some_range(data, rng)
    return data[:end] + data[start:end] + data[end:]


def huge_number(data: bytes, rng: Rng) -> bytes:
    """Put a huge number somewhere: in binary, or in place of a run of digits."""
    digits = [place for place in range(min(len(data), 20_000)) if data[place : place + 1].isdigit()]
    if digits and rng.random() < 0.5:
        start = end = int(rng.choice(digits))
        while data[end : end + 1].isdigit():
            end += 1
        texts = [b"9" * 10, b"9" * 19, b"9" * 400, b"-1", b"1e999", b"0", b"4294967296", b"18446744073709551615"]
        return data[:start] + texts[rng.integers(len(texts))] + data[end:]
    start = int(rng.integers(0, len(data)))
    words = [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\xff" * 3 + b"\x7f", b"\0" * 8, b"\0\0\0\x80", b"\xff\xff\x03\0"]
    word = words[rng.integers(len(words))]
    return data[:start] + word + data[start + len(word) :]


MUTATIONS: list[Callable[[bytes, Rng], bytes]] = [
    flip_bits, flip_bits, cut_end, cut_range, swap_ranges, insert_bytes, duplicate_range, huge_number, huge_number,
]  # fmt: skip


def mutated(data: bytes, rng: Rng) -> bytes:
    """`data` changed by one mutation, or now and then by three."""
    changed = data
    while changed == data:
        for _ in range(int(rng.choice([1, 1, 1, 3]))):
            if changed:
                changed = MUTATIONS[rng.integers(len(MUTATIONS))](changed, rng)
    return changed


# ---- Mutants


@dataclass(frozen=True)
class Mutant:
    """Files whose bytes differ from those of the base."""

    kind: str
    files: dict[Path, bytes]
    consistent: bool = False
    """Whether its hashes fit its content."""


ODD_VALUES: list[Any] = [
    0, 1, -1, 2, 6, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**400, 1.5, float("inf"), True, None, "", "x", "../x", [], {},
    [0], [[]], {"x": 1}, "train-000000.tar", "test-000000.tar", "samples.parquet", "manifest.json",
]  # fmt: skip


def change_json(value: Any, rng: Rng) -> Any:
    """Set, drop or double one field at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = sorted(value)[rng.integers(len(value))]
        if rng.random() < 0.1:
            return {key: inner for key, inner in value.items() if key != name}
        return {**value, name: change_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = int(rng.integers(len(value)))
        if rng.random() < 0.2:
            return value[:place] + value[place + int(rng.integers(0, 2)) :] + [value[place]]
        return [*value[:place], change_json(value[place], rng), *value[place + 1 :]]
    if type(value) is int and rng.random() < 0.4:
        return value + int(rng.choice([-512, -1, 1, 512]))
    return ODD_VALUES[rng.integers(len(ODD_VALUES))]


class Mutants:
    """Makes mutants of one data set and one run."""

    def __init__(self, base: Path) -> None:
        self.shards, self.run, self.files = base / "shards", base / "run", base / "files"
        self.checkpoint = (self.run / "checkpoints" / "last").resolve()
        self.content = json.loads((self.shards / "manifest.json").read_text())
        self.content.pop("~sha256")
        self.kinds: dict[str, tuple[float, Callable[[Rng], dict[Path, bytes]]]] = {
            "shard": (12, lambda rng: self._bytes(rng, self.shards.glob("*.tar"))),
            "snippet data": (8, self._snippet_data),
            "npy and tar headers": (14, self._headers),
            "index": (6, lambda rng: self._bytes(rng, self.shards.glob("*.idx"))),
            "manifest": (8, lambda rng: self._bytes(rng, [self.shards / "manifest.json"])),
            "manifest, consistent": (14, self._manifest),
            "samples": (4, lambda rng: self._bytes(rng, [self.shards / "samples.parquet"])),
            "samples, consistent cells": (10, self._cells),
            "samples, consistent bytes": (8, self._parquet),
            "weights": (6, lambda rng: self._bytes(rng, [self.run / "best.safetensors"])),
            "checkpoint": (6, lambda rng: self._bytes(rng, self.checkpoint.iterdir())),
            "checkpoint, consistent": (6, self._checkpoint),
            "config": (4, lambda rng: self._bytes(rng, [self.run / "config.json"])),
            # Fewer of these, as each needs processes of its own.
            "telescope file, fil": (2, lambda rng: self._telescope(rng, "fil")),
            "telescope file, h5": (2, lambda rng: self._telescope(rng, "h5")),
        }

    def make(self, seed: int) -> Mutant:
        """The mutant of a seed."""
        rng = np.random.default_rng([7, seed])
        chances = np.array([chance for chance, _ in self.kinds.values()])
        kind = list(self.kinds)[rng.choice(len(chances), p=chances / chances.sum())]
        return Mutant(kind, self.kinds[kind][1](rng), "consistent" in kind)

    def _bytes(self, rng: Rng, paths: Any) -> dict[Path, bytes]:
        ordered = sorted(paths)
        path = ordered[rng.integers(len(ordered))]
        return {path: mutated(path.read_bytes(), rng)}

    def _telescope(self, rng: Rng, extension: str) -> dict[Path, bytes]:
        """One of six files, most often changed in its header."""
        path = sorted(self.files.glob(f"*.{extension}"))[rng.integers(6)]
        data, head = path.read_bytes(), 1024 if extension == "fil" else 8192
        if rng.random() < 0.3:
            return {path: mutated(data, rng)}
        return {path: mutated(data[:head], rng) + data[head:]}

    def _places(self) -> tuple[Any, int]:
        import pyarrow.parquet as pq

        table = pq.read_table(self.shards / "samples.parquet").to_pylist()
        return table, 2 * int(np.prod(self.content["shape"]))

    def _snippet_data(self, rng: Rng) -> dict[Path, bytes]:
        rows, array_bytes = self._places()
        row = rows[rng.integers(len(rows))]
        path = self.shards / self.content["shards"][row["shard"]]["name"]
        data, start = path.read_bytes(), row["offset"] + row["size"] - array_bytes
        return {path: data[:start] + flip_bits(data[start : start + array_bytes], rng) + data[start + array_bytes :]}

    def _headers(self, rng: Rng) -> dict[Path, bytes]:
        rows, array_bytes = self._places()
        row = rows[rng.integers(len(rows))]
        path = self.shards / self.content["shards"][row["shard"]]["name"]
        data, end = path.read_bytes(), row["offset"] + row["size"] - array_bytes
        start = row["offset"] if rng.random() < 0.7 else row["offset"] - 512
        same_length = rng.random() < 0.7  # so that what follows keeps its place
        header = data[start:end]
        while header == data[start:end]:
            header = mutated(data[start:end], rng)
            if same_length:
                header = header[: end - start].ljust(end - start)
        return {path: data[:start] + header + data[end:]}

    def _manifest(self, rng: Rng) -> dict[Path, bytes]:
        from shard_tools.manifest import canonical_json

        content = self.content
        for _ in range(int(rng.choice([1, 1, 2]))):
            content = change_json(content, rng)
        if not isinstance(content, dict):
            content = {**self.content, "shards": content}
        return {self.shards / "manifest.json": canonical_json(content).encode()}

    def _with_table(self, table: bytes) -> dict[Path, bytes]:
        from shard_tools.manifest import canonical_json

        files = {**self.content["files"], "samples.parquet": hashlib.sha256(table).hexdigest()}
        manifest = canonical_json({**self.content, "files": files}).encode()
        return {self.shards / "samples.parquet": table, self.shards / "manifest.json": manifest}

    def _cells(self, rng: Rng) -> dict[Path, bytes]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(self.shards / "samples.parquet")
        columns = {name: table[name].to_pylist() for name in table.column_names}
        schema = table.schema
        name = table.column_names[rng.integers(len(columns))]
        row, other = rng.integers(len(table), size=2).tolist()
        limit = {"int8": 2**7, "int32": 2**31, "int64": 2**63, "string": 0}[str(schema.field(name).type)]
        if (change := rng.random()) < 0.3:
            columns[name][row] = columns[name][other]
        elif change < 0.4:
            columns[name][row], columns[name][other] = columns[name][other], columns[name][row]
        elif change < 0.5:
            for values in columns.values():
                values[row] = values[other]
        elif change < 0.55:
            order = rng.permutation(len(table)).tolist()
            columns = {key: [values[place] for place in order] for key, values in columns.items()}
        elif change < 0.6:
            columns = {key: values[:row] for key, values in columns.items()}
        elif change < 0.65:
            columns.pop(name)
            schema = pa.schema([field for field in schema if field.name != name])
        elif limit:
            value = rng.choice([-1, 0, 1, 2, 511, 513, limit - 1, -limit, 1 << 20])
            columns[name][row] = None if rng.random() < 0.1 else int(np.clip(value, -limit, limit - 1))
        else:
            odd = ["", "a/b", "../../etc/passwd", "x" * 97, "x" * 96, "a.b", "é", "a\0", None, "A" * 10**6, "a\n"]
            columns[name][row] = odd[rng.integers(len(odd))]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=schema), sink, row_group_size=int(rng.choice([1, 7, 1000])))
        return self._with_table(sink.getvalue().to_pybytes())

    def _parquet(self, rng: Rng) -> dict[Path, bytes]:
        data = (self.shards / "samples.parquet").read_bytes()
        if rng.random() < 0.5:
            return self._with_table(mutated(data, rng))
        # The footer of metadata, which says where everything else lies; its length is stored before the last 4 bytes.
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        footer = mutated(data[start:-8], rng)
        return self._with_table(data[:start] + footer + len(footer).to_bytes(4, "little") + data[-4:])

    def _checkpoint(self, rng: Rng) -> dict[Path, bytes]:
        (changed,) = self._bytes(
            rng, [path for path in self.checkpoint.iterdir() if path.name != "sha256.json"]
        ).items()
        hashes = json.loads((self.checkpoint / "sha256.json").read_text())
        hashes[changed[0].name] = hashlib.sha256(changed[1]).hexdigest()
        return {changed[0]: changed[1], self.checkpoint / "sha256.json": json.dumps(hashes).encode()}
