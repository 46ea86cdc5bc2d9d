"""A run on W&B: its id, name, group, configuration and metrics. Imports wandb."""

from __future__ import annotations

import dataclasses
import os
import secrets
from pathlib import Path
from typing import Any

from lgm_dist.config import Config
from lgm_dist.console import leak_note
from lgm_dist.runs.sweep_folder import SWEEP, TRIAL
from lgm_dist.tracking.panels import UPLOAD_SECONDS, read_if_there
from lgm_dist.tracking.wandb_process import leave_service, wandb_mode


def open_run(run: Path, config: Config, values: dict[str, Any], group: str, job_type: str, **more: Any) -> Any:
    """Start the W&B run of a run's folder, or resume it. `values` is its configuration, `more` are arguments of wandb.init."""
    leave_service()
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # the settings of a run do not silence these lines
    tracked = wandb.init(
        **{"id": wandb_id(run), **more},
        project=os.environ.get("WANDB_PROJECT", "lgm_dist"),
        dir=run,
        name=config.run_name,
        group=group or None,
        job_type=job_type,
        config=values,
        notes=leak_note(config.episodes.protocol) or None,
        mode=wandb_mode(config),  # type: ignore[arg-type]
        allow_val_change=True,
        reinit="create_new",  # the driver of a sweep has several runs at once
        settings=wandb.Settings(console="off", silent=True, finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True),
    )
    tracked.define_metric("step")
    for glob in ("train/*", "val/*", "optim/*", "speed/*", "memory/*", "seconds"):
        tracked.define_metric(glob, step_metric="step")
    tracked.define_metric("val/accuracy", step_metric="step", summary="max")
    return tracked


def wandb_id(run: Path) -> str:
    """The run's W&B id. It is drawn at the first start, so that a resumed run continues the same W&B run."""
    path = run / "wandb-id"
    if not path.exists() or not path.read_text().strip():
        path.write_text(secrets.token_hex(6) + "\n")
    return path.read_text().strip()


def group_and_job_type(run: Path) -> tuple[str, str]:
    """Group and job type of a run on W&B: the sweep's name and "trial" for a trial, otherwise the grid's name and "train"."""
    if not (run / TRIAL).exists():
        above = run.absolute().parent
        return above.name if (above / "table.json").exists() else "", "train"
    return str(read_if_there(run.absolute().parents[1] / SWEEP).get("name", "")), "trial"


def logged_config(config: Config) -> dict[str, Any]:
    """The settings as W&B shows them: by flag name, with those of the network in a dictionary "model"."""
    flat = {name: value for name, value in config.flat().items() if "." not in name}
    return flat | {"model": dataclasses.asdict(config.model)}
