"""Trials and runs compared: the leaderboard of a sweep, and accuracy by the value of each setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lgm_dist.console import percent
from lgm_dist.report.records import Record, SweepRecord, attempt
from lgm_dist.report.tables import DASH, Table, by, duration, mean_percent, trained_on, val_of
from lgm_dist.training.evaluation import Score

NORMALISATION = ("model.norm", "model.norm_scope", "model.weight_norm", "noise", "model.norm_decay")
"""The settings that come first."""


def leaderboard(sweep: SweepRecord) -> Table:
    """All trials, best first, each with its paired difference to the first."""
    paths = _paths(record.sample for record in sweep.trials)
    rows = [
        (
            *(record.label, status_of(record), val_of(record)),
            _difference(record, sweep.ranked[0]),
            *(setting(record.sample.get(path)) for path in paths),
            *(f"{record.best['step']:,.0f}" if record.best else DASH, trained_on(record), duration(record.seconds)),
            _remark(record),
        )
        for record in sweep.ranked
    ]
    note = (
        "Best evaluation of each trial: mean over the val episodes with its 95 % interval. All trials are evaluated on the "
        "same episodes, so the difference to the first trial (percentage points, with its 95 % interval) is paired by episode. "
        "The first trial was chosen on these episodes, so its accuracy and its lead are slightly too high."
    )
    header = ("trial", "status", ">val accuracy", ">minus the first", *(f">{path}" for path in paths))
    return Table(f"Trials of {sweep.name}", (*header, ">best at step", ">trained on", ">time", "remark"), rows, note)


def status_of(record: Record) -> str:
    """The status of a trial."""
    return record.trial.status if record.trial else DASH


def _difference(record: Record, first: Record) -> str:
    ours, theirs = record.trial, first.trial
    if record is first or not ours or not theirs:
        return DASH
    difference: Score | None = attempt(ours.difference, theirs, default=None, damage=[])
    if not difference:
        return DASH
    return f"{100 * difference.accuracy:+.2f} ± {100 * difference.ci95:.2f}".replace("-", "\N{MINUS SIGN}")


def _remark(record: Record) -> str:
    """The error of a failed trial, its exploits, and the notes on its run."""
    error = record.trial.error.strip().splitlines()[-1:] if record.trial else []
    exploits = record.trial.exploits if record.trial else []
    taken = [f"exploited trial {exploit['from']} at step {exploit['step']}" for exploit in exploits]
    return "; ".join([*(line[:200] for line in error), *taken, *record.notes])


def _paths(samples: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the sampled settings, normalisation first."""
    names = {path for sample in samples for path in sample}
    return [path for path in NORMALISATION if path in names] + sorted(names - set(NORMALISATION))


def setting(value: Any) -> str:
    """A setting's value as text; a dash if its condition does not hold."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Setting(NamedTuple):
    """A setting, and the trials or runs that have a value for it."""

    path: str
    values: list[tuple[Any, Record]]

    @property
    def is_scale(self) -> bool:
        """True if the values are numbers, and too many different ones for a mean per value."""
        numbers = [v for v, _ in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        return len(numbers) == len(self.values) and len(set(numbers)) > 5


def sampled(sweep: SweepRecord) -> list[Setting]:
    """The sampled settings of a sweep, over its evaluated trials."""
    trials = [(r.sample, r) for r in sweep.trials if r.best]
    return [Setting(p, [(s[p], r) for s, r in trials if p in s]) for p in _paths(s for s, _ in trials)]


def normalisations(records: Sequence[Record]) -> list[Setting]:
    """The normalisation settings in which evaluated runs differ."""
    known = [(r.config.flat(), r) for r in records if r.config and r.best]
    settings = [Setting(path, [(config[path], r) for config, r in known]) for path in NORMALISATION]
    return [s for s in settings if len({setting(value) for value, _ in s.values}) > 1]


def comparison(title: str, settings: Sequence[Setting], what: str) -> Table | None:
    """Mean of the best val accuracy by value of each setting. `what` is "trials" or "runs"."""
    rows: list[tuple[str, ...]] = []
    for path, values in (s for s in settings if not s.is_scale):
        groups = by(values, lambda pair: setting(pair[0]))
        for value, group in sorted(groups.items(), key=lambda item: -_mean_best(item[1])):
            best = [r.best["val/accuracy"] for _, r in group if r.best]
            name = "" if any(path == row[0] for row in rows) else path
            rows.append((name, value, str(len(best)), mean_percent(best), percent(max(best))))
    note = (
        f"Mean over the {what} with this value; their other settings vary. The 95 % interval is over {what}, 1.96 · std/√n. "
        f"For a few {what}, it is too narrow. {what.capitalize()} that were stopped early count with their best evaluation."
    )
    header = ("setting", "value", f">{what}", ">mean val accuracy", ">best")
    return Table(title, header, rows, note) if rows else None


def _mean_best(pairs: Sequence[tuple[Any, Record]]) -> float:
    return statistics.mean(r.best["val/accuracy"] for _, r in pairs if r.best)
