"""`lgm-dist replay`: send runs to Weights & Biases. What is already there is not sent again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class ReplayFlags:
    """Send to W&B what it does not have of finished or stopped runs: metrics, result, pictures, artifacts.

    For a run that was tracked offline, all rows are sent. Do not also send its offline folders with `wandb sync`.
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of runs. The folder of a sweep stands for all its trials."""
    wandb: Literal["auto", "online", "offline"] = "auto"
    """auto: online with WANDB_API_KEY or a login, otherwise offline."""


def main(argv: list[str]) -> None:
    """Send the runs, and print a line for each."""
    flags = tyro.cli(ReplayFlags, args=argv)
    from lgm_dist.config import Config
    from lgm_dist.errors import RunFailed
    from lgm_dist.runs.folder import read_config  # after parsing, because torch takes seconds to import
    from lgm_dist.tracking.mirror import replay
    from lgm_dist.tracking.wandb_process import wandb_mode

    if wandb_mode(Config.of(wandb=flags.wandb)) == "disabled":
        raise ValueError("WANDB_MODE (disabled) turns W&B off; give --wandb online or --wandb offline")
    runs = [run for path in flags.runs for run in _runs(path)]
    configs = [read_config(run).replace(wandb=flags.wandb) for run in runs]
    failed = 0
    for run, config in zip(runs, configs, strict=True):
        counts = replay(run, config)
        if counts:
            sys.stdout.write(f"{run}: {counts[0]} rows sent, {counts[1]} already there\n")
        failed += counts is None
    if failed:
        raise RunFailed(f"{failed} of {len(runs)} runs are incomplete on W&B; the same command sends the rest")


def _runs(path: Path) -> Iterator[Path]:
    from lgm_dist.runs.sweep_folder import SWEEP, read_sweep

    if (path / SWEEP).exists():
        yield from (trial.run for trial in read_sweep(path).trials if trial.rows)
    else:
        yield path
