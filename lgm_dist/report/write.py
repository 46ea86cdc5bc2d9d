"""The report: which tables, charts and pictures it has, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lgm_dist.report import compare, speed, tables
from lgm_dist.report.charts import COLOURS, MOST_POINTS, Line, chart, colour, thin
from lgm_dist.report.page import Html, charts, figure, figures, page, picture, section, table, tag
from lgm_dist.report.records import Record, SweepRecord, attempt, gather

REPORT = "report.html"
PICTURES = {
    "curves.png": "Training curves",
    "episode.png": "One episode with its predictions: support images, then queries; correct ones have a green frame",
    "confusion.png": "Confusion of the val classes, and accuracy by class",
    "weights.png": "Generated weights of different episodes: embedding and histograms",
}


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write report.html about the runs and sweeps in `paths` into the folder `out`, and return the file's path.

    Each path is the folder of a run, of a sweep, or of several of them. Unfinished and damaged ones are shown as far as they
    go, with a note. Raises ValueError for a path that contains neither.
    """
    runs, sweeps = gather(paths)
    every = [*runs, *(trial for sweep in sweeps for trial in sweep.trials)]
    body = [
        _key_figures(runs, sweeps),
        section(
            "Results",
            table(tables.headline(runs, sweeps)),
            *_normalisation(runs),
            *map(table, tables.ways_shots(every)),
        ),
        *(_sweep(sweep) for sweep in sweeps),
        section("Training", *_training(runs)),
        section("Speed", *_speed(every)),
        section("Pictures", *_pictures(runs, sweeps)),
        section("Origin of the figures", *map(_spec, sweeps), table(tables.facts(every)), _notes(every, sweeps)),
    ]
    file = out / REPORT
    out.mkdir(parents=True, exist_ok=True)
    new = out / f".{REPORT}.new"
    new.write_text(page(_title(runs, sweeps, paths), _lead(runs, sweeps), *body))
    return new.replace(file)


def _title(runs: Sequence[Record], sweeps: Sequence[SweepRecord], paths: Sequence[Path]) -> str:
    if len(runs) == 1 and not sweeps:
        return f"Run {runs[0].name}"
    if len(sweeps) == 1 and not runs:
        return f"Sweep {sweeps[0].name}"
    return "Runs in " + ", ".join(path.name or str(path) for path in paths)


