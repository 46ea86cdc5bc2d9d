"""Processes of this machine, from Linux's /proc; elsewhere none is found."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_PATIENCE = 30.0
"""Seconds for a killed process to end: a driver or a storage may hold it."""


def below(*pids: int) -> dict[int, str]:
    """The command lines of the processes that descend from these, nearest first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])  # before it a name, of any bytes
            children.setdefault(parent, []).append(int(path.parent.name))
    found, left = dict[int, str](), [child for pid in pids for child in children.get(pid, [])]
    for one in left:
        left += children.get(one, [])
        with contextlib.suppress(OSError):
            found[one] = Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def adopt_orphans(adopt: bool) -> None:
    """Whether a process below this one whose parent ends stays below it, as its child."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def handles(pids: Iterable[int]) -> list[int]:
    """Descriptors that stand for these processes, and for no other when they have ended and their numbers are used again.

    None where the kernel (before Linux 5.3) or this Python knows no such descriptors.
    """
    found = []
    for pid in pids:
        with contextlib.suppress(AttributeError, OSError):
            found.append(os.pidfd_open(pid))
    return found


def have_handles() -> bool:
    """Whether `handles` knows a process that there is."""
    own = handles([os.getpid()])
    for process in own:
        os.close(process)
    return bool(own)


def has_ended(process: int, seconds: float = 0) -> bool:
    """Whether the process that a descriptor of `handles` stands for has, or does within that time."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def kill(processes: Collection[int]) -> None:
    """Ends what is left of processes that `handles` stands for, waits for it, and closes the descriptors."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    for process in processes:
        if has_ended(process, _PATIENCE):
            with contextlib.suppress(ChildProcessError):  # another's
                os.waitid(os.P_PIDFD, process, os.WEXITED)
        os.close(process)
