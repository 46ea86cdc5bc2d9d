"""metrics.jsonl, the record of a run: one JSON object a line, written by rank 0. Standard library only.

A row holds `step` (optimizer steps done), metrics such as `train/loss` under the keys that W&B shows too, and `seconds`
of training so far. Each row is on disk before the next step, so a killed worker loses none.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class MetricsLog:
    """Append rows to the run's metrics.jsonl, from `step` on: later rows are dropped, because they will come again."""

    def __init__(self, run: Path, step: int) -> None:
        _drop_rows_after(run / METRICS, step)
        self._file = (run / METRICS).open("ab", buffering=0)
        self._step, self._unwritten = step, b""
        self._seconds = float(max((row.get("seconds", 0.0) for row in read_metrics(run)), default=0.0))
        self._start = time.monotonic()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row: the metrics after `step` optimizer steps.

        Raises OSError if the storage has not taken all of it. A call with the same step then writes the rest.
        """
        if step > self._step:
            row = {"step": step, **metrics, "seconds": round(self._seconds + time.monotonic() - self._start, 3)}
            self._unwritten += json.dumps(row).encode() + b"\n"
            self._step = step
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the record of the run has been deleted", self._file.name)
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tail:
    """Follow a run's metrics.jsonl while it is written."""

    def __init__(self, run: Path) -> None:
        self._path = run / METRICS
        self._inode = self._seen = 0

    def rows(self) -> list[dict[str, Any]]:
        """The rows added since the last call, or all rows if a resumed run has replaced the file. Half-written lines wait."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._seen = inode, 0
                file.seek(self._seen)
                lines = file.read().split(b"\n")[:-1]
        except OSError:  # it does not exist yet, or its storage is away
            return []
        self._seen += sum(len(line) + 1 for line in lines)
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # the middle of a line, because a new file has got the inode of an earlier one
            self._seen = 0
            return []


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl, without a last line that a killed process left half-written.

    Raises ValueError, with the line's number, for a line that is not a JSON object.
    """
    try:
        lines = (run / METRICS).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [_row(run / METRICS, number, line) for number, line in enumerate(lines, 1)]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{path} is damaged at line {number}; correct or delete that line")
    return row


def _drop_rows_after(path: Path, step: int) -> None:
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    beside = path.with_suffix(".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)
