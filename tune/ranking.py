"""What a sweep's trials tell about its parameters: samples, differences, accuracy by value, importances. Numbers alone."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from spaces import Choice, LogUniform, Param, Sample, Space, read_space

from lgm_dist.runs.sweep_folder import Sweep, Trial
from lgm_dist.training.evaluation import Score

FORESTS = 5
"""Random forests, each of another seed, whose importances are averaged."""


def sample_of(trial: Trial) -> Sample:
    """The values that its best evaluation was trained with: after exploits, those that were taken over last before it."""
    step = trial.best["step"] if trial.best else 0
    samples: list[Sample] = [exploit["sample"] for exploit in trial.exploits if exploit["step"] < step]
    return samples[-1] if samples else trial.sample


def difference(trial: Trial, winner: Trial) -> Score | None:
    """Accuracy of `trial` minus that of `winner`, mean and 95 % interval over the val episodes, which both have seen.

    None where one of them has not kept the accuracies of its episodes.
    """
    ours, theirs = trial.accuracies(), winner.accuracies()
    return None if ours is None or theirs is None else Score.of(ours - theirs)


def space_of(sweep: Sweep) -> Space:
    """The space, widened by values beyond it: population-based training perturbs without looking at its ends."""
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
    """The evaluated trials that share a value of a parameter, or a third of its range."""

    name: str
    accuracies: npt.NDArray[np.float64]
    """Best val accuracy of each, in %."""

    @property
    def score(self) -> Score | None:
        """Mean and 95 % interval over trials, in %; None for fewer than two."""
        return Score.of(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def text(self) -> str:
        """Mean ± interval, as far as there are trials for them."""
        if self.score:
            return f"{self.score.accuracy:.2f} ± {self.score.ci95:.2f} %"
        return "".join(f"{accuracy:.2f} %" for accuracy in self.accuracies)


def levels(sweep: Sweep) -> dict[str, list[Level]]:
    """For each parameter its values, or the thirds of its range, with their trials."""
    found = {}
    for path, param in space_of(sweep).items():
        names = [short(value) for value in param.values] if isinstance(param, Choice) else _thirds(param)
        groups: list[list[float]] = [[] for _ in names]
        for trial in sweep.ranked:
            if path in sample_of(trial):
                part = int(place(param, sample_of(trial)[path]) * len(names))
                groups[min(part, len(names) - 1)].append(best_percent(trial))
        found[path] = [Level(name, np.array(group)) for name, group in zip(names, groups, strict=True)]
    return found


def _thirds(param: Param) -> list[str]:
    ends = [short(value) for value in ticks(param, 3)]
    return [f"{low} to {high}" for low, high in pairwise(ends)]


def best_percent(trial: Trial) -> float:
    """Best val accuracy in %."""
    return 100 * float((trial.best or {})["val/accuracy"])


def place(param: Param, value: Any) -> float:
    """Where a value lies on its parameter's axis, 0 to 1: the middle of a choice's part, logarithmic where the space is."""
    if isinstance(param, Choice):
        return (param.values.index(value) + 0.5) / len(param.values)
    if isinstance(param, LogUniform):
        return math.log(value / param.low) / math.log(param.high / param.low)
    return float((value - param.low) / (param.high - param.low))


def ticks(param: Param, parts: int) -> list[Any]:
    """Values to name on the axis: all of a choice, else the ends of equal parts."""
    if isinstance(param, Choice):
        return list(param.values)
    spread = np.geomspace if isinstance(param, LogUniform) else np.linspace
    return [float(value) for value in spread(param.low, param.high, parts + 1)]


class Importance(NamedTuple):
    """How much a parameter matters."""

    path: str
    trials: int
    """That have it."""
    share: float
    """Of the variance of their best val accuracy, 0 to 1, what it explains alone; mean over forests."""
    spread: float
    """Standard deviation over forests."""


def importances(sweep: Sweep) -> list[Importance]:
    """Of each parameter that two trials have, the largest first; a conditional one's among the trials that have it."""
    space = space_of(sweep)

    @cache
    def shares(trials: tuple[int, ...]) -> list[dict[str, float]]:
        having = [trial for trial in sweep.ranked if trial.number in trials]
        return [_fanova(space, having, seed) for seed in range(FORESTS)]

    found = []
    for path in space:
        trials = tuple(trial.number for trial in sweep.ranked if path in sample_of(trial))
        if len(trials) > 1:
            values = np.array([share[path] for share in shares(trials)])
            found.append(Importance(path, len(trials), float(values.mean()), float(values.std(ddof=1))))
    return sorted(found, key=lambda importance: -importance.share)


def _fanova(space: Space, trials: list[Trial], seed: int) -> dict[str, float]:
    """Share of the variance that each parameter which all the trials have explains alone."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shared = [path for path in space if all(path in sample_of(trial) for trial in trials)]
    ranges: dict[str, BaseDistribution] = {}
    for path in shared:  # numbers by their place on the axis, since fANOVA weighs parts of the range by their length
        param = space[path]
        ranges[path] = CategoricalDistribution(param.values) if isinstance(param, Choice) else FloatDistribution(0, 1)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        sample = {p: v if isinstance(space[p], Choice) else place(space[p], v) for p, v in sample_of(trial).items()}
        params = {path: sample[path] for path in shared}
        study.add_trial(optuna.create_trial(params=params, distributions=ranges, value=best_percent(trial)))
    try:
        return optuna.importance.FanovaImportanceEvaluator(seed=seed).evaluate(study)
    except RuntimeError:  # all trials equally good, or all samples alike: there is nothing to explain
        return dict.fromkeys(shared, 0.0)


def short(value: Any) -> str:
    """A value as tables and pictures name it: numbers to three digits, nothing for None."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def leak(sweep: Sweep) -> str:
    """What is to be said next to every accuracy of the sweep."""
    return " (LEAKS the label)" if sweep.base.episodes.protocol == "paper" else ""
