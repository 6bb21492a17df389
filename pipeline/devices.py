"""The number of a GPU, and events on it.

In torch a GPU without a number, or an event without a stream, means the current device. With several GPUs the current
one may not hold the data, so this module always names both.
"""

import torch


def with_index(device: torch.device) -> torch.device:
    """The device with its number; "cuda" without one means the GPU that is current now."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def record_event(device: torch.device, timing: bool = False) -> torch.cuda.Event:
    """An event that is reached when this GPU has finished all work so far on torch's current stream there."""
    event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
