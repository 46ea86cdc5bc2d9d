"""Throughput of runs, and how it scales with workers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from lgm_dist.report.records import Record
from lgm_dist.report.tables import DASH, Table, by, episodes, fact


def speed_of(record: Record, unit: str = "episodes") -> float | None:
    """Median episodes/s, or images/s of pretraining, over the steps of a run; None without such steps.

    The median, because the first steps after each start are slow.
    """
    speeds = [row[f"speed/{unit}_per_s"] for row in record.rows if f"speed/{unit}_per_s" in row]
    return statistics.median(speeds) if speeds else None


def throughput(records: Sequence[Record]) -> Table | None:
    """A table of speed and memory of each run."""
    rows: list[tuple[str, ...]] = []
    for record in records:
        c = record.config
        if not c:
            continue
        machine = tuple(fact(record, key) for key in ("world_size", "threads", "device"))
        memory = max((row.get("memory/peak_bytes", 0.0) for row in record.rows), default=0.0)
        peak = f"{memory / 2**30:.2f} GiB" if memory else DASH
        if images := speed_of(record, "images"):
            batch = str(c.pretraining.batch)
            rows.append((record.name, "images of pretraining", batch, *machine, DASH, f"{images:,.0f}", peak))
        if speed := speed_of(record):
            size = f"{c.episodes.ways}-way {c.episodes.shot}-shot {c.episodes.query}-query"
            of_episodes = f"{speed * c.episodes.ways * (c.episodes.shot + c.episodes.query):,.0f}"
            batch = str(c.episodes.meta_batch)
            rows.append((record.name, size, batch, *machine, f"{speed:,.1f}", of_episodes, peak))
    header = ("run", "episodes", ">meta-batch", ">workers", ">threads per worker", "device")
    note = "Median over the training steps, without evaluations. Memory is the largest peak of one worker."
    return Table("Throughput", (*header, ">episodes/s", ">images/s", ">peak memory"), rows, note) if rows else None


class Scaling(NamedTuple):
    """Episodes/s of the same work by number of workers."""

    title: str
    speeds: list[tuple[int, float, int]]
    """Workers, mean over runs of their median episodes/s, number of runs; ordered by workers."""


def scalings(records: Sequence[Record]) -> list[Scaling]:
    """The scaling of each kind of work that was done with different numbers of workers."""
    timed = [r for r in records if r.config and speed_of(r) and isinstance(r.facts.get("world_size"), int)]
    every = []
    for group in by(timed, _work).values():
        sizes = by(group, lambda r: int(r.facts["world_size"]))
        speeds = [(w, statistics.mean(speed_of(r) or 0.0 for r in rs), len(rs)) for w, rs in sorted(sizes.items())]
        c = group[0].config
        if len(speeds) > 1 and c:
            every.append(
                Scaling(
                    f"{episodes(c.episodes.ways, c.episodes.shot)}, {c.episodes.meta_batch} episodes a step", speeds
                )
            )
    return every


def _work(record: Record) -> tuple[Any, ...]:
    c = record.config
    assert c
    return (
        c.data.name,
        c.episodes.ways,
        c.episodes.shot,
        c.episodes.query,
        c.episodes.protocol,
        c.episodes.meta_batch,
        c.model,
        fact(record, "device"),
    )


def scaling_table(scaling: Scaling) -> Table:
    """A table of speed-up and efficiency, relative to the fewest workers."""
    fewest, slowest, _ = scaling.speeds[0]
    rows: list[tuple[str, ...]] = [
        (str(w), str(runs), f"{speed:,.1f}", f"{speed / slowest:.2f}", f"{100 * speed / slowest * fewest / w:.0f} %")
        for w, speed, runs in scaling.speeds
    ]
    header = (">workers", ">runs", ">episodes/s", ">speed-up", ">efficiency")
    return Table(f"Scaling, {scaling.title}", header, rows)