def _lead(runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> str:
    counts = [f"{len(runs)} run{'s' * (len(runs) != 1)}"] if runs else []
    counts += [f"sweep {sweep.name} with {len(sweep.trials)} trials" for sweep in sweeps]
    now = f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC"
    return f"LGM-Net, few-shot learning with generated weights: {', '.join(counts)}. Written on {now}."


def _key_figures(runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> Html:
    """The most important figures of a single run or sweep, in large type."""
    if len(runs) == 1 and not sweeps:
        return figures(_run_figures(runs[0]))
    if len(sweeps) == 1 and not runs and sweeps[0].ranked:
        return figures(_sweep_figures(sweeps[0]))
    return Html("")


def _run_figures(record: Record) -> list[tuple[str, str]]:
    pairs = _accuracies(record, record.result)
    if c := record.config:
        pairs.append(("chance", f"{100 / c.episode('val').ways:.4g} %"))
    return [*pairs, ("trained on", tables.trained_on(record)), ("time", tables.duration(record.seconds))]


def _sweep_figures(sweep: SweepRecord) -> list[tuple[str, str]]:
    first, statuses = sweep.ranked[0], [compare.status_of(record) for record in sweep.trials]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    hours = tables.duration(sum(record.seconds for record in sweep.trials))
    rank = "winner" if sweep.over else "best so far"
    return [(rank, first.name), *_accuracies(first, sweep.test), ("trials", counts), ("training", hours)]


def _accuracies(record: Record, result: dict[str, Any]) -> list[tuple[str, str]]:
    leak = " (leaks the label)" if record.leaks else ""
    return [
        ("test accuracy" + leak, tables.test_of(record, result)),
        ("best val accuracy" + leak, tables.val_of(record)),
    ]


def _normalisation(runs: Sequence[Record]) -> list[Html]:
    """Comparisons of runs that differ in normalisation and were evaluated on the same episodes."""
    comparisons = []
    for group in tables.same_episodes(runs):
        title = f"Normalisation, runs evaluated on {_episodes_of(group)}"
        comparisons.append(compare.comparison(title, compare.normalisations(group), "runs"))
    return [table(t) for t in comparisons if t]


def _episodes_of(group: Sequence[Record]) -> str:
    c = group[0].config
    return f"{tables.episodes(*c.episode('val')[:2])} ({tables.protocol_of(c)})" if c else "unknown episodes"


def _sweep(sweep: SweepRecord) -> Html:
    settings = compare.sampled(sweep)
    chips = [colour(place) for place in range(len(sweep.ranked))]
    means = compare.comparison("Settings compared", settings, "trials")
    scales = [_scale(setting) for setting in settings if setting.is_scale]
    parts = [
        table(compare.leaderboard(sweep), chips),
        charts(*_race(sweep)),
        table(means) if means else "",
        charts(*scales),
    ]
    return section(f"Sweep {sweep.name}", *parts)


def _race(sweep: SweepRecord) -> list[Html]:
    """Val accuracy of all trials against time, and against steps."""
    drawn = []
    for key, unit, xlabel in (("seconds", 60.0, "training time (minutes)"), ("step", 1.0, "step")):
        lines = [_val(record, place, key, unit) for place, record in enumerate(sweep.ranked) if record.evaluations]
        if lines:
            title = f"Val accuracy by {'time' if unit > 1 else 'step'}"
            svg = chart(lines, xlabel, "val accuracy (%)", level=_chance(sweep.ranked))
            drawn.append(figure(svg, title, _band(sweep.ranked), _legend(sweep.ranked)))
    return drawn


def _scale(setting: compare.Setting) -> Html:
    """Best val accuracy against a setting that is a number."""
    pairs = [(value, record.best) for value, record in setting.values if record.best]
    x, y, ci95 = (
        np.array(v, dtype=np.float64)
        for v in ([v for v, _ in pairs], _in_percent(pairs, "val/accuracy"), _in_percent(pairs, "val/ci95"))
    )
    log: dict[str, Any] = {"xscale": "log"} if x.min() > 0 and x.max() / x.min() > 20 else {}
    svg = chart([Line(x, y, 0, ci95, joined=False)], setting.path, "best val accuracy (%)", **log)
    caption = "One point per trial, with the 95 % interval over its val episodes."
    return figure(svg, f"Val accuracy by {setting.path}", caption)


def _in_percent(pairs: Sequence[tuple[Any, dict[str, float]]], key: str) -> list[float]:
    return [100 * best.get(key, 0.0) for _, best in pairs]


def _training(runs: Sequence[Record]) -> list[Html]:
    """Loss and val accuracy of the runs. Runs with the same episodes share their charts."""
    parts = []
    for group in tables.same_episodes(runs):
        drawn = [record for record in group if record.rows]
        if drawn:
            heading = [tag("h3", f"Evaluated on {_episodes_of(group)}")] if len(runs) > 1 else []
            parts += [*heading, charts(*_curves(drawn))]
    return parts


def _curves(records: Sequence[Record]) -> list[Html]:
    drawn = []
    losses = [
        _loss(record, place) for place, record in enumerate(records) if any("train/loss" in r for r in record.rows)
    ]
    if losses:
        caption = f"Means over at most {MOST_POINTS} equal parts of each run."
        svg = chart(losses, "step", "loss (negative log probability)")
        drawn.append(figure(svg, "Training loss", caption, _legend(records)))
    evaluated = [_val(record, place, "step", 1.0) for place, record in enumerate(records) if record.evaluations]
    if evaluated:
        svg = chart(evaluated, "step", "val accuracy (%)", level=_chance(records))
        drawn.append(figure(svg, "Accuracy on val episodes", _band(records), _legend(records)))
    return drawn


def _loss(record: Record, place: int) -> Line:
    points = [(row["step"], row["train/loss"]) for row in record.rows if "train/loss" in row]
    x, y = thin(*np.array(points, dtype=np.float64).T)
    return Line(x, y, place, marks=False)


def _val(record: Record, place: int, key: str, unit: float) -> Line:
    every = record.evaluations
    rows = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, min(len(every), MOST_POINTS)).astype(int))]
    x = np.array([row.get(key, 0.0) / unit for row in rows])
    y = 100 * np.array([row["val/accuracy"] for row in rows])
    ci95 = 100 * np.array([row.get("val/ci95", 0.0) for row in rows])
    return Line(x, y, place, ci95, marks=len(rows) <= 40)


