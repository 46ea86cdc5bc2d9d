"""What a sweep leaves at its end, from its folder alone: results.csv, comparison.md and three pictures. No Ray."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from pictures import PICTURES, draw
from ranking import difference, leak, levels, sample_of, short, space_of
from spaces import images_per_step

from lgm_dist.console import leak_note, table
from lgm_dist.runs.folder import CONFIG, read_config
from lgm_dist.runs.sweep_folder import Sweep, Trial, read_sweep

CSV, COMPARISON = "results.csv", "comparison.md"


def write_results(folder: Path) -> list[Path]:
    """Writes everything that the sweep's trials allow into its folder; returns the paths, tables first.

    Pictures need evaluated trials: time.png one, the others two (`markdown` says which are missing). Raises ValueError
    where `folder` holds no sweep.
    """
    sweep = read_sweep(folder)
    paths = [_csv(sweep), folder / COMPARISON]
    paths[1].write_text(markdown(sweep))
    return paths + draw(sweep)


def _csv(sweep: Sweep) -> Path:
    rows = [_csv_row(sweep, trial) for trial in sweep.trials]
    with (sweep.folder / CSV).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return sweep.folder / CSV


def _csv_row(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """Accuracies in %, differences in percentage points; what a trial does not have is None."""
    best, end = trial.best or {}, trial.rows[-1] if trial.rows else {}
    apart = difference(trial, sweep.ranked[0]) if best else None
    return {
        "trial": trial.number,
        "status": trial.status,
        "protocol": sweep.base.episodes.protocol + leak(sweep),
        **{path: sample_of(trial).get(path) for path in sweep.spec["params"]},
        "val_accuracy": _percent(best.get("val/accuracy")),
        "val_ci95": _percent(best.get("val/ci95")),
        "best_step": best.get("step"),
        "best_images": _images(trial, best),
        "last_step": end.get("step"),
        "last_images": _images(trial, end),
        "seconds": end.get("seconds"),
        "difference": _percent(apart.accuracy) if apart else None,
        "difference_ci95": _percent(apart.ci95) if apart else None,
        "exploits": "; ".join(f"step {exploit['step']} from trial {exploit['from']}" for exploit in trial.exploits),
        "error": trial.error,
    }


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 6)


def _images(trial: Trial, row: dict[str, Any]) -> int | None:
    """Training images seen until then."""
    if not row or not (trial.run / CONFIG).exists():
        return None
    return int(row["step"]) * images_per_step(read_config(trial.run))


def markdown(sweep: Sweep) -> str:
    """The leaderboard and a table a parameter, in Markdown."""
    statuses = Counter(trial.status for trial in sweep.trials)
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    target, base, evaluated = sweep.spec["target"], sweep.spec["base"], len(sweep.ranked)
    missing = [(name, needed) for name, (_, needed) in PICTURES.items() if evaluated < needed]
    notes = [f"- trial {t.number} has no evaluation: {t.error or t.status}" for t in sweep.trials if not t.best]
    notes += [f"- no {name}: it needs {_count(n, 'evaluated trial')}, not {evaluated}" for name, n in missing]
    blocks = [
        f"# Sweep {sweep.spec['name']}",
        f"{_count(len(sweep.trials), 'trial')}: {counts or 'not started'}. Val accuracy at {target['ways']}-way "
        f"{target['shot']}-shot (chance {100 / target['ways']:g} %), of every\ntrial on the same {base['eval_episodes']} "
        "episodes: mean ± 95 % interval over episodes; differences are paired over them.\n"
        "The winner was chosen on these episodes, so its own accuracy and its lead are a little too large.",
        leak_note(base["protocol"]),
        table(*_leaderboard(sweep)) if evaluated else "",
        "\n".join(notes),
        _by_parameter(sweep) if evaluated else "",
    ]
    return "\n\n".join(block.rstrip("\n") for block in blocks if block) + "\n"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _leaderboard(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    paths, rows = list(sweep.spec["params"]), []
    for rank, trial in enumerate(sweep.ranked):
        row = _csv_row(sweep, trial)
        apart = "" if row["difference"] is None else f"{row['difference']:+.2f} ± {row['difference_ci95']:.2f}"
        sample = [short(row[path]) for path in paths]
        accuracy = f"{row['val_accuracy']:.2f} ± {row['val_ci95']:.2f} %"
        cost = ["" if row["last_images"] is None else f"{row['last_images']:,}", f"{row['seconds'] / 60:.1f}"]
        rows.append([str(trial.number), *sample, accuracy, apart if rank else "winner", trial.status, *cost])
    return ["trial", *paths, "val accuracy", "to the winner", "status", "images", "minutes"], rows


def _by_parameter(sweep: Sweep) -> str:
    note = (
        "## By parameter\n\nBest val accuracy, mean over trials ± 1.96 s/√n, the other parameters as they came. With few "
        "trials of a value that\ninterval is too narrow, and a stopped trial counts with its best until then.\n"
    )
    tables = []
    for path, param in space_of(sweep).items():
        where = " and ".join(f"{other} is {' or '.join(map(short, values))}" for other, values in param.when.items())
        rows = [(level.name, str(len(level.accuracies)), level.text) for level in levels(sweep)[path]]
        heading = f"\n### {path}{f' (where {where})' if where else ''}\n\n"
        tables.append(heading + table((path, "trials", "mean val accuracy"), rows))
    return note + "".join(tables)
