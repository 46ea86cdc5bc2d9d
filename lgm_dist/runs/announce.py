"""What a run is about to train, on what and with which images, in three lines."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lgm_dist.config import Config
from lgm_dist.data.manifest import read_manifest
from lgm_dist.extras import installed
from lgm_dist.runs.checkpoint_files import step_of
from lgm_dist.runs.job import Job, device_of
from lgm_dist.training.tasks import make_stages
from lgm_dist.training.worker import Worker


def describe(job: Job) -> list[str]:
    """The stages and steps; the device, workers and threads; the data set. A fourth line says if W&B is not installed."""
    config = Config.from_dict(job.config)
    stages = make_stages(config, {}, Worker())
    steps = [step_of(folder) or 0 for folder in Path(job.run).glob("checkpoints/step-*")]
    resumed = f", resumed after step {max(steps):,}" if steps else ""
    return [
        f"{config.run_name}: {', then '.join(f'stage {stage.name}, {stage.task.describe()}' for stage in stages)}{resumed}",
        _machine(job, config),
        *_data(job, config),
        *_tracking(config),
    ]


def _machine(job: Job, config: Config) -> str:
    low, high = config.run.workers, config.run.max_workers
    device = "CPU" if device_of(config) == "cpu" else "GPU"
    threads = f"{job.threads} thread{'s' if job.threads > 1 else ''}"
    if not low:
        return f"on the {device}, in this process with {threads}"
    where = (
        f"on the cluster at {os.environ['RAY_ADDRESS']}"
        if os.environ.get("RAY_ADDRESS", "local") != "local"
        else "here"
    )
    count = f"{low} to {high}" if high else str(low)
    workers = "worker" if max(low, high) == 1 else "workers"
    return f"on the {device}, {where}: {count} Ray Train {workers} with {threads} each"


def _data(job: Job, config: Config) -> list[str]:
    manifest = read_manifest(job.manifest)
    train, val, test = (manifest.splits[split] for split in ("train", "val", "test"))
    size = " x ".join(map(str, (manifest.shape[1], manifest.shape[0], manifest.shape[2])))
    novel = f"{len(val.classes):,} classes for val, {len(test.classes):,} for test"
    gigabytes = train.images * math.prod(manifest.shape) / 1e9
    return [
        f"data set {manifest.name}: {len(train.classes):,} base classes with {train.images:,} images of {size}; {novel}",
        f"the base classes, {gigabytes:.3g} GB decoded, are streamed from {len(train.shards):,} shards",
    ][: 1 + (config.data.stream == "always")]


def _tracking(config: Config) -> list[str]:
    wanted = config.run.wandb == "auto" and os.environ.get("WANDB_MODE") != "disabled"
    if not wanted or installed("wandb"):
        return []
    return ["wandb is not installed, so nothing is sent to W&B; install lgm-dist[wandb], or give --wandb disabled"]
