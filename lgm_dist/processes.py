"""Processes of this machine, from Linux's /proc; elsewhere none is found."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path


def below(pid: int) -> dict[int, str]:
    """The command lines of the processes that descend from `pid`, nearest first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, pids = dict[int, str](), list(children.get(pid, []))
    for one in pids:
        pids += children.get(one, [])
        with contextlib.suppress(OSError):
            found[one] = Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def handles(pids: Iterable[int]) -> list[int]:
    """Descriptors that stand for these processes, and for no other when they have ended and their numbers are used again."""
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found


def kill(processes: Iterable[int]) -> None:
    """Ends what is left of processes that `handles` stands for, and closes the descriptors."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
