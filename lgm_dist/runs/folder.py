"""A run's folder: who owns it, what is in it, and writing to it while its storage fails."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lgm_dist.config import Config
from lgm_dist.console import notify
from lgm_dist.runs.files import read_json

P = ParamSpec("P")
T = TypeVar("T")

CONFIG, FACTS, RESULT, OWNER = "config.json", "facts.json", "result.json", "owner"


def read_config(run: Path) -> Config:
    """The configuration of a run. Raises ValueError if the folder holds none."""
    try:
        return Config.from_dict(read_json(run / CONFIG))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{run} does not hold a run ({CONFIG}: {error}); name a folder that lgm-dist train has made"
        ) from None


def read_result(run: Path) -> dict[str, Any]:
    """The result.json of a finished run. Raises ValueError if there is none."""
    try:
        return read_json(run / RESULT)
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} has no result ({error}); train the run to its end with lgm-dist train") from None


def make_folder(folder: Path) -> Path:
    """Make a folder in the storage. Raises ValueError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"storage ({folder.parent}) cannot be written ({error.strerror}); name another folder"
        ) from None
    return folder


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Keep the run's folder for this process, however it ends. Raises ValueError if another process has it."""
    with (run / OWNER).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run {run.name!r} in storage {run.parent} is being trained by {file.read() or 'another process'}; wait for "
                "it, stop it, or give another --name"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def retry_writes(run: Path, seconds: float, write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `write`, which writes into the run's folder; retry it each second while the storage fails.

    Raises the OSError that has lasted for `seconds`.
    """
    failed_since = 0.0
    while True:
        try:
            if not (run / CONFIG).exists():
                raise FileNotFoundError(
                    errno.ENOENT, "the run's folder has gone; nothing is made in its place", str(run)
                )
            return write(*args, **kwargs)
        except OSError as error:
            now = time.monotonic()
            if not failed_since:
                failed_since = now
                notify(f"storage: {error}; trying again for {seconds:g} s")
            if now - failed_since >= seconds:
                raise
            time.sleep(min(1.0, seconds))
