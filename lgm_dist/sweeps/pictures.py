"""The pictures of a sweep: parallel coordinates, importance of the settings, accuracy against time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from lgm_dist.runs.sweep_folder import Sweep
from lgm_dist.sweeps.ranking import (
    FORESTS,
    Level,
    best_percent,
    importances,
    leak,
    levels,
    place,
    sample_of,
    short,
    space_of,
    ticks,
)
from lgm_dist.sweeps.spaces import Choice, Param

PARALLEL, IMPORTANCE, TIME = "parallel.png", "importance.png", "time.png"
ENOUGH = 10
"""With fewer trials, importances mean little."""


def draw(sweep: Sweep) -> list[Path]:
    """Draw the pictures for which enough trials were evaluated into the sweep's folder, and return their paths."""
    return [plot(sweep) for plot, needed in PLOTS if len(sweep.ranked) >= needed]


def _title(sweep: Sweep) -> str:
    target = sweep.spec["target"]
    return f"{sweep.spec['name']}: val accuracy at {target['ways']}-way {target['shot']}-shot{leak(sweep)}"


def parallel(sweep: Sweep) -> Path:
    """A line per trial, through its values to its best accuracy. Unfinished trials are thin and dashed, the winner is thick."""
    space, trials = space_of(sweep), sweep.ranked
    low, high = best_percent(trials[-1]), best_percent(trials[0])
    low, high = (low, high) if low < high else (low - 1, high + 1)
    figure, axes = plt.subplots(figsize=(max(1.6 * len(space) + 3.2, 7), 5.2), layout="constrained")
    for rank, trial in reversed(list(enumerate(trials))):
        fan = 0.5 - rank / (len(trials) - 1)  # separates trials that share a choice, by rank
        heights = [_height(param, sample_of(trial).get(path), fan) for path, param in space.items()]
        score = (best_percent(trial) - low) / (high - low)
        done = trial.status == "finished"
        width = 3.5 if rank == 0 else 1.8 if done else 0.9
        axes.plot(
            *_smooth([*heights, score]),
            color=plt.get_cmap("viridis_r")(0.12 + 0.88 * score),
            lw=width,
            ls="-" if done else "--",
        )
    for x, (path, param) in enumerate(space.items()):
        named = {short(value): place(param, value) for value in ticks(param, 4)}
        _axis(axes, x, path, named | ({"not used": NOT_USED} if param.when else {}))
    scores = {f"{score:.2f}": (score - low) / (high - low) for score in np.linspace(low, high, 5)}
    _axis(axes, len(space), "val accuracy (%)", scores, "left")
    axes.set(xlim=(-0.6, len(space) + 0.3), ylim=(NOT_USED - 0.06, 1.14))
    axes.set_axis_off()
    figure.suptitle(f"{_title(sweep)}\nthick: winner (trial {trials[0].number}); dashed: unfinished", fontsize=11)
    return _save(figure, sweep.folder / PARALLEL)


NOT_USED = -0.12
"""Height of a trial on the axis of a setting that it does not have."""


def _height(param: Param, value: Any, fan: float) -> float:
    if value is None:
        return NOT_USED + 0.06 * fan
    return place(param, value) + (0.5 * fan / len(param.values) if isinstance(param, Choice) else 0)


