"""The picture of how the time and memory of a step grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from lgm_dist.bench.measure import Spread
from lgm_dist.bench.network import AXES, along


def growth(values: Mapping[str, Any], path: Path) -> None:
    """Draw the figures of `network.growth` into `path` (PNG): one column for each setting, time above, memory below."""
    figure, axes = plt.subplots(2, len(AXES), figsize=(3 * len(AXES), 5), sharey="row", layout="constrained")
    for column, (axis, name) in enumerate(AXES.items()):
        chosen = along(values["points"], axis)
        x, slope = [p[axis] for p in chosen], values["slopes"][axis]
        time = [1e3 * Spread(tuple(p["seconds"])).median for p in chosen]
        low = [t - 1e3 * min(p["seconds"]) for t, p in zip(time, chosen, strict=True)]
        high = [1e3 * max(p["seconds"]) - t for t, p in zip(time, chosen, strict=True)]
        axes[0, column].errorbar(x, time, yerr=[low, high], marker="o", capsize=3, color="tab:blue")
        axes[0, column].set_title(f"{1e3 * slope['seconds']:.1f} ms each", fontsize=10)
        axes[1, column].plot(x, [p["peak_bytes"] / 2**30 for p in chosen], marker="o", color="tab:orange")
        axes[1, column].set_title(f"{slope['bytes'] / 2**20:.1f} MiB each", fontsize=10)
        axes[1, column].set_xlabel(name)
        for cell in axes[:, column]:
            cell.set_xlim(left=0)
            cell.grid(alpha=0.3)
    for row, name in zip(axes, ("ms a step", "peak memory (GiB)"), strict=True):
        row[0].set_ylabel(name)
        row[0].set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
