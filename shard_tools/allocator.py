"""A setting of malloc: large blocks are kept and used again. Import this before the first large tensor is made.

glibc gives blocks above some size, 32 MiB at most, back to the system when they are freed. A network's intermediate
values are such blocks, made and freed in every step, and the system has to fill each page with zeros again: training
`demo` on the CPU took half as long again (docs/performance.md).
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h
_KEPT = 1 << 30  # bytes

if sys.platform == "linux":
    _mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if _mallopt is not None and _mallopt(_MMAP_THRESHOLD, _KEPT):
        _mallopt(_TRIM_THRESHOLD, _KEPT)
