"""Trains LGM-Net: `scripts/train.py --data fc100 --ways 5 --shot 1`. The same name and storage go on where a run stopped."""

from __future__ import annotations

import sys

from lgm_dist.cli.flags import Flags, parse
from lgm_dist.console import leak_note, run_command, table


class TrainFlags(Flags):
    """Trains LGM-Net data-parallel under Ray Train, evaluates it on test episodes, and leaves all in storage/name."""


def main(argv: list[str]) -> None:
    """Parses, trains, prints the test accuracy and where everything lies."""
    config = parse(TrainFlags, argv)[0]
    from lgm_dist.cluster.fit import fit
    from lgm_dist.runs.folder import read_result  # after parsing: --help and a mistyped flag need no torch

    run = fit(config)
    result = read_result(run)
    split = "test" if config.episodes.test_episodes else "val"
    accuracy = f"{100 * result[f'{split}/accuracy']:.2f} ± {100 * result[f'{split}/ci95']:.2f} %"
    row = [
        *(config.run_name, config.episodes.protocol, f"{result['ways']}-way {result['shot']}-shot", accuracy),
        *(f"{config.episodes.test_episodes or config.episodes.eval_episodes:,}", f"{result['train/episodes']:,}"),
        *(f"{result['train/seconds'] / 60:.1f} min", f"{result['memory/peak_bytes'] / 2**30:.2f} GiB"),
    ]
    header = (
        "run",
        "protocol",
        "episodes",
        f"{split} accuracy",
        f"{split} episodes",
        "trained on",
        "time",
        "memory a worker",
    )
    sys.stdout.write("\n" + table(header, [row]) + leak_note(config.episodes.protocol))
    for name in (
        "result.json",
        "metrics.jsonl",
        "curves.png",
        "episode.png",
        "confusion.png",
        "weights.png",
        "checkpoints",
    ):
        sys.stdout.write(f"{name:>14}  {run / name}\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