def _chance(records: Sequence[Record]) -> float | None:
    """100 / ways, if all records have the same ways."""
    ways = {c.episode("val").ways for record in records if (c := record.config)}
    return 100 / ways.pop() if len(ways) == 1 else None


def _band(records: Sequence[Record]) -> str:
    counts = sorted({c.episodes.eval_episodes for record in records if (c := record.config)})
    of = f" on {' or '.join(f'{n:,}' for n in counts)} episodes each" if counts else ""
    return f"Evaluations{of}. The band is the 95 % interval."


def _legend(records: Sequence[Record]) -> list[tuple[str, str]]:
    named = [(colour(place), record.label) for place, record in enumerate(records[:COLOURS])]
    rest = len(records) - COLOURS
    return [*named, *([(colour(None), f"{rest} more")] if rest > 0 else [])]


def _speed(records: Sequence[Record]) -> list[Html]:
    parts = [table(t)] if (t := speed.throughput(records)) else []
    for scaling in speed.scalings(records):
        workers, speeds = (np.array(v, dtype=np.float64) for v in list(zip(*scaling.speeds, strict=True))[:2])
        ideal = Line(workers, speeds[0] * workers / workers[0], None, marks=False, dashed=True)
        svg = chart([Line(workers, speeds, 0), ideal], "workers", "episodes/s", xticks=workers, ylim=(0, None))
        parts += [
            table(speed.scaling_table(scaling)),
            charts(figure(svg, "Episodes/s by workers", "Dashed: proportional to the number of workers.")),
        ]
    return parts


def _pictures(runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> list[Html]:
    """The pictures of every run, and of the first trial of each sweep."""
    shown = [*runs, *(sweep.ranked[0] for sweep in sweeps if sweep.ranked)]
    parts = []
    for record in shown:
        kept = [(record.folder / name, alt) for name, alt in PICTURES.items() if (record.folder / name).exists()]
        tried = [attempt(picture, path, alt, default=None, damage=record.damage) for path, alt in kept]
        pictures = [p for p in tried if p]
        if pictures:
            is_open = {"open": ""} if len(shown) == 1 else {}
            parts.append(tag("details", tag("summary", record.label), *pictures, **is_open))
    return parts


def _spec(sweep: SweepRecord) -> Html:
    """The options of the sweep."""
    names = ("space", "search", "scheduler", "samples", "commit", "command")
    options = [(name, sweep.spec[name]) for name in names if sweep.spec.get(name)]
    words = [word for name, value in options for word in (f"{name} ", tag("code", _words(value)), "; ")]
    return tag("p", f"Sweep {sweep.name}: ", *words[:-1]) if options else Html("")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _notes(records: Sequence[Record], sweeps: Sequence[SweepRecord]) -> Html:
    """A line for each run that is unfinished or damaged. Called last, because reading the pictures may find more damage."""
    lines = [f"{record.name}: {'; '.join(record.notes)}" for record in records if record.notes]
    lines += [f"{sweep.name}: {'; '.join(sweep.damage)}" for sweep in sweeps if sweep.damage]
    return tag("ul", *(tag("li", line, cls="warn") for line in lines), cls="plain") if lines else Html("")
