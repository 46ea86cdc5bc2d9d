"""Measuring contenders in turn, medians with their spread, paired ratios, and facts about the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lgm_dist.console import table
from lgm_dist.runs.facts import commit


@dataclass(frozen=True)
class Spread:
    """Some measurements of the same quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    def text(self, digits: int = 1) -> str:
        """The measurements as "median [smallest, largest]"."""
        low, middle, high = (f"{v:,.{digits}f}" for v in (min(self.values), self.median, max(self.values)))
        return f"{middle} [{low}, {high}]"

    def each(self, change: Callable[[float], float]) -> Spread:
        """The measurements after a conversion, such as seconds to episodes/s."""
        return Spread(tuple(change(value) for value in self.values))


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, Spread]:
    """Measure each contender once a round, A B A B …. The first `warmup` rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, contender in contenders.items():
            value = contender()
            if turn >= warmup:
                found[name].append(value)
    return {name: Spread(tuple(values)) for name, values in found.items()}


def ratio(a: Spread, b: Spread) -> Spread:
    """The ratio a / b of each round."""
    return Spread(tuple(x / y for x, y in zip(a.values, b.values, strict=True)))


@dataclass
class Section:
    """A table of the benchmark and the figures behind it."""

    name: str
    command: str
    header: Sequence[str]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def markdown(self) -> str:
        """The command, the table and its note, as docs/performance.md holds them."""
        note = f"\n{self.note}\n" if self.note else ""
        return f"`{self.command}`\n\n{table(self.header, self.rows)}{note}"


def facts() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "commit": commit(),
        "machine": f"{_processor()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(sections: Sequence[Section], path: Path) -> None:
    """Write all figures as JSON."""
    found = {s.name: {"command": s.command, "note": s.note, **s.values} for s in sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts(), **found}, indent=1) + "\n")


def plain(spreads: Mapping[str, Spread]) -> dict[str, list[float]]:
    """Spreads as lists, for JSON."""
    return {name: list(spread.values) for name, spread in spreads.items()}
