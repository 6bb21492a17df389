"""Start the program's scripts under `accelerate launch`, as users do."""

import dataclasses
import sys
from collections.abc import Sequence

from training.config import TrainConfig


def command_line(script: str, *arguments: object, processes: int = 1) -> Sequence[str]:
    """The words that start a script on `processes` ranks of this machine's CPU.

    Needs ACCELERATE_USE_CPU=true in the environment: with --cpu Accelerate would start only one process, whatever
    `processes` says. One rank is started without Accelerate, as the script itself.
    """
    if processes == 1:
        return [sys.executable, *map(str, (script, *arguments))]
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "--num_machines", 1]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1]
    return [sys.executable, *map(str, (*command, "--main_process_port", 0, script, *arguments))]


def machine_command(rank: int, main: str, config: TrainConfig, *further: object) -> Sequence[str]:
    """The words that start a training on machine `rank` of two, one process on each; `main` is rank 0's HOST:PORT."""
    ip, port = main.split(":")
    command: list[object] = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 2]
    command += ["--num_processes", 2, "--machine_rank", rank, "--main_process_ip", ip, "--main_process_port", port]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1, "train.py"]
    return [sys.executable, *map(str, (*command, *flags(config), *further))]


def flags(config: TrainConfig) -> list[object]:
    """The command line that makes a tiny configuration (of tests.tiny)."""
    words: list[object] = ["--shards", *config.shards, "--run-dir", config.run_dir, "--preset", "demo"]
    words += ["--epochs", config.epochs, "--batch-size", config.batch_size, "--eval-batch-size", config.eval_batch_size]
    words += ["--accumulate", config.accumulate, "--learning-rate", config.learning_rate]
    words += ["--tracker", "none", "--no-report", "--precision", "float32", "--warmup-epochs", config.warmup_epochs]
    for part in (config.model, config.canvas, config.draws):
        for field in dataclasses.fields(part):
            name, value = field.name.replace("_", "-"), getattr(part, field.name)
            words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", value]
    return words
