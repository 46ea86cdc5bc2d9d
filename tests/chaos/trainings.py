"""Trainings as processes, the victims of each fault, and the table of outcomes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import ClassVar

from lgm_dist.cluster.processes import descendants
from lgm_dist.console import table
from lgm_dist.errors import RunFailed
from lgm_dist.runs.metrics import METRICS, read_metrics

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
"""Seconds without progress after which a run counts as lost."""
HEADER = ("fault", "times tried", "recovered", "seconds to recover", "rows lost or repeated", "bits changed")
SMALL = (
    *("--data=glyphs", "--ways=3", "--query=2", "--epochs=1", "--meta-batch=4", "--eval-query=3", "--eval-episodes=20"),
    *("--test-episodes=20", "--model.filters=8", "--model.noise-size=4", "--cpus-per-worker=1", "--wandb=offline"),
)

_NAMES = {
    "W&B": "wandb-core",
    "controller": "ray::TrainController",
    "stopped controller": "ray::TrainController",
    "gcs_server": "/gcs_server ",
    "raylet": "/raylet/raylet ",
}
"""Part of the command line of a fault's victims; of workers for the faults that are not here."""


@dataclass
class Outcome:
    """One row of the table."""

    fault: str
    tried: int = 0
    recovered: int = 0
    seconds: list[float] = field(default_factory=list)
    rows: int | None = None
    """Rows that are missing or repeated in metrics.jsonl and on W&B; None if this row does not count them."""
    bits: int | None = None
    """Bits of the weights and the optimizer that differ from the undisturbed run; None if this row does not count them."""
    note: str = ""


class Training:
    """A scripts/train.py in a process group of its own, which `start` resumes by the same command."""

    _started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(
        self,
        folder: Path,
        name: str,
        *flags: str,
        storage: Path | None = None,
        code: str = "",
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        storage = storage or folder
        places = (f"--data-root={folder}/data", f"--cache={folder}/cache", f"--storage={storage}", f"--name={name}")
        self.run = storage / name
        python = [*prefix, sys.executable, *(["-c", code] if code else [])]
        self._command = [*python, str(ROOT / "scripts/train.py"), *SMALL, *places, *flags]
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self._log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        """Run the command and append its output to the log."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        self._started.append(self.process)

    @classmethod
    def end_all(cls) -> None:
        """Kill the trainings that still run."""
        for process in cls._started:
            if process.poll() is None:
                process.kill()

    def step(self) -> int:
        """Return the last step in metrics.jsonl."""
        return newest_step(self.run)

    def said(self) -> str:
        """Return all output so far."""
        return self._log.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> float:
        """Wait for a condition and return the seconds. Raises RunFailed if the run ends first or it takes too long."""
        start = time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                raise RunFailed(f"{self.run.name} ended with status {self.process.returncode}:\n{self.said()[-2000:]}")
            if time.monotonic() - start > seconds:
                raise RunFailed(f"{self.run.name} did not go on for {seconds:g} s; its output: {self._log}")
            time.sleep(0.05)
        return time.monotonic() - start

    def wait(self, status: int = 0) -> None:
        """Wait for the end. Raises RunFailed if the exit status is not `status`."""
        if self.process.wait() != status:
            raise RunFailed(f"{self.run.name} ended with status {self.process.returncode}:\n{self.said()[-2000:]}")

    def victims(self, fault: str) -> list[int]:
        """Return the processes that a fault may hit now."""
        if fault in ("driver", "SIGTERM to all"):
            return [self.process.pid]
        part = _NAMES.get(fault, "ray::RayTrainWorker")
        # without the wandb-core that reads offline files for a moment
        pids = [pid for pid, name in descendants(self.process.pid).items() if part in name and " leet " not in name]
        return [pid for pid in pids if fault != "rank 0" or _holds(pid, self.run / METRICS)]


def newest_step(run: Path) -> int:
    """Return the last step in a run's metrics.jsonl, 0 if there is none."""
    return max((row["step"] for row in read_metrics(run)), default=0)


def _holds(pid: int, path: Path) -> bool:
    """Return True if a process has a file open."""
    try:
        return any(os.path.samefile(link, path) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists())
    except OSError:
        return False


def past_this_step(training: Training) -> Callable[[], bool]:
    """Return a condition: workers that start after this call have passed the step of those before.

    Each start of workers makes metrics.jsonl anew.
    """
    record, reached = training.run / METRICS, training.step()
    before = record.stat().st_ino

    def past() -> bool:
        nonlocal reached
        if record.stat().st_ino == before:
            reached = max(reached, training.step())
            return False
        return training.step() > reached

    return past


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    lines = []
    for outcome in outcomes:
        seconds = sorted(outcome.seconds)
        spread = f"{median(seconds):.0f} [{seconds[0]:.0f}, {seconds[-1]:.0f}]" if seconds else ""
        counts = ["" if n is None else f"{n:,}" for n in (outcome.rows, outcome.bits)]
        fault = f"{outcome.fault} ({outcome.note})" if outcome.note else outcome.fault
        lines.append([fault, str(outcome.tried), str(outcome.recovered), spread, *counts])
    return table(HEADER, lines)
