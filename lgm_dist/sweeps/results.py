"""results.csv of a sweep: a row for each trial. No Ray."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lgm_dist.runs.folder import CONFIG, read_config
from lgm_dist.runs.sweep_folder import Sweep, Trial
from lgm_dist.sweeps.ranking import leak, sample_of
from lgm_dist.sweeps.spaces import images_per_step

CSV = "results.csv"


def write_csv(sweep: Sweep) -> Path:
    """Write results.csv into the sweep's folder and return its path.

    Accuracies are in %, differences to the winner in percentage points. A value that a trial does not have is empty.
    """
    rows = [_row(sweep, trial) for trial in sweep.trials]
    with (sweep.folder / CSV).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return sweep.folder / CSV


def _row(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    best, last = trial.best, trial.rows[-1] if trial.rows else {}
    difference = trial.difference(sweep.ranked[0]) if best else None
    return {
        "trial": trial.number,
        "status": trial.status,
        "protocol": sweep.base.episodes.protocol + leak(sweep),
        **{path: sample_of(trial).get(path) for path in sweep.spec["params"]},
        "val_accuracy": _in_percent(best.val_accuracy if best else None),
        "val_ci95": _in_percent(best.val_ci95 if best else None),
        "best_step": best.step if best else None,
        "best_images": _images(trial, best.step if best else None),
        "last_step": last.get("step"),
        "last_images": _images(trial, last.get("step")),
        "seconds": last.get("seconds"),
        "difference": _in_percent(difference.accuracy if difference else None),
        "difference_ci95": _in_percent(difference.ci95 if difference else None),
        "exploits": "; ".join(f"step {exploit['step']} from trial {exploit['from']}" for exploit in trial.exploits),
        "error": trial.error,
    }


def _in_percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 6)


def _images(trial: Trial, step: int | None) -> int | None:
    """Training images of the first `step` steps."""
    if step is None or not (trial.run / CONFIG).exists():
        return None
    return step * images_per_step(read_config(trial.run))
