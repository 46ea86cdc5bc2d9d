"""Stopping a run after its step, with a checkpoint: a file in its folder, which signals make."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STOP = "stop"
"""A file of this name in a run's folder asks its workers to end after their step, with a checkpoint."""


@contextmanager
def stop_on_signals(run: Path) -> Iterator[Callable[[], None]]:
    """SIGTERM (`ray job stop`) and the first Ctrl-C end the run after its step with a checkpoint; a second Ctrl-C at once.

    Yields a function that installs the handlers again, in case somebody else, such as Ray, has replaced them.
    """

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and (run / STOP).exists():
            raise KeyboardInterrupt
        try:
            (run / STOP).touch()
        except OSError:  # a storage that is away
            threading.Thread(target=_until_written, args=(run / STOP,), daemon=True).start()

    def listen() -> None:
        for number in before:
            signal.signal(number, ask)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread may install handlers
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _until_written(path: Path) -> None:
    while True:
        with contextlib.suppress(OSError):
            path.touch()
            return
        time.sleep(0.2)
