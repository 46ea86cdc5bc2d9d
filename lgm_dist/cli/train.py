"""`lgm-dist train --data fc100 --ways 5 --shot 1`: trains a learner. The same name and storage resume a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgm_dist.cli.flags import Flags, parse
from lgm_dist.console import leak_note, percent, table

if TYPE_CHECKING:
    from lgm_dist.config import Config

FILES = ("result.json", "metrics.jsonl", "curves.png", "episode.png", "confusion.png", "weights.png", "checkpoints")
"""What a finished run leaves in its folder; the pictures are missing if matplotlib is."""


class TrainFlags(Flags):
    """Train LGM-Net with any number of workers, evaluate it on test episodes, and keep everything in STORAGE/NAME."""


def main(argv: list[str]) -> None:
    """Train the run of these arguments; print its test accuracy and its files."""
    config = parse(TrainFlags, argv)[0]
    from lgm_dist.cluster.fit import fit  # after parsing, so that --help and a mistyped flag need no torch
    from lgm_dist.runs.folder import read_result

    run = fit(config)
    sys.stdout.write(_summary(config, run, read_result(run)))


def _summary(config: Config, run: Path, result: dict[str, Any]) -> str:
    """The result as a table, and the files of the run."""
    from lgm_dist.training.tasks import in_words, trained_on

    split = "test" if "test/accuracy" in result else "val"
    row = {
        "run": config.run_name,
        "protocol": config.episodes.protocol,
        "episodes": f"{result['ways']}-way {result['shot']}-shot",
        f"{split} accuracy": percent(result[f"{split}/accuracy"], result[f"{split}/ci95"]),
        f"{split} episodes": f"{result.get('test/episodes', config.episodes.eval_episodes):,}",
        "trained on": in_words(trained_on(config, result["train/steps"])),
        "time": f"{result['train/seconds'] / 60:.1f} min",
        "memory a worker": f"{result['memory/peak_bytes'] / 2**30:.2f} GiB",
    }
    files = [f"{name:>14}  {run / name}\n" for name in FILES if (run / name).exists()]
    return "\n" + table([*row], [[*row.values()]]) + leak_note(config.episodes.protocol) + "".join(files)
