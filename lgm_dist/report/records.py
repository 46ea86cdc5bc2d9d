"""Runs and sweeps as their folders show them. A damaged file becomes a note in the report, never an exception."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lgm_dist.config import Config
from lgm_dist.runs.files import read_json
from lgm_dist.runs.folder import FACTS, RESULT, read_config
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.sweep_folder import SWEEP, Sweep, Trial, holds_run, read_sweep
from lgm_dist.training.loop import total_steps

T = TypeVar("T")
D = TypeVar("D")
EVALUATIONS = "evaluation-*.json"
"""What `lgm-dist evaluate` writes into a run's folder."""


class EpisodeSet(NamedTuple):
    """The val episodes of a run. Accuracies can be compared if they were measured on the same ones."""

    data: str
    """Digest of the manifest, or the name of the data set if the digest is not known."""
    protocol: str
    ways: int
    shot: int
    query: int
    seed: int
    episodes: int


@dataclass(frozen=True)
class Record:
    """A run as its folder shows it."""

    folder: Path
    config: Config | None
    """None if config.json is missing or damaged."""
    rows: list[dict[str, float]]
    """metrics.jsonl, finite numbers only."""
    facts: dict[str, Any]
    result: dict[str, Any]
    """result.json; empty before the end of the run."""
    evaluated: list[dict[str, Any]]
    """The results of `lgm-dist evaluate`."""
    damage: list[str]
    """A sentence for each file that could not be read."""
    trial: Trial | None = None
    """The trial, if the run is one of a sweep."""

    @property
    def name(self) -> str:
        """The run's name; for a trial, the name of its folder."""
        return self.config.run_name if self.config and not self.trial else self.folder.name

    @property
    def leaks(self) -> bool:
        """True for protocol paper, whose figures all carry a warning."""
        return self.config is not None and self.config.episodes.protocol == "paper"

    @property
    def label(self) -> str:
        """The name beside an accuracy, with the warning of protocol paper."""
        return f"{self.name} (paper: leaks the label)" if self.leaks else self.name

    @cached_property
    def evaluations(self) -> list[dict[str, float]]:
        """The rows with an evaluation on val."""
        return [row for row in self.rows if "val/accuracy" in row]

    @cached_property
    def best(self) -> dict[str, float] | None:
        """The row of the best evaluation on val (of equal ones, the earliest); for a trial, that of its best checkpoint.

        The two differ if population-based training has replaced the checkpoint by that of another trial.
        """
        trial = self.trial
        kept = attempt(lambda: trial.best, default=None, damage=[]) if trial else None
        rows = [row for row in self.evaluations if kept and row["step"] == kept.step] or self.evaluations
        return max(rows, key=lambda row: row["val/accuracy"], default=None)

    @property
    def sample(self) -> dict[str, Any]:
        """The sample with which a trial's best evaluation was trained."""
        return self.trial.sample_at(self.best["step"] if self.best else 0) if self.trial else {}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return max((row.get("seconds", 0.0) for row in self.rows), default=0.0)

    @property
    def episode_set(self) -> EpisodeSet | None:
        """The val episodes of the run; None without a configuration."""
        if not self.config:
            return None
        val, e = self.config.episode("val"), self.config.episodes
        data = str(self.facts.get("manifest_digest") or self.config.data.name)
        return EpisodeSet(data, e.protocol, val.ways, val.shot, e.eval_query, e.eval_seed, e.eval_episodes)

    @property
    def notes(self) -> list[str]:
        """What differs from a finished, undamaged run, in words."""
        total = attempt(total_steps, self.config, default=None, damage=[]) if self.config else None
        steps = f" of {total:,}" if total else ""
        unfinished = not self.result and not self.trial
        missing = [f"not finished (step {self.step:,}{steps})"] if unfinished else []
        if not self.evaluations:
            missing.append("not evaluated yet")
        return missing + self.damage


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as its folder shows it."""

    sweep: Sweep
    trials: list[Record]
    damage: list[str]

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.sweep.name

    @property
    def spec(self) -> dict[str, Any]:
        """The sweep's sweep.json; empty if it is damaged."""
        return self.sweep.spec

    @cached_property
    def ranked(self) -> list[Record]:
        """The evaluated trials, best first, then the others."""
        return sorted(self.trials, key=lambda trial: -(trial.best or {}).get("val/accuracy", -1.0))

    @property
    def test(self) -> dict[str, Any]:
        """winner.json, if it is about the first trial."""
        trial = self.ranked[0].trial if self.ranked else None
        return self.sweep.winner if trial and self.sweep.winner.get("trial") == trial.number else {}

    @property
    def over(self) -> bool:
        """True if no trial is running."""
        return all(trial.status != "running" for trial in self.sweep.trials)


def gather(paths: Sequence[Path]) -> tuple[list[Record], list[SweepRecord]]:
    """The runs and sweeps in `paths`: each is the folder of a run, of a sweep, or of several of them.

    Raises ValueError for a path that contains neither.
    """
    runs, sweeps = [], []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        folders = [folder for folder in ([path] if _is_record(path) else inside) if _is_record(folder)]
        if not folders:
            raise ValueError(f"{path} contains no run and no sweep; name a folder that training or a sweep has made")
        sweeps += [record_of_sweep(folder) for folder in folders if (folder / SWEEP).exists()]
        runs += [record_of_run(folder) for folder in folders if not (folder / SWEEP).exists()]
    return runs, sweeps


def _is_record(folder: Path) -> bool:
    return (folder / SWEEP).exists() or holds_run(folder)


def record_of_run(folder: Path, trial: Trial | None = None) -> Record:
    """The run in `folder`."""
    damage: list[str] = []
    config = attempt(read_config, folder, default=None, damage=damage)
    rows = attempt(_read_rows, folder, default=[], damage=damage)
    facts, result = (_read_json(folder / name, damage) for name in (FACTS, RESULT))
    evaluated = [_read_json(path, damage) for path in sorted(folder.glob(EVALUATIONS))]
    return Record(folder, config, rows, facts, result, evaluated, damage, trial)


def record_of_sweep(folder: Path) -> SweepRecord:
    """The sweep in `folder`, as far as it can be read."""
    damage: list[str] = []
    sweep = read_sweep(folder, damage)
    return SweepRecord(sweep, [record_of_run(trial.run, trial) for trial in sweep.trials], damage)


def _read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows, without the NaN and infinity of a diverged run, for which there is no place in a chart."""
    return [{key: value for key in row if (value := number(row, key)) is not None} for row in read_metrics(folder)]


def _read_json(path: Path, damage: list[str]) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file, or if it is damaged."""
    if not path.exists():
        return {}
    values = attempt(read_json, path, default=None, damage=[])
    if values is None:
        damage.append(f"{path.name} is damaged and left out")
    return values or {}


def attempt(read: Callable[..., T], *arguments: Any, default: D, damage: list[str]) -> T | D:
    """What `read` returns. If it fails as on a damaged file, `default`, and a sentence in `damage`."""
    try:
        return read(*arguments)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        damage.append(str(error) or type(error).__name__)
        return default


def number(values: dict[str, Any], key: str) -> float | None:
    """values[key] if it is a finite number, otherwise None."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None
