"""Processes of this machine, found through Linux's /proc. On other systems none is found."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
_KILL_TIMEOUT_S = 30.0
"""Seconds to wait for the end of a killed process, which a driver or the storage may delay."""


def descendants(*pids: int) -> dict[int, str]:
    """Return the command lines of all descendants of these processes by pid, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])  # the name before it may hold any bytes
            children.setdefault(parent, []).append(int(path.parent.name))
    queue, commands = [child for pid in pids for child in children.get(pid, [])], dict[int, str]()
    for pid in queue:
        queue += children.get(pid, [])
        with contextlib.suppress(OSError):
            commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return commands


def adopt_orphans(adopt: bool) -> None:
    """Set whether a descendant whose parent ends becomes a child of this process, so that `descendants` still finds it."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def open_pidfds(pids: Iterable[int]) -> list[int]:
    """Return a file descriptor for each of these processes that is there.

    Unlike a pid, the descriptor never refers to another process. Empty if the kernel (before Linux 5.3) or this build of
    Python does not support such descriptors.
    """
    pidfds = []
    for pid in pids:
        with contextlib.suppress(AttributeError, OSError):
            pidfds.append(os.pidfd_open(pid))
    return pidfds


def supports_pidfds() -> bool:
    """Return True if `open_pidfds` works on this system."""
    pidfds = open_pidfds([os.getpid()])
    for pidfd in pidfds:
        os.close(pidfd)
    return bool(pidfds)


def has_ended(pidfd: int, timeout_s: float = 0) -> bool:
    """Return True if the process of a descriptor from `open_pidfds` has ended or ends within `timeout_s` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def kill(pidfds: Collection[int]) -> None:
    """Kill the processes of these descriptors, wait until they have ended, and close the descriptors."""
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for pidfd in pidfds:
        if has_ended(pidfd, _KILL_TIMEOUT_S):
            with contextlib.suppress(ChildProcessError):  # not a child of this process
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
