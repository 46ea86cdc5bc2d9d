"""The folder of a sweep, and the only code that reads it back. No Ray.

SWEEP/sweep.json            what was asked for
SWEEP/trials/trial-007/     the folder of an ordinary run, and trial.json: the trial's sample and status
SWEEP/tune/                 the state of Ray Tune
SWEEP/best.json             the winner's configuration, for `lgm-dist train --config`
SWEEP/winner.json           the winner's accuracy on val and test
SWEEP/results.csv, report.html, *.png
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lgm_dist.config import Config
from lgm_dist.runs.checkpoint import states_of, val_accuracies
from lgm_dist.runs.checkpoint_files import TrainState
from lgm_dist.runs.files import read_json, write_json
from lgm_dist.runs.folder import CONFIG
from lgm_dist.runs.metrics import METRICS, read_metrics
from lgm_dist.training.evaluation import Score

SWEEP, TRIAL, WINNER, BEST = "sweep.json", "trial.json", "winner.json", "best.json"


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep. Its rows and checkpoints are read on first use."""

    number: int
    run: Path
    """Folder of its run."""
    sample: dict[str, Any]
    """Value of each sampled setting, by flag name. A setting whose condition does not hold is absent."""
    status: str
    """running, finished (trained to the last step), stopped (by the scheduler), failed, or unreadable (damaged)."""
    error: str
    exploits: list[dict[str, Any]]
    """Exploits of population-based training: {"step", "from": number of the other trial, "sample": the new sample}."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.run)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows with an evaluation on val."""
        return [row for row in self.rows if "val/accuracy" in row]

    @cached_property
    def checkpoint(self) -> Path | None:
        """The checkpoint with the best val accuracy (of equal ones, the earliest); None before the first evaluation."""
        return max(self._states, key=lambda folder: self._states[folder].rank, default=None)

    @property
    def best(self) -> TrainState | None:
        """The step and the val accuracy of `checkpoint`."""
        return self._states[self.checkpoint] if self.checkpoint else None

    @cached_property
    def _states(self) -> dict[Path, TrainState]:
        """The evaluated checkpoints, oldest first."""
        return {folder: state for folder, state in states_of(self.run).items() if state.val_accuracy >= 0}

    def accuracies(self) -> npt.NDArray[np.float64] | None:
        """Accuracy of `checkpoint` on each val episode (n,); None if it was not kept. All trials have the same episodes."""
        return val_accuracies(self.checkpoint) if self.checkpoint else None

    def difference(self, other: Trial) -> Score | None:
        """Val accuracy minus that of `other`, paired by episode; None if one of them lacks its accuracies."""
        ours, theirs = self.accuracies(), other.accuracies()
        return None if ours is None or theirs is None or ours.shape != theirs.shape else Score.of(ours - theirs)

    def sample_at(self, step: float = math.inf) -> dict[str, Any]:
        """The sample with which step `step` was trained: after an exploit, the one that came with it."""
        samples: list[dict[str, Any]] = [exploit["sample"] for exploit in self.exploits if exploit["step"] < step]
        return samples[-1] if samples else self.sample


@dataclass(frozen=True)
class Sweep:
    """A sweep and its trials, in the order of their numbers."""

    folder: Path
    spec: dict[str, Any]
    """sweep.json: name, space, params, search, scheduler, samples, base (Config.to_dict()), command, commit."""
    trials: list[Trial]
    winner: dict[str, Any]
    """winner.json; empty before the end of the sweep."""

    @property
    def name(self) -> str:
        """The sweep's name."""
        return str(self.spec.get("name") or self.folder.name)

    @cached_property
    def base(self) -> Config:
        """The configuration that all trials start from."""
        return Config.from_dict(self.spec["base"])

    @cached_property
    def ranked(self) -> list[Trial]:
        """The evaluated trials, best first."""
        evaluated = [(trial.best.val_accuracy, trial) for trial in self.trials if trial.best]
        return [trial for _, trial in sorted(evaluated, key=lambda pair: -pair[0])]


def read_sweep(folder: Path, damage: list[str] | None = None) -> Sweep:
    """The sweep in `folder`.

    Raises ValueError if there is none, or if one of its files is damaged. With `damage`, each damaged file adds a sentence to
    that list instead, and reads as empty.
    """
    if not (folder / SWEEP).exists():
        raise ValueError(f"{folder} is not a sweep ({SWEEP} is missing); name the folder of a sweep")
    trials = [_read_trial(run, damage) for run in sorted(folder.glob("trials/*")) if holds_run(run)]
    trials.sort(key=lambda trial: trial.number)
    return Sweep(folder, _read(folder / SWEEP, damage), trials, _read(folder / WINNER, damage))


def holds_run(folder: Path) -> bool:
    """Return True if `folder` is that of a run or trial, whole or damaged."""
    return any((folder / name).exists() for name in (TRIAL, CONFIG, METRICS))


def _read(path: Path, damage: list[str] | None) -> dict[str, Any]:
    """The object in `path`; empty if the file does not exist, or is damaged and `damage` collects that."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        if damage is None:
            raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from None
        damage.append(f"{path.name} is damaged and left out")
        return {}


def _read_trial(run: Path, damage: list[str] | None) -> Trial:
    try:
        return read_trial(run)
    except ValueError as error:
        if damage is None:
            raise
        damage.append(str(error))
        number = run.name.rpartition("-")[2]
        return Trial(int(number) if number.isdigit() else -1, run, {}, "unreadable", "", [])


def run_of_trial(sweep: Path, number: int) -> Path:
    """Folder of a trial's run."""
    return sweep / "trials" / f"trial-{number:03d}"


def read_trial(run: Path) -> Trial:
    """The trial whose run is in `run`. Raises ValueError if its trial.json is missing or damaged."""
    try:
        trial = Trial(run=run, **read_json(run / TRIAL))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run / TRIAL} is damaged ({error}); restore it from a copy, or delete {run.name}") from None
    if not _is_sound(trial):
        raise ValueError(f"{run / TRIAL} is damaged (a value of the wrong type); restore it, or delete {run.name}")
    return trial


def _is_sound(trial: Trial) -> bool:
    """Return True if the values have the types that they should have."""
    return (
        isinstance(trial.number, int)
        and isinstance(trial.sample, dict)
        and isinstance(trial.status, str)
        and isinstance(trial.error, str)
        and isinstance(trial.exploits, list)
        and all(isinstance(e, dict) and isinstance(e.get("sample"), dict) for e in trial.exploits)
        and all(isinstance(e.get("step"), int) and isinstance(e.get("from"), int) for e in trial.exploits)
    )


def write_trial(trial: Trial) -> None:
    """Write the trial's trial.json."""
    names = ("number", "sample", "status", "error", "exploits")
    write_json(trial.run / TRIAL, {name: getattr(trial, name) for name in names})
