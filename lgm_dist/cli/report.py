"""`lgm-dist report`: report.html about runs and sweeps, and a workspace and a report on W&B."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class ReportFlags:
    """Write report.html, which opens without an account or a network, and make a workspace and a report on W&B.

    Without a W&B account, the workspace and the report are written as JSON files.
    """

    paths: Positional[tuple[Path, ...]] = ()
    """Folders of a run, of a sweep, or of several of them. The W&B dashboard of a sweep shows its trials, otherwise it shows
    all runs of the project."""
    entity: str = ""
    """W&B user or team (default: WANDB_ENTITY, or the account's default)."""
    project: str = ""
    """W&B project (default: WANDB_PROJECT, or lgm_dist)."""
    out: str = ""
    """Folder of the written files (default: the first of the paths)."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with WANDB_API_KEY or a login, otherwise offline. offline: JSON files. disabled: only report.html."""


def main(argv: list[str]) -> None:
    """Write report.html, then save the W&B dashboard or write it as JSON."""
    flags = tyro.cli(ReportFlags, args=argv)
    if not flags.paths:
        raise ValueError("paths () must name at least one folder of a run or sweep, such as runs/NAME")
    from lgm_dist.config import Config
    from lgm_dist.report import write_report  # after parsing, because torch takes seconds to import
    from lgm_dist.report.records import gather
    from lgm_dist.tracking.wandb_process import wandb_mode

    out = Path(flags.out or flags.paths[0])
    sys.stdout.write(f"report     {write_report(flags.paths, out)}\n")
    mode = wandb_mode(Config.of(wandb=flags.wandb))
    if mode == "disabled":
        return
    from lgm_dist.tracking import dashboard

    project = dashboard.Project(
        flags.entity or os.environ.get("WANDB_ENTITY", ""), flags.project or os.environ.get("WANDB_PROJECT", "lgm_dist")
    )
    if mode == "online":
        for name, url in dashboard.save(project, *gather(flags.paths)).items():
            sys.stdout.write(f"{name:10} {url}\n")
    else:
        for path in dashboard.write(project, *gather(flags.paths), out):
            sys.stdout.write(f"{'W&B JSON':10} {path}\n")
