"""Memory of this process: its peak, and an allocator that keeps what is freed. Standard library only."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process that trains in a thread, as Ray's workers do. Without it `keep_freed_memory` has no effect there:
glibc gives other threads memory from arenas of 64 MiB, which it returns to the kernel in any case."""


def keep_freed_memory() -> bool:
    """Make this process reuse freed memory of any size instead of returning it to the kernel. Returns False without glibc.

    glibc returns blocks of more than some MiB to the kernel when they are freed, and the kernel clears each page before it
    hands it out again. A training step allocates and frees the same hundreds of MiB every time; with large meta-batches that
    takes more than a third of the step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))


def peak_memory() -> int:
    """Most bytes that this process has had in memory so far.

    Linux's /proc counts this process alone. The fallback, getrusage, includes what the parent had when it started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
