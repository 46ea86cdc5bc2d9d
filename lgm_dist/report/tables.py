"""The report's tables as plain text, for the HTML page and for W&B's Markdown alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lgm_dist.config import Config
from lgm_dist.console import leak_note
from lgm_dist.report.records import Record, SweepRecord, attempt, number

DASH = "—"


class Table(NamedTuple):
    """A table of text."""

    title: str
    header: tuple[str, ...]
    """A name that begins with ">" is of a column of numbers, aligned right."""
    rows: list[tuple[str, ...]]
    note: str = ""


def percent(accuracy: float | None, ci95: float | None) -> str:
    """0.3338, 0.0041 -> 33.38 ± 0.41 %."""
    if accuracy is None:
        return DASH
    return f"{100 * accuracy:.2f}" + (f" ± {100 * ci95:.2f}" if ci95 is not None else "") + " %"


def episodes(ways: int, shot: int) -> str:
    """5-way 1-shot."""
    return f"{ways}-way {shot}-shot"


def duration(seconds: float) -> str:
    """As long as it takes to be understood: 42 s, 12.3 min, 5 h 07 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes // 60:.0f} h {minutes % 60:02.0f} min"


def mean_ci(values: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """Mean and 95 % interval, 1.96 std(ddof=1) / sqrt(n); None for a single value."""
    x = np.asarray(values, dtype=np.float64)
    return float(x.mean()), float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None


def val_of(record: Record) -> str:
    """The best val accuracy with its interval."""
    return percent(record.best["val/accuracy"], record.best.get("val/ci95")) if record.best else DASH


def test_of(record: Record, found: dict[str, Any]) -> str:
    """The test accuracy in a result.json or winner.json, or why there is none."""
    accuracy = number(found, "test/accuracy")
    if accuracy is not None:
        n = number(found, "test/episodes")
        return percent(accuracy, number(found, "test/ci95")) + (f" (n = {n:,.0f})" if n else "")
    return "not touched" if record.trial or (record.config and not record.config.episodes.test_episodes) else "not yet"


def protocol_of(config: Config | None) -> str:
    """The protocol; paper with what has to stand beside its figures."""
    if not config or config.episodes.protocol == "standard":
        return config.episodes.protocol if config else DASH
    return "paper: LEAKS THE LABEL"


def trained_on(record: Record) -> str:
    """Episodes so far."""
    return f"{record.step * record.config.episodes.meta_batch:,} episodes" if record.config else DASH


def commit_of(record: Record) -> str:
    """Short."""
    commit, _, dirty = str(record.facts.get("commit") or DASH).partition("-")
    return commit[:10] + (f"-{dirty}" if dirty else "")


def headline(runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> Table:
    """A row a run; of a sweep, its leading trial."""
    rows = [_headline_row(record.name, record, record.result) for record in runs]
    first = [(sweep, record) for sweep in sweeps for record in sweep.ranked[:1]]
    for sweep, record in first:
        rank = "winner" if sweep.over else "leads so far"
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
    note = "Mean over episodes with its 95 % interval, of the checkpoint that was best on val."
    paper = any(record.config and record.config.episodes.protocol == "paper" for record in every)
    leak = "\n" + leak_note("paper").replace("\n", " ") if paper else ""
    return Table("Runs", (*header, "commit"), rows, note + leak)


def _headline_row(name: str, record: Record, found: dict[str, Any]) -> tuple[str, ...]:
    c = record.config
    cells = tuple(episodes(*c.episode(split)[:2]) for split in ("val", "train")) if c else (DASH, DASH)
    figures = (test_of(record, found), val_of(record), *cells, trained_on(record), duration(record.seconds))
    return (name, protocol_of(c), *figures, commit_of(record))


def ways_shots(records: Sequence[Record]) -> list[Table]:
    """Accuracy by ways and shots, wherever the runs cover several: trained where they are evaluated, or at one target."""
    tables = []
    configs = {id(record): record.config for record in records if record.config and record.best}
    known = [record for record in records if id(record) in configs]
    for group in by(known, lambda r: (r.cell or ())[:2]).values():
        own = [r for r in group if r.config and r.config.episode("val")[:2] == r.config.episode("train")[:2]]
        tables.append(_grid("Ways and shots, each network evaluated where it was trained", own))
        for (ways, shot), at in by(group, _evaluated).items():
            tables.append(_grid(f"Ways and shots of training, all evaluated at {episodes(ways, shot)}", at))
    return [t for t in tables if t] + [table for record in records for table in _asked(record)]


def _evaluated(record: Record) -> tuple[int, int]:
    assert record.config
    return (*record.config.episode("val")[:2],)


def _grid(title: str, records: Sequence[Record]) -> Table | None:
    found: dict[tuple[int, int], list[str]] = {}
    for record in records:
        test = number(record.result, "test/accuracy")
        accuracy = (
            f"{percent(test, number(record.result, 'test/ci95'))} test" if test is not None else f"{val_of(record)} val"
        )
        assert record.config
        found.setdefault((record.config.episodes.ways, record.config.episodes.shot), []).append(
            f"{accuracy}, {record.label}"
        )
    return _matrix(title, found) if len(found) > 1 else None


def _matrix(title: str, found: dict[tuple[int, int], list[str]]) -> Table:
    shots = sorted({shot for _, shot in found})
    rows = [
        (f"{ways}-way", *("\n".join(found.get((ways, shot), [DASH])) for shot in shots))
        for ways in sorted({ways for ways, _ in found})
    ]
    return Table(title, ("", *(f">{shot}-shot" for shot in shots)), rows)


def _asked(record: Record) -> list[Table]:
    """The grids of scripts/evaluate.py: one network, asked for other episodes than it was trained on."""
    return [t for grid in record.grids for t in attempt(_grid_of, record, grid, default=[], damage=record.damage)]


def _grid_of(record: Record, grid: dict[str, Any]) -> list[Table]:
    found: dict[str, dict[tuple[int, int], list[str]]] = {}
    for result in grid["results"]:
        leak = " (leaks the label)" if result["protocol"] == "paper" else ""
        for noise, score in result["scores"].items():
            what = f"{record.name} on {result['split']}, protocol {result['protocol']}{leak}, {noise}"
            cells = found.setdefault(what, {})
            cells[result["ways"], result["shot"]] = [percent(number(score, "accuracy"), number(score, "ci95"))]
    return [_matrix(f"Ways and shots, {what}", cells) for what, cells in found.items()]


def fact(record: Record, key: str) -> str:
    """From facts.json."""
    return str(record.facts.get(key, DASH))


FACTS_SHOWN = ("commit", "manifest", "manifest_digest", "machine", "device", "world_size", "threads", "python", "torch")


def facts(records: Sequence[Record]) -> Table:
    """On what, with which code and data; runs of the same share a column."""
    groups = by([r for r in records if r.facts], lambda r: tuple(fact(r, key) for key in FACTS_SHOWN))
    rows = [(key.replace("_", " "), *(values[i] for values in groups)) for i, key in enumerate(FACTS_SHOWN)]
    return Table("Facts", ("", *map(_names, groups.values())), rows if groups else [], "As of each run's last start.")


def _names(records: Sequence[Record]) -> str:
    return (
        ", ".join(r.name for r in records)
        if len(records) < 5
        else f"{records[0].name} … {records[-1].name} ({len(records)})"
    )


K = TypeVar("K")
V = TypeVar("V")


def by(values: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Values by their key, both in order of first appearance."""
    groups: dict[K, list[V]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def same_episodes(records: Sequence[Record]) -> list[list[Record]]:
    """The records in groups that were evaluated on the same episodes; by protocol, ways and shots."""
    groups = by(records, lambda record: record.cell)
    return [groups[cell] for cell in sorted(groups, key=_cell_order)]


def _cell_order(cell: tuple[Any, ...] | None) -> tuple[Any, ...]:
    return (True,) if cell is None else (False, cell[1] == "paper", *cell[2:4])
