"""Waiting for what another thread or process does. Events decide, not seconds: the limit is for what never happens."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

LIMIT = 900.0
"""Seconds after which something counts as hung, on a busy machine too."""


def wait_for(condition: Callable[[], object], what: str, process: subprocess.Popen[Any] | None = None) -> None:
    """Wait until the condition holds. Fails if `process` ends before, and after LIMIT; `what` says what has not happened."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert process is None or process.poll() is None, f"the process ended before: {what}"
        assert time.monotonic() < end, f"not in {LIMIT:g} s: {what}"
        time.sleep(0.01)
