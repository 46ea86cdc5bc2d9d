"""Sends runs to Weights & Biases: `scripts/wandb_replay.py runs/NAME` sends what is not there yet, nothing twice."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from lgm_dist.config import Config
from lgm_dist.console import run_command
from lgm_dist.errors import RunFailed


@dataclasses.dataclass(frozen=True)
class Flags:
    """Sends to W&B what it lacks of finished or stopped runs: rows of metrics.jsonl, result, pictures, artifacts. The rows
    of a run that was tracked offline and is sent online are all sent; do not `wandb sync` its offline folders as well."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs; the folder of a sweep stands for all of its trials."""
    wandb: Literal["auto", "online", "offline"] = "auto"
    """auto: online with WANDB_API_KEY or a login, else offline."""


def main(argv: list[str]) -> None:
    """Parses, replays and prints a line a run."""
    flags = tyro.cli(Flags, args=argv)
    from lgm_dist.runs.folder import read_config
    from lgm_dist.tracking.mirror import replay
    from lgm_dist.tracking.wandb_process import wandb_mode

    if wandb_mode(Config.of(wandb=flags.wandb)) == "disabled":
        raise ValueError("WANDB_MODE (disabled) leaves nowhere to send to; give --wandb online or --wandb offline")
    runs = [run for path in flags.runs for run in _runs(path)]
    configs = [read_config(run).replace(wandb=flags.wandb) for run in runs]
    failed = 0
    for run, config in zip(runs, configs, strict=True):
        done = replay(run, config)
        if done:
            sys.stdout.write(f"{run}: {done[0]} rows logged, {done[1]} already there\n")
        failed += done is None
    if failed:
        raise RunFailed(f"{failed} of {len(runs)} runs are not whole on W&B; the same command goes on")


def _runs(path: Path) -> Iterator[Path]:
    from lgm_dist.runs.sweep_folder import SWEEP, read_sweep

    if (path / SWEEP).exists():
        yield from (trial.run for trial in read_sweep(path).trials if trial.rows)
    else:
        yield path


if __name__ == "__main__":
    sys.exit(run_command(main))
