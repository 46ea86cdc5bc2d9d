"""A lock between the processes of one machine."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which is created with its folder if necessary. Other processes wait here, and call `waiting`,
    if they have it, every second.

    The kernel frees the lock when its holder dies, so a killed process blocks nobody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while waiting:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
