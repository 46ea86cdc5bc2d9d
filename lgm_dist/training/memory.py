"""Memory of this process: its peak, and the C library's allocator told to keep what is freed. Standard library only."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""For the environment of a process whose training is not in its main thread, as Ray's: without it `keep_freed_memory` does not
reach there, since glibc gives other threads memory in pieces of 64 MiB, which it returns whatever it was told."""


def keep_freed_memory() -> bool:
    """Makes this process reuse freed memory of any size instead of returning it; True where the C library can do so.

    glibc gives blocks of more than some MiB back to the kernel when they are freed, and the kernel clears each page when it
    is next asked for. A training step allocates and frees the same hundreds of MiB every time; with large meta-batches that
    cost more than a third of it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))


def peak_memory() -> int:
    """Most bytes that this process has had in memory so far, without what its parent had before starting it.

    getrusage's figure, which is taken where there is no /proc, begins with the parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
