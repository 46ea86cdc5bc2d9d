"""What the folders of runs and sweeps tell, as far as they can be read: damage becomes a note, never an exception."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lgm_dist.config import Config
from lgm_dist.runs.folder import CONFIG, FACTS, RESULT, read_config
from lgm_dist.runs.metrics import METRICS, read_metrics
from lgm_dist.runs.sweep_folder import SWEEP, TRIAL, Trial, read_trial

T = TypeVar("T")
D = TypeVar("D")
WINNER = "winner.json"
GRIDS = "evaluation-*.json"
"""What scripts/evaluate.py leaves in a run's folder."""


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it."""

    folder: Path
    config: Config | None
    """None where config.json is missing or damaged."""
    rows: list[dict[str, float]]
    """metrics.jsonl, finite numbers only."""
    facts: dict[str, Any]
    result: dict[str, Any]
    """result.json; empty before the end of the run."""
    grids: list[dict[str, Any]]
    """The results of scripts/evaluate.py."""
    damage: list[str]
    """A sentence for each file that could not be read."""
    trial: Trial | None = None
    """Where the run is a trial of a sweep."""

    @property
    def name(self) -> str:
        """The run's name; of a trial, its folder's."""
        return self.config.run_name if self.config and not self.trial else self.folder.name

    @property
    def label(self) -> str:
        """The name as it stands beside an accuracy: protocol paper says at every figure that it leaks."""
        return (
            f"{self.name} (paper: leaks the label)"
            if self.config and self.config.episodes.protocol == "paper"
            else self.name
        )

    @cached_property
    def evaluations(self) -> list[dict[str, float]]:
        """The rows with an evaluation on val."""
        return [row for row in self.rows if "val/accuracy" in row]

    @cached_property
    def best(self) -> dict[str, float] | None:
        """The row of the best evaluation on val (of equals, the earliest); of a trial, that of its best checkpoint.

        The two differ where a population's trial has taken over another's checkpoint.
        """
        trial = self.trial
        kept = attempt(lambda: trial.best, default=None, damage=[]) if trial else None
        rows = [row for row in self.evaluations if kept and row["step"] == kept["step"]] or self.evaluations
        return max(rows, key=lambda row: row["val/accuracy"], default=None)

    @property
    def sample(self) -> dict[str, Any]:
        """The settings that a trial's best evaluation was trained with: after a take-over, those that came with it."""
        if not self.trial:
            return {}
        step = self.best["step"] if self.best else 0
        samples: list[dict[str, Any]] = [e["sample"] for e in self.trial.exploits if e["step"] < step]
        return samples[-1] if samples else self.trial.sample

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return max((row.get("seconds", 0.0) for row in self.rows), default=0.0)

    @property
    def cell(self) -> tuple[Any, ...] | None:
        """What val accuracies have to agree in to be compared: the very episodes. None without a configuration."""
        if not (c := self.config):
            return None
        data = str(self.facts.get("manifest_digest") or c.data.name)
        return (
            data,
            c.episodes.protocol,
            *c.episode("val")[:2],
            c.episodes.eval_query,
            c.episodes.eval_seed,
            c.episodes.eval_episodes,
        )

    @property
    def notes(self) -> list[str]:
        """What is not as in a finished run, in words."""
        steps = f" of {self.config.episodes.steps:,}" if self.config else ""
        unfinished = not self.result and not self.trial
        missing = [f"not finished (step {self.step:,}{steps})"] if unfinished else []
        if not self.evaluations:
            missing.append("not evaluated yet")
        return missing + self.damage

    def accuracies(self) -> npt.NDArray[np.float64] | None:
        """Accuracy of each val episode (n,) at the trial's best checkpoint; None where it is not to be had."""
        return attempt(self.trial.accuracies, default=None, damage=[]) if self.trial else None


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as its folder tells it."""

    folder: Path
    spec: dict[str, Any]
    trials: list[Record]
    winner: dict[str, Any]
    """winner.json; empty before the end of the sweep."""
    damage: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The sweep's name."""
        return str(self.spec.get("name") or self.folder.name)

    @cached_property
    def ranked(self) -> list[Record]:
        """The evaluated trials, the best first, then the others."""
        return sorted(self.trials, key=lambda trial: -(trial.best or {}).get("val/accuracy", -1.0))

    @property
    def test(self) -> dict[str, Any]:
        """winner.json, as long as it is about the trial that is first."""
        trial = self.ranked[0].trial if self.ranked else None
        return self.winner if trial and self.winner.get("trial") == trial.number else {}

    @property
    def over(self) -> bool:
        """No trial is running."""
        return all(record.trial and record.trial.status != "running" for record in self.trials)


