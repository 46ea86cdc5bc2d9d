"""A sweep's folder as the sweep driver leaves it, read back. numpy and JSON, no Ray.

SWEEP/sweep.json             what was asked for
SWEEP/trials/trial-007/      an ordinary run's folder, and trial.json: its sample of the space and its status
SWEEP/tune/                  Ray Tune's own state
SWEEP/results.csv, best.json, winner.json, *.png       written at the end
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lgm_dist.config import Config
from lgm_dist.runs.checkpoint import states_of, val_accuracies
from lgm_dist.runs.checkpoint_files import folder_name
from lgm_dist.runs.metrics import read_metrics

SWEEP, TRIAL = "sweep.json", "trial.json"


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep, as its folder was when it was first looked at."""

    number: int
    run: Path
    """Its run's folder."""
    sample: dict[str, Any]
    """Dotted config path -> value; a path that a condition rules out is not there."""
    status: str
    """running, finished (trained to its end), stopped (by the scheduler) or failed."""
    error: str
    exploits: list[dict[str, Any]]
    """Population-based training: {"step", "from" (number of the other trial), "sample" (from then on)}."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Its metrics.jsonl."""
        return read_metrics(self.run)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows with an evaluation on the sweep's val episodes."""
        return [row for row in self.rows if "val/accuracy" in row]

    @cached_property
    def checkpoint(self) -> Path | None:
        """Its best checkpoint; None before the first evaluation."""
        states = {folder: state for folder, state in states_of(self.run).items() if state.val_accuracy >= 0}
        return max(states, key=lambda folder: states[folder].val_accuracy, default=None)

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The row of the evaluation of `checkpoint` (of equals, the earliest)."""
        name = self.checkpoint.name if self.checkpoint else ""
        return next((row for row in self.evaluations if folder_name(row["step"]) == name), None)

    def accuracies(self) -> npt.NDArray[np.float64] | None:
        """Accuracy of each val episode (n,) of `checkpoint`: the same episodes for all trials, so differences pair."""
        return val_accuracies(self.checkpoint) if self.checkpoint else None


@dataclass(frozen=True)
class Sweep:
    """A sweep and its trials, by number, as they were when they were read."""

    folder: Path
    spec: dict[str, Any]
    """sweep.json: name, space, params, search, scheduler, samples, base (Config.to_dict()), command, commit."""
    trials: list[Trial]

    @cached_property
    def base(self) -> Config:
        """The configuration that all trials start from."""
        return Config.from_dict(self.spec["base"])

    @cached_property
    def ranked(self) -> list[Trial]:
        """The trials that were evaluated, the best first."""
        evaluated = [trial for trial in self.trials if trial.best]
        return sorted(evaluated, key=lambda trial: -float((trial.best or {})["val/accuracy"]))


def read_sweep(folder: Path) -> Sweep:
    """The sweep in `folder`. Raises ValueError where there is none."""
    try:
        spec = json.loads((folder / SWEEP).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no sweep ({SWEEP} is missing); name the folder of one") from None
    return Sweep(folder, spec, [read_trial(path.parent) for path in sorted(folder.glob(f"trials/*/{TRIAL}"))])


def read_trial(run: Path) -> Trial:
    """The trial whose run lies in `run`."""
    values = json.loads((run / TRIAL).read_text())
    return Trial(run=run, **values)


def write_trial(trial: Trial) -> None:
    """Writes the trial's trial.json, complete or not at all."""
    names = ("number", "sample", "status", "error", "exploits")
    beside = trial.run / f".{TRIAL}.new"
    beside.write_text(json.dumps({name: getattr(trial, name) for name in names}, indent=1) + "\n")
    beside.replace(trial.run / TRIAL)
