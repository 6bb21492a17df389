"""Environment variables at the start: the one for the CPU is read in one place, and none is followed silently."""

import re

import pytest
from accelerate import Accelerator

from shard_tools.errors import InputError
from tests.conftest import source_files
from training.accelerator import build_accelerator
from training.environment import cpu_is_asked_for


@pytest.mark.parametrize(
    ("value", "asked"),
    [("true", True), ("True", True), ("1", True), ("yes", True), ("ON", True), ("false", False), ("0", False)],
)
def test_every_word_for_yes_asks_for_the_cpu(monkeypatch: pytest.MonkeyPatch, value: str, asked: bool) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert cpu_is_asked_for() is asked
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert not cpu_is_asked_for()


def test_a_word_that_is_neither_yes_nor_no_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    with pytest.raises(InputError, match="ACCELERATE_USE_CPU=perhaps: expected true or false"):
        build_accelerator("float32")


def test_one_place_reads_whether_the_cpu_was_asked_for() -> None:
    paths = source_files()
    reading = [path.name for path in paths if re.search("ACCELERATE_USE_CPU(?!=true)", path.read_text())]
    assert reading == ["environment.py"]  # other files only advise to set it


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "give --accumulate instead"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "give --compile instead"),
        ("ACCELERATE_USE_FSDP", "true", "--multi_gpu"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "--multi_gpu"),
        ("ACCELERATE_USE_MEGATRON_LM", "yes", "--multi_gpu"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "--multi_gpu"),
    ],
)
def test_what_would_change_a_training_in_silence_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value}: expected .*{remedy}"):
        build_accelerator("float32")


def test_what_accelerate_launch_sets_by_default_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator: Accelerator = build_accelerator("float32")
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (1, "no")  # as the options say
