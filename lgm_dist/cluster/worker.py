"""What runs in each Ray Train worker: it joins the other workers and trains."""

from __future__ import annotations

import faulthandler
import logging
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from lgm_dist.cluster.collectives import make_worker
from lgm_dist.cluster.rendezvous import join_process_group
from lgm_dist.config import Config
from lgm_dist.runs.job import Job
from lgm_dist.runs.record import train_fn
from lgm_dist.training.loop import NotFinite
from lgm_dist.training.memory import keep_freed_memory

_NO_TIMEOUT_S = 10**6


def run_worker(job_values: dict[str, Any]) -> str | None:
    """Train the job as one of its workers. Return why the run has failed, or None if it has not.

    An exception makes Ray Train start the workers again, so a failure that would only repeat itself is returned instead.
    """
    logging.disable(logging.INFO)  # Ray Train logs a line for each report of each worker
    job, context = Job(**job_values), ray.train.get_context()
    keep_freed_memory()
    torch.set_num_threads(job.threads)  # Ray starts workers with OMP_NUM_THREADS=1
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device, hang_seconds = str(ray.train.torch.get_device()), Config.from_dict(job.config).run.hang_seconds
    if world_size > 1:
        join_process_group(rank, world_size, device, timeout_s=max(60, hang_seconds or _NO_TIMEOUT_S))
    try:
        train_fn(job, make_worker(rank, world_size, device, partial(_heartbeat, hang_seconds)), _report)
    except NotFinite as error:
        return str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def _heartbeat(hang_seconds: int) -> None:
    """End this process, after showing where it is, unless this is called again within `hang_seconds` (0: no limit)."""
    if hang_seconds:
        faulthandler.dump_traceback_later(hang_seconds, exit=True, file=2)


def _report(_: int, metrics: dict[str, float], folder: Path | None) -> None:
    """Report an evaluation to Ray Train and, on rank 0, the checkpoint, which is in the run's folder already."""
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )
