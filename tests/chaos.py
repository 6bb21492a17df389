"""Kill trainings and packs at random moments, again and again, and compare what comes out: `make chaos`.

Short forms of these campaigns are tests in test_resume.py and test_pack.py. Every moment is drawn from --seed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from shard_tools.verify import verify
from tests.conftest import folder_bytes
from tests.test_resume import read_history, same_weights, start, steps_done, wait_for_step
from tests.tiny import pack_tiny, tiny_config, write_tiny_data
from train import EXIT_PREEMPTED
from training.config import TrainConfig
from training.model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
STEPS_PER_KILL = 3  # at most; the run is made long enough for all kills
LONGEST_DELAY_S = 0.25  # longer than a step and its checkpoint


@dataclass(frozen=True)
class ChaosConfig:
    """Kill a training and a pack at random moments; exit with 1 if any result differs."""

    kills: int = 20
    """Times to kill each of them."""
    seed: int = 0
    """Seed of the moments and signals."""


def chaos_train(folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Faults of a run that is killed (kill -9) or preempted (SIGTERM) at random moments; none if it ends alike."""
    manifest = pack_tiny(folder, train=150)
    epochs = 1 + kills * (STEPS_PER_KILL + 2) // 15
    common = {"epochs": epochs, "model": ModelConfig("swin_nano", drop_path=0.1)}
    whole, killed = (tiny_config(manifest.root, folder / name, **common) for name in ("whole", "killed"))
    if (process := start(whole)).wait() != 0:
        return [f"the undisturbed run failed: {process.communicate()[0]}"]
    ends: Counter[str] = Counter()
    for _ in range(kills):
        process = start(killed)
        wait_for_step(killed, steps_done(killed) + rng.randint(1, STEPS_PER_KILL), process)
        time.sleep(rng.uniform(0, LONGEST_DELAY_S))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        expected = -number if number == signal.SIGKILL else EXIT_PREEMPTED
        if process.returncode not in (expected, 0):
            return [f"ended with {process.returncode} on {number.name}, expected {expected}: {said}"]
        ends[f"{number.name} -> exit {process.returncode}"] += 1
    process = start(killed)
    said, _ = process.communicate(timeout=600)
    print(f"training: {dict(ends)}, {15 * epochs} steps")
    return [f"the last start failed: {said}"] * (process.returncode != 0) or compare_runs(whole, killed)


def compare_runs(whole: TrainConfig, killed: TrainConfig) -> list[str]:
    """What differs between two finished runs, timings aside."""
    faults = []
    if read_history(whole.run_dir) != read_history(killed.run_dir):
        faults.append("losses or AUCs differ")
    if not same_weights(whole, killed):
        faults.append("weights differ")
    if left := list((killed.run_dir / "checkpoints").glob(".*")):
        faults.append(f"left behind: {left}")
    return faults


def chaos_pack(folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Faults of a pack that is killed at random moments."""
    data = write_tiny_data(folder / "big", 1500, 100, (6, 42, 64))
    words = [sys.executable, "-m", "shard_tools", "pack", "--input", str(data), "--shard-mb", "3", "--out"]
    began = time.monotonic()
    subprocess.run([*words, str(folder / "packed")], cwd=ROOT, check=True, capture_output=True)
    longest = time.monotonic() - began
    ends: Counter[str] = Counter()
    for _ in range(kills):
        process = subprocess.Popen([*words, str(folder / "again")], cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 1) * longest)
        process.kill()
        finished = process.wait() == 0
        ends["finished" if finished else "killed"] += 1
        if finished:
            shutil.rmtree(folder / "again")
    subprocess.run([*words, str(folder / "again")], cwd=ROOT, check=True, capture_output=True)
    print(f"packing: {dict(ends)}")
    same = folder_bytes(folder / "packed") == folder_bytes(folder / "again")
    return [*verify(folder / "again"), *(["bytes differ"] * (not same))]


def main() -> int:
    """Run the campaign; return the exit code."""
    config = tyro.cli(ChaosConfig, prog="python -m tests.chaos")
    os.environ["PYTHONUNBUFFERED"] = "1"
    rng = random.Random(config.seed)
    faults = []
    with tempfile.TemporaryDirectory() as name:
        for campaign in (chaos_pack, chaos_train):
            faults += campaign(Path(name), config.kills, rng)
    for fault in faults:
        print(f"fault: {fault}")
    print(f"{2 * config.kills} kills, seed {config.seed}: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