def _smooth(heights: list[float]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A curve that is level at each axis, so that the eye can follow it."""
    x = np.linspace(0, len(heights) - 1, 40 * (len(heights) - 1) + 1)
    left = np.minimum(x.astype(int), len(heights) - 2)
    t, y = x - left, np.array(heights)
    return x, y[left] + (y[left + 1] - y[left]) * (3 * t**2 - 2 * t**3)


def _axis(axes: Any, x: int, name: str, ticks: dict[str, float], align: str = "right") -> None:
    axes.plot([x, x], [0, 1], color="black", lw=1)
    axes.text(x, 1.08, name, ha="center", weight="bold", fontsize=9)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    for text, height in ticks.items():
        beside = x + (0.05 if align == "left" else -0.05)
        axes.text(beside, height, text, ha=align, va="center", fontsize=9, bbox=box, zorder=3)


def importance(sweep: Sweep) -> Path:
    """How much each setting explains (left), and mean accuracy by value (right)."""
    ranking, by_value, count = importances(sweep), levels(sweep), len(sweep.ranked)
    height = max(0.3 * sum(len(group) + 1 for group in by_value.values()), 3) + 1.2
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, height), layout="constrained")
    names = [f"{i.path} (n = {i.trials}{', those that use it' if i.trials < count else ''})" for i in ranking]
    colours = ["C0" if i.trials >= ENOUGH else "#c6d9ea" for i in ranking]
    shares, spreads = ([100 * value for value in values] for values in zip(*[i[2:] for i in ranking], strict=True))
    left.barh(names, shares, xerr=spreads, color=colours, capsize=3)
    left.invert_yaxis()
    left.set(xlabel=f"variance of val accuracy that it explains alone (%)\nfANOVA, mean ± s over {FORESTS} forests")
    left.set_xlim(0, 105)
    hint = f"\npale: fewer than {ENOUGH} trials, too few to rank settings"
    few = any(i.trials < ENOUGH for i in ranking)
    left.set_title(f"Importance, from {count} trials{hint if few else ''}", fontsize=10)
    _effects(right, by_value)
    figure.suptitle(_title(sweep), fontsize=11)
    return _save(figure, sweep.folder / IMPORTANCE)


def _effects(axes: Any, by_value: dict[str, list[Level]]) -> None:
    """A row per value: its trials as pale dots, and their mean with its interval."""
    names: list[str] = []
    for path, group in by_value.items():
        names.append(path)
        for level in group:
            axes.plot(
                level.accuracies, np.full(len(level.accuracies), len(names)), "o", color="C0", alpha=0.3, ms=5, mew=0
            )
            if level.score:
                score = level.score
                axes.errorbar(score.accuracy, len(names), xerr=score.ci95, fmt="D", color="C1", ms=5, capsize=4)
            names.append(f"{level.name} (n = {len(level.accuracies)})")
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels():
        label.set_weight("bold" if label.get_text() in by_value else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("best val accuracy (%)\ndots: trials; diamonds: mean ± 1.96 s/√n")
    axes.set_title("Accuracy by value,\nwhile the other settings vary", fontsize=10)


def time(sweep: Sweep) -> Path:
    """Val accuracy of every trial against its training time."""
    longest = max(row["seconds"] for trial in sweep.ranked for row in trial.evaluations)
    unit, seconds = ("min", 60) if longest > 300 else ("s", 1)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for trial in reversed(sweep.ranked):
        style = STYLES.get(trial.status, STYLES["stopped"])
        x = np.array([row["seconds"] / seconds for row in trial.evaluations])
        y, ci = (100 * np.array([row[key] for row in trial.evaluations]) for key in ("val/accuracy", "val/ci95"))
        winner = trial is sweep.ranked[0]
        if winner:
            axes.fill_between(x, y - ci, y + ci, color="C1", alpha=0.2, lw=0)
            style = {**style, "color": "C1", "lw": 2.5, "zorder": 3}
        name = f"winner: trial {trial.number}, 95 % interval" if winner else trial.status
        axes.plot(x, y, markevery=[-1], label=name, **style)
    axes.axhline(100 / sweep.spec["target"]["ways"], color="grey", ls=":", label="chance")
    axes.set(xlabel=f"training time ({unit})", ylabel="val accuracy (%)", title=_title(sweep), xlim=(0, None))
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=9)
    return _save(figure, sweep.folder / TIME)


STYLES: dict[str, dict[str, Any]] = {
    "finished": {"color": "C0", "lw": 1.2, "marker": "o", "alpha": 0.8},
    "stopped": {"color": "C7", "lw": 1, "marker": "X", "alpha": 0.8},
    "failed": {"color": "C3", "lw": 1, "marker": "X", "alpha": 0.8},
}
"""Style of a trial's curve by its status. Other unfinished trials look like stopped ones."""
PLOTS = ((parallel, 2), (importance, 2), (time, 1))
"""Each function that draws a picture, and the number of evaluated trials that it needs."""


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