def gather(paths: Sequence[Path]) -> tuple[list[Record], list[SweepRecord]]:
    """The runs and sweeps that `paths` name: folders of runs, of sweeps, or of several of them.

    Raises ValueError for a path that holds none.
    """
    runs, sweeps = [], []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        found = [folder for folder in ([path] if _holds(path) else inside) if _holds(folder)]
        if not found:
            raise ValueError(f"{path} holds no run and no sweep; name a folder that training or a sweep has made")
        sweeps += [read_sweep(folder) for folder in found if (folder / SWEEP).exists()]
        runs += [read_record(folder) for folder in found if not (folder / SWEEP).exists()]
    return runs, sweeps


def _holds(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SWEEP, TRIAL, CONFIG, METRICS))


def read_record(folder: Path, trial: Trial | None = None) -> Record:
    """The run in `folder`."""
    damage: list[str] = []
    config = attempt(read_config, folder, default=None, damage=damage)
    rows = attempt(_read_rows, folder, default=[], damage=damage)
    facts, result = (read_dict(folder / name, damage) for name in (FACTS, RESULT))
    grids = [read_dict(path, damage) for path in sorted(folder.glob(GRIDS))]
    return Record(folder, config, rows, facts, result, grids, damage, trial)


def read_sweep(folder: Path) -> SweepRecord:
    """The sweep in `folder`; unlike lgm_dist.runs.sweep_folder.read_sweep, with the trials that can be read."""
    damage: list[str] = []
    spec = read_dict(folder / SWEEP, damage)
    folders = sorted(path for path in folder.glob("trials/*") if _holds(path))
    trials = [read_record(run, attempt(_read_trial, run, default=None, damage=damage)) for run in folders]
    return SweepRecord(folder, spec, trials, read_dict(folder / WINNER, damage), damage)


def _read_trial(run: Path) -> Trial:
    trial = read_trial(run)
    exploits = [(e["step"] + 0, e["from"]) for e in trial.exploits if isinstance(e["sample"], dict)]
    if not isinstance(trial.sample, dict) or len(exploits) < len(trial.exploits) or not isinstance(trial.error, str):
        raise ValueError(f"{run / TRIAL} is damaged and left out")
    return trial


def _read_rows(folder: Path) -> list[dict[str, float]]:
    return [_numbers(row) for row in read_metrics(folder)]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def attempt(read: Callable[..., T], *arguments: Any, default: D, damage: list[str]) -> T | D:
    """What `read` returns; `default`, and a sentence in `damage`, where it fails as it does on a damaged file."""
    try:
        return read(*arguments)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        damage.append(str(error) or type(error).__name__)
        return default


def read_dict(path: Path, damage: list[str]) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is no file, or where it is damaged."""
    if not path.exists():
        return {}
    values = attempt(_read_json, path, default=None, damage=[])
    if not isinstance(values, dict):
        damage.append(f"{path.name} is damaged and left out")
        return {}
    return values


def number(values: dict[str, Any], key: str) -> float | None:
    """values[key] where it is a finite number."""
    value = values.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number and value is not None else None


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """A diverged run logs NaN, which no chart and no maximum can take."""
    return {key: value for key in row if (value := number(row, key)) is not None}
