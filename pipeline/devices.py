"""Which GPU is meant, and moments in the work that it was given.

To torch a GPU without a number, and an event without a stream, are those of the current device. Where several GPUs are
at work that may be another one than the data's, so here both are named.
"""

import torch


def numbered(device: torch.device) -> torch.device:
    """The device with its number: "cuda" alone means the GPU that is current now."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def recorded(device: torch.device, timing: bool = False) -> torch.cuda.Event:
    """The moment at which this GPU has done all that torch's current stream there was given so far."""
    event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
