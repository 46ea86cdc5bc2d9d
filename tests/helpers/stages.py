"""Runs in this process, without pictures, that can be stopped at any heartbeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lgm_dist.config import Config
from lgm_dist.runs.job import make_job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.record import train_fn
from lgm_dist.runs.stop import STOP
from lgm_dist.training.worker import Worker


def train(config: Config, stop_before: int = 0) -> Path:
    """The folder of a run that was trained, or asked to stop before its heartbeat of this number."""
    job = make_job(config)
    run = Path(job.run)
    beats = iter(range(1, 1000))

    def heartbeat() -> None:
        if next(beats) == stop_before:
            (run / STOP).touch()

    train_fn(job, Worker(heartbeat=heartbeat))
    (run / STOP).unlink(missing_ok=True)
    return run


def bits(run: Path) -> dict[str, Any]:
    """Digests of the files of each checkpoint."""
    return {path.parent.name: json.loads(path.read_text())["files"] for path in run.glob("checkpoints/*/state.json")}


def history(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without times, speeds and memory."""
    return [
        {k: v for k, v in row.items() if k.split("/")[0] in ("step", "train", "val", "optim")}
        for row in read_metrics(run)
    ]
