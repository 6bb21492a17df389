"""What a contestant's process measures of itself, and of its worker processes."""

import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from benchmarks.peers.spec import Loading

COMPARED = 16  # samples
_SAMPLES_APART = 0.05  # seconds between two looks at memory


def compared(loading: Loading, path: Path) -> dict[str, Any]:
    """Write the samples of the first keys of an epoch to `path`; count the epoch's cadences and distinct keys."""
    first: dict[str, npt.NDArray[Any]] = {}
    count, seen = 0, set()
    for names, batch in loading.epochs:
        keys = loading.to_keys(names)
        count += len(batch)
        seen.update(keys)
        for key, part in zip(keys, batch, strict=True):
            # Copied at once: a batch is valid until the next one.
            first[key] = part.cpu().numpy().copy()
            if len(first) > COMPARED:
                del first[max(first)]
    np.savez(path, allow_pickle=False, **first)
    return {"cadences": count, "distinct": len(seen)}


def timed_round(loading: Loading, seconds: float, device: str) -> dict[str, Any]:
    """Whole epochs until `seconds` have passed: cadences, seconds, CPU seconds, and median time to a first batch."""
    loading.settle()
    cadences, first_batches = 0, []
    cpu, began = cpu_seconds(), time.perf_counter()
    while time.perf_counter() - began < seconds or not cadences:
        start, is_first = time.perf_counter(), True
        for _, batch in loading.epochs:
            if is_first:
                _finish(device)
                first_batches.append(time.perf_counter() - start)
                is_first = False
            cadences += len(batch)
        if is_first:
            raise RuntimeError("an epoch without a batch")
        _finish(device)
    wall = time.perf_counter() - began
    return {
        "cadences": cadences,
        "seconds": wall,
        "cpu_s": cpu_seconds() - cpu,
        "first_batch_s": float(np.median(first_batches)),
    }


def _finish(device: str) -> None:
    """Wait for copies to a GPU, which are asynchronous."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def warmed(loading: Loading, threads_to_try: tuple[int, ...]) -> dict[str, Any]:
    """Run an epoch and return its peak memory. Timed rounds are not sampled, as that slows them down.

    Before that, torch gets the number of threads, of those in `threads_to_try`, with which an epoch is fastest. It need
    not be the largest.
    """
    if len(threads_to_try) > 1:
        torch.set_num_threads(min(threads_to_try, key=lambda threads: _epoch_seconds(loading, threads)))
    most, stop = [memory_mb()], threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLES_APART):
            most.append(memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in loading.epochs:
            pass
    finally:
        stop.set()
        watcher.join()
    return {"peak_mb": max(most)}


def _epoch_seconds(loading: Loading, threads: int) -> float:
    torch.set_num_threads(threads)
    began = time.perf_counter()
    for _ in loading.epochs:
        pass
    return time.perf_counter() - began


def cpu_seconds() -> float:
    """CPU time of this process, of its live descendants, and of those that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_mb() -> float:
    """Memory of this process and its descendants in MB (10^6 bytes): PSS, which divides shared pages among processes.

    Mapped files are left out: their pages belong to the page cache, but would count against processes that map them.
    """
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(_own_bytes(process.pid) for process in processes) / 1e6


def _own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has ended
    sizes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return 1024 * (int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"]))
