"""What the trials of a sweep say about its settings: samples, accuracy by value, importance. Numbers only."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lgm_dist.runs.sweep_folder import Sweep, Trial
from lgm_dist.sweeps.spaces import Choice, LogUniform, Param, Sample, Space, read_space
from lgm_dist.training.evaluation import Score

FORESTS = 5
"""Random forests with different seeds, whose importances are averaged."""


def sample_of(trial: Trial) -> Sample:
    """The sample with which the trial's best checkpoint was trained; its first sample if it has none."""
    return trial.sample_at(trial.best.step if trial.best else 0)


def space_of(sweep: Sweep) -> Space:
    """The space, widened to the values that occurred: population-based training perturbs beyond its ends."""
    space: Space = {}
    for path, param in read_space(sweep.spec["params"]).items():
        values = [sample_of(trial)[path] for trial in sweep.ranked if path in sample_of(trial)]
        if isinstance(param, Choice):
            space[path] = dataclasses.replace(param, values=tuple(dict.fromkeys((*param.values, *values))))
        else:
            ends = (param.low, param.high, *values)
            space[path] = dataclasses.replace(param, low=min(ends), high=max(ends))
    return space


class Level(NamedTuple):
    """The evaluated trials with one value of a setting, or with values in one third of its range."""

    name: str
    accuracies: npt.NDArray[np.float64]
    """Best val accuracy of each trial, in %."""

    @property
    def score(self) -> Score | None:
        """Mean and 95 % interval over trials, in %; None for fewer than two."""
        return Score.of(self.accuracies) if len(self.accuracies) > 1 else None


def levels(sweep: Sweep) -> dict[str, list[Level]]:
    """For each setting, its values or the thirds of its range, with their trials."""
    by_setting = {}
    for path, param in space_of(sweep).items():
        names = [short(value) for value in param.values] if isinstance(param, Choice) else _thirds(param)
        groups: list[list[float]] = [[] for _ in names]
        for trial in sweep.ranked:
            if path in sample_of(trial):
                part = int(place(param, sample_of(trial)[path]) * len(names))
                groups[min(part, len(names) - 1)].append(best_percent(trial))
        by_setting[path] = [Level(name, np.array(group)) for name, group in zip(names, groups, strict=True)]
    return by_setting


def _thirds(param: Param) -> list[str]:
    ends = [short(value) for value in ticks(param, 3)]
    return [f"{low} to {high}" for low, high in pairwise(ends)]


def best_percent(trial: Trial) -> float:
    """Best val accuracy of an evaluated trial, in %."""
    assert trial.best
    return 100 * trial.best.val_accuracy


def place(param: Param, value: Any) -> float:
    """Position of a value on the axis of its setting, 0 to 1: the middle of a choice's part; logarithmic for LogUniform."""
    if isinstance(param, Choice):
        return (param.values.index(value) + 0.5) / len(param.values)
    if isinstance(param, LogUniform):
        return math.log(value / param.low) / math.log(param.high / param.low)
    return float((value - param.low) / (param.high - param.low))


def ticks(param: Param, parts: int) -> list[Any]:
    """Values to name on the axis: all values of a choice, otherwise the ends of `parts` equal parts."""
    if isinstance(param, Choice):
        return list(param.values)
    spread = np.geomspace if isinstance(param, LogUniform) else np.linspace
    return [float(value) for value in spread(param.low, param.high, parts + 1)]


class Importance(NamedTuple):
    """How much of the accuracy a setting explains."""

    path: str
    trials: int
    """Number of trials that have it."""
    share: float
    """Share of the variance of their best val accuracy that it explains alone, 0 to 1; mean over forests."""
    spread: float
    """Standard deviation of that share over forests."""


def importances(sweep: Sweep) -> list[Importance]:
    """Importance of each setting that at least two trials have, largest first. Only trials that have the setting count."""
    space = space_of(sweep)

    @cache
    def shares(trials: tuple[int, ...]) -> list[dict[str, float]]:
        having = [trial for trial in sweep.ranked if trial.number in trials]
        return [_fanova(space, having, seed) for seed in range(FORESTS)]

    by_setting = []
    for path in space:
        trials = tuple(trial.number for trial in sweep.ranked if path in sample_of(trial))
        if len(trials) > 1:
            values = np.array([share[path] for share in shares(trials)])
            by_setting.append(Importance(path, len(trials), float(values.mean()), float(values.std(ddof=1))))
    return sorted(by_setting, key=lambda importance: -importance.share)


def _fanova(space: Space, trials: list[Trial], seed: int) -> dict[str, float]:
    """Share of the variance that each setting explains alone, for the settings that all the trials have."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shared = [path for path in space if all(path in sample_of(trial) for trial in trials)]
    ranges: dict[str, BaseDistribution] = {}
    for path in shared:  # numbers by their place on the axis, because fANOVA weighs parts of a range by their length
        param = space[path]
        ranges[path] = CategoricalDistribution(param.values) if isinstance(param, Choice) else FloatDistribution(0, 1)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        sample = {p: v if isinstance(space[p], Choice) else place(space[p], v) for p, v in sample_of(trial).items()}
        params = {path: sample[path] for path in shared}
        study.add_trial(optuna.create_trial(params=params, distributions=ranges, value=best_percent(trial)))
    try:
        return optuna.importance.FanovaImportanceEvaluator(seed=seed).evaluate(study)
    except RuntimeError:  # all accuracies or all samples are equal, so there is nothing to explain
        return dict.fromkeys(shared, 0.0)


def short(value: Any) -> str:
    """A value for tables and pictures: floats with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def leak(sweep: Sweep) -> str:
    """The warning that every accuracy of protocol paper must carry."""
    return " (LEAKS the label)" if sweep.base.episodes.protocol == "paper" else ""
