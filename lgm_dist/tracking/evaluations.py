"""Evaluations on W&B."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from lgm_dist.config import Config
from lgm_dist.console import notify
from lgm_dist.runs.folder import FACTS
from lgm_dist.tracking.panels import evaluation, model_artifact, read_if_there, use
from lgm_dist.tracking.wandb_process import sentence_of, wandb_mode
from lgm_dist.tracking.wandb_run import group_and_job_type, logged_config, open_run, wandb_id


def log_evaluation(config: Config, checkpoint: Path, data: str, results: list[dict[str, Any]]) -> None:
    """Log evaluations of a run's checkpoint as a separate W&B run with job type evaluate.

    Args:
        config: The configuration of the trained run; config.run.wandb is the mode.
        checkpoint: Folder of the evaluated checkpoint.
        data: Name of the data set.
        results: The results in the JSON file of `lgm-dist evaluate`.

    If W&B fails, one sentence on standard error says so.
    """
    if wandb_mode(config) == "disabled":
        return
    try:
        _log_evaluation(checkpoint.absolute().parents[1], config, checkpoint, data, results)
    except Exception as error:
        notify(f"W&B does not have this evaluation ({sentence_of(error)}); the JSON file does")


def _log_evaluation(run: Path, config: Config, checkpoint: Path, data: str, results: list[dict[str, Any]]) -> None:
    group = group_and_job_type(run)[0] or config.run_name
    values = logged_config(config) | read_if_there(run / FACTS)
    tracked = open_run(run, config, values, group, "evaluate", id=secrets.token_hex(6))
    table, cells = evaluation(data, results)
    tracked.log({"evaluation": table})
    tracked.summary.update(cells)
    use(tracked, model_artifact(wandb_id(run), config, checkpoint, {}))
    tracked.finish()
