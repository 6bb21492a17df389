"""Environment variables that ask for the CPU, and those that Accelerate would silently follow."""

import os

from shard_tools.errors import InputError

_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
# Accelerate reads these besides its arguments. Each would silently override the configuration of the run.
_OURS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "give --accumulate instead"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "give --compile instead"),
}
_UNKNOWN_WAYS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def cpu_is_asked_for() -> bool:
    """Whether ACCELERATE_USE_CPU is true, in any of Accelerate's words. Raises InputError if neither true nor false."""
    return _is_set("ACCELERATE_USE_CPU")


def check_environment() -> None:
    """Raise InputError if a variable, such as `accelerate launch` sets, would silently change a result."""
    for name, (accepted, instead) in _OURS.items():
        value = os.environ.get(name, accepted[0])
        if value.lower() not in accepted:
            raise InputError(f"{name}={value}: expected {accepted[0]} or unset; {instead}")
    for way in _UNKNOWN_WAYS:
        if _is_set(f"ACCELERATE_USE_{way}"):
            raise InputError(
                f"ACCELERATE_USE_{way}={os.environ[f'ACCELERATE_USE_{way}']}: expected false or unset; for "
                "several GPUs use accelerate launch --multi_gpu"
            )


def _is_set(name: str) -> bool:
    value = os.environ.get(name, "false")
    if value.lower() not in (*_TRUE, *_FALSE):
        raise InputError(f"{name}={value}: expected true or false")
    return value.lower() in _TRUE
