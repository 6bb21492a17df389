"""What the environment says of a start: whether the CPU was asked for, and what Accelerate would follow in silence."""

import os

from shard_tools.errors import InputError

_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
# Accelerate reads these behind its arguments. Each would train otherwise than the configuration of the run says.
_OURS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "give --accumulate instead"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "give --compile instead"),
}
_UNKNOWN_WAYS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def cpu_is_asked_for() -> bool:
    """Whether ACCELERATE_USE_CPU says so, in any of Accelerate's words. Raises InputError where it says neither."""
    return _is_set("ACCELERATE_USE_CPU")


def check_environment() -> None:
    """Raise InputError where a variable, as `accelerate launch` sets them, would change a result in silence."""
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
