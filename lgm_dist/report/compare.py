"""Trials and runs beside each other: the leaderboard of a sweep, and accuracy by the value of each setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lgm_dist.report.records import Record, SweepRecord
from lgm_dist.report.tables import DASH, Table, by, duration, mean_ci, percent, trained_on, val_of

NORMALISATION = ("model.norm", "model.norm_scope", "model.weight_norm", "noise", "model.norm_decay")
"""The settings that are compared first."""


def leaderboard(sweep: SweepRecord) -> Table:
    """All trials, the best first, each with its paired difference to the first."""
    paths = _paths(record.sample for record in sweep.trials)
    ranked = sweep.ranked
    first = ranked[0].accuracies() if ranked else None
    rows = [
        (
            *(record.label, record.trial.status if record.trial else "unreadable", val_of(record)),
            _difference(record.accuracies(), first) if record is not ranked[0] else DASH,
            *(setting(record.sample.get(path)) for path in paths),
            *(f"{record.best['step']:,.0f}" if record.best else DASH, trained_on(record), duration(record.seconds)),
            _remark(record),
        )
        for record in ranked
    ]
    note = (
        "Best evaluation of each trial, mean over the val episodes with its 95 % interval. All trials are evaluated on the "
        "same episodes, so the difference to the first (in percentage points, with its 95 % interval) is paired by episode. "
        "The first was chosen on these very episodes, which flatters it a little."
    )
    header = ("trial", "status", ">val accuracy", ">minus the first's", *(f">{path}" for path in paths))
    return Table(f"Trials of {sweep.name}", (*header, ">best at step", ">trained on", ">time", "remark"), rows, note)


def _difference(ours: npt.NDArray[np.float64] | None, first: npt.NDArray[np.float64] | None) -> str:
    if ours is None or first is None or ours.shape != first.shape:
        return DASH
    mean, ci95 = mean_ci(ours - first)
    return f"{100 * mean:+.2f}".replace("-", "\N{MINUS SIGN}") + (f" ± {100 * ci95:.2f}" if ci95 is not None else "")


def _remark(record: Record) -> str:
    if not record.trial:
        return "; ".join(record.notes)
    taken = [f"took over trial {e.get('from')} at step {e.get('step')}" for e in record.trial.exploits]
    error = [record.trial.error.strip().splitlines()[-1][:200]] if record.trial.error.strip() else []
    return "; ".join([*error, *taken, *record.notes])


def _paths(samples: Iterable[dict[str, Any]]) -> list[str]:
    """The dotted paths of a sweep's samples, normalisation first."""
    found = {path for sample in samples for path in sample}
    return [path for path in NORMALISATION if path in found] + sorted(found - set(NORMALISATION))


def setting(value: Any) -> str:
    """A hyper-parameter's value; a dash where a condition rules it out."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Setting(NamedTuple):
    """A hyper-parameter and the trials (or runs) that have a value of it."""

    path: str
    values: list[tuple[Any, Record]]

    @property
    def is_scale(self) -> bool:
        """Numbers, too many different ones to take means by value."""
        numbers = [v for v, _ in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        return len(numbers) == len(self.values) and len(set(numbers)) > 5


def sampled(sweep: SweepRecord) -> list[Setting]:
    """The sweep's hyper-parameters over its evaluated trials."""
    trials = [(r.sample, r) for r in sweep.trials if r.best]
    return [Setting(p, [(s[p], r) for s, r in trials if p in s]) for p in _paths(s for s, _ in trials)]


def normalisations(records: Sequence[Record]) -> list[Setting]:
    """The normalisation settings in which evaluated runs differ."""
    known = [(r.config.flat(), r) for r in records if r.config and r.best]
    found = [Setting(path, [(config[path], r) for config, r in known]) for path in NORMALISATION]
    return [s for s in found if len({setting(value) for value, _ in s.values}) > 1]


def comparison(title: str, settings: Sequence[Setting], what: str) -> Table | None:
    """Mean best val accuracy by value of each setting; `what` is trials or runs."""
    rows: list[tuple[str, ...]] = []
    for path, values in (s for s in settings if not s.is_scale):
        groups = by(values, lambda pair: setting(pair[0]))
        for value, group in sorted(groups.items(), key=lambda item: -_mean_best(item[1])):
            best = [r.best["val/accuracy"] for _, r in group if r.best]
            name = "" if any(path == row[0] for row in rows) else path
            rows.append((name, value, str(len(best)), percent(*mean_ci(best)), percent(max(best), None)))
    note = (
        f"Mean over the {what} with this value, whatever their other settings; 95 % interval over {what}, 1.96 · std/√n, "
        f"which is too narrow where they are few. {what.capitalize()} that were stopped early count with their best so far."
    )
    header = ("setting", "value", f">{what}", ">mean val accuracy", ">best")
    return Table(title, header, rows, note) if rows else None


def _mean_best(pairs: Sequence[tuple[Any, Record]]) -> float:
    return statistics.mean(r.best["val/accuracy"] for _, r in pairs if r.best)
