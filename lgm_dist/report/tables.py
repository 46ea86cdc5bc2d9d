"""The report's tables as plain text, for HTML, for W&B's Markdown and for the console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lgm_dist.config import Config
from lgm_dist.console import leak_note, percent
from lgm_dist.report.records import EpisodeSet, Record, SweepRecord, attempt, number
from lgm_dist.training.evaluation import Score
from lgm_dist.training.tasks import in_words
from lgm_dist.training.tasks import trained_on as counts_of

DASH = "—"


class Table(NamedTuple):
    """A table of text."""

    title: str
    header: tuple[str, ...]
    """Names of the columns. A ">" before a name aligns the column right, for numbers."""
    rows: list[tuple[str, ...]]
    note: str = ""


def episodes(ways: int, shot: int) -> str:
    """The size of an episode, such as "5-way 1-shot"."""
    return f"{ways}-way {shot}-shot"


def duration(seconds: float) -> str:
    """A duration such as "42 s", "12.3 min" or "5 h 07 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes // 60:.0f} h {minutes % 60:02.0f} min"


def mean_percent(accuracies: Sequence[float]) -> str:
    """Mean of accuracies in 0 to 1 with its 95 % interval, without the interval for a single one."""
    if len(accuracies) == 1:
        return percent(accuracies[0])
    score = Score.of(np.array(accuracies, dtype=np.float64))
    return percent(score.accuracy, score.ci95)


def val_of(record: Record) -> str:
    """The best val accuracy with its 95 % interval."""
    return percent(record.best["val/accuracy"], record.best.get("val/ci95")) if record.best else DASH


def test_of(record: Record, result: dict[str, Any]) -> str:
    """The test accuracy in a result.json or winner.json. If there is none, why."""
    accuracy = number(result, "test/accuracy")
    if accuracy is not None:
        n = number(result, "test/episodes")
        return percent(accuracy, number(result, "test/ci95")) + (f" (n = {n:,.0f})" if n else "")
    return (
        "not evaluated" if record.trial or (record.config and not record.config.episodes.test_episodes) else "not yet"
    )


def protocol_of(config: Config | None) -> str:
    """The protocol; paper with its warning."""
    if not config or config.episodes.protocol == "standard":
        return config.episodes.protocol if config else DASH
    return "paper: LEAKS THE LABEL"


def trained_on(record: Record) -> str:
    """Images and episodes of the training so far."""
    return in_words(counts_of(record.config, record.step)) if record.config else DASH


def commit_of(record: Record) -> str:
    """The short commit of a run."""
    commit, _, dirty = str(record.facts.get("commit") or DASH).partition("-")
    return commit[:10] + (f"-{dirty}" if dirty else "")


def headline(runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> Table:
    """A row per run, and per sweep the row of its best trial."""
    rows = [_headline_row(record.name, record, record.result) for record in runs]
    first = [(sweep, record) for sweep in sweeps for record in sweep.ranked[:1]]
    for sweep, record in first:
        rank = "winner" if sweep.over else "best so far"
        rows.append(_headline_row(f"{sweep.name}: {record.name} ({rank})", record, sweep.test))
    every = [*runs, *(record for _, record in first)]
    header = (
        "run",
        "protocol",
        ">test accuracy",
        ">val accuracy",
        "evaluated at",
        "trained at",
        ">trained on",
        ">time",
    )
    note = "Mean over episodes with its 95 % interval, of the checkpoint with the best val accuracy."
    leak = "\n" + leak_note("paper").replace("\n", " ") if any(record.leaks for record in every) else ""
    return Table("Runs", (*header, "commit"), rows, note + leak)


def _headline_row(name: str, record: Record, result: dict[str, Any]) -> tuple[str, ...]:
    c = record.config
    sizes = tuple(episodes(*c.episode(split)[:2]) for split in ("val", "train")) if c else (DASH, DASH)
    figures = (test_of(record, result), val_of(record), *sizes, trained_on(record), duration(record.seconds))
    return (name, protocol_of(c), *figures, commit_of(record))


def ways_shots(records: Sequence[Record]) -> list[Table]:
    """Accuracy by ways and shots, for runs that cover several.

    There are tables of networks that are evaluated on the ways and shots of their training, of networks that are all evaluated
    on the same ones, and of the results of `lgm-dist evaluate`. Protocols and data sets are never mixed.
    """
    tables = []
    known = [(record, e) for record in records if record.best and (e := record.episode_set)]
    for group in by(known, lambda pair: (pair[1].data, pair[1].protocol)).values():
        own = [r for r, e in group if r.config and (e.ways, e.shot) == r.config.episode("train")[:2]]
        tables.append(_grid("Ways and shots, each network evaluated as it was trained", own))
        for (ways, shot), target in by(group, lambda pair: (pair[1].ways, pair[1].shot)).items():
            title = f"Ways and shots of training, all evaluated on {episodes(ways, shot)}"
            tables.append(_grid(title, [record for record, _ in target]))
    return [t for t in tables if t] + [table for record in records for table in _evaluated(record)]


def _grid(title: str, records: Sequence[Record]) -> Table | None:
    """A table of runs by the ways and shots of their training; None if all have the same."""
    cells: dict[tuple[int, int], list[str]] = {}
    for record in records:
        test = number(record.result, "test/accuracy")
        accuracy = (
            f"{percent(test, number(record.result, 'test/ci95'))} test" if test is not None else f"{val_of(record)} val"
        )
        assert record.config
        cells.setdefault(record.config.episode("train")[:2], []).append(f"{accuracy}, {record.label}")
    return _matrix(title, cells) if len(cells) > 1 else None


def _matrix(title: str, cells: dict[tuple[int, int], list[str]]) -> Table:
    """A table of cells by (ways, shot)."""
    shots = sorted({shot for _, shot in cells})
    rows = [
        (f"{ways}-way", *("\n".join(cells.get((ways, shot), [DASH])) for shot in shots))
        for ways in sorted({ways for ways, _ in cells})
    ]
    return Table(title, ("", *(f">{shot}-shot" for shot in shots)), rows)


def _evaluated(record: Record) -> list[Table]:
    """The tables of `lgm-dist evaluate`: one network on episodes of other ways and shots than it was trained on."""
    results = record.evaluated
    return [t for result in results for t in attempt(_grids_of, record, result, default=[], damage=record.damage)]


def _grids_of(record: Record, evaluated: dict[str, Any]) -> list[Table]:
    grids: dict[str, dict[tuple[int, int], list[str]]] = {}
    for result in evaluated["results"]:
        leak = " (leaks the label)" if result["protocol"] == "paper" else ""
        for noise, score in result["scores"].items():
            what = f"{record.name} on {result['split']}, protocol {result['protocol']}{leak}, {noise}"
            accuracy = number(score, "accuracy")
            text = DASH if accuracy is None else percent(accuracy, number(score, "ci95"))
            grids.setdefault(what, {})[result["ways"], result["shot"]] = [text]
    return [_matrix(f"Ways and shots, {what}", cells) for what, cells in grids.items()]


def fact(record: Record, key: str) -> str:
    """A value of facts.json, as text."""
    return str(record.facts.get(key, DASH))


FACTS_SHOWN = ("commit", "manifest", "manifest_digest", "machine", "device", "world_size", "threads", "python", "torch")


def facts(records: Sequence[Record]) -> Table:
    """The machine, code and data of the runs. Runs with equal facts share a column."""
    groups = by([r for r in records if r.facts], lambda r: tuple(fact(r, key) for key in FACTS_SHOWN))
    rows = [(key.replace("_", " "), *(values[i] for values in groups)) for i, key in enumerate(FACTS_SHOWN)]
    return Table("Facts", ("", *map(_names, groups.values())), rows if groups else [], "From each run's last start.")


def _names(records: Sequence[Record]) -> str:
    return (
        ", ".join(r.name for r in records)
        if len(records) < 5
        else f"{records[0].name} … {records[-1].name} ({len(records)})"
    )


K = TypeVar("K")
V = TypeVar("V")


def by(values: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Values grouped by key, both in order of first appearance."""
    groups: dict[K, list[V]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def same_episodes(records: Sequence[Record]) -> list[list[Record]]:
    """The records in groups that were evaluated on the same episodes, ordered by protocol, ways and shots."""
    groups = by(records, lambda record: record.episode_set)
    return [groups[key] for key in sorted(groups, key=_order)]


def _order(key: EpisodeSet | None) -> tuple[Any, ...]:
    return (True,) if key is None else (False, key.protocol == "paper", key.ways, key.shot)
