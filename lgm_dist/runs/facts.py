"""facts.json: on what a run trains, and with which code and data. result.json: what came out."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lgm_dist.config import Config
from lgm_dist.console import notify
from lgm_dist.data.manifest import read_manifest
from lgm_dist.runs import checkpoint
from lgm_dist.runs.files import read_json, write_json
from lgm_dist.runs.folder import FACTS, RESULT, read_result
from lgm_dist.runs.job import Job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.training.evaluation import Evaluation
from lgm_dist.training.tasks import total_steps, trained_on
from lgm_dist.training.worker import Worker


def write_facts(job: Job, worker: Worker, step: int = 0) -> None:
    """Write facts.json; W&B shows it beside the configuration. Say so if the number of workers changes at `step`."""
    path = Path(job.run) / FACTS
    before = read_json(path) if path.exists() else {}
    if before.get("world_size", worker.world_size) != worker.world_size:
        notify(f"world size {before['world_size']} -> {worker.world_size} from step {step + 1} on")
    facts = {
        "commit": commit(),
        "manifest": job.manifest,
        "manifest_digest": read_manifest(job.manifest).digest,
        "world_size": worker.world_size,
        "threads": job.threads,
        "device": torch.cuda.get_device_name() if worker.device.startswith("cuda") else "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(path, facts)


def commit() -> str:
    """The git commit of this code, with -dirty if tracked files have changed; outside a checkout LGM_DIST_COMMIT."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LGM_DIST_COMMIT", "")


def write_result(run: Path, config: Config, test: Evaluation | None, memory: list[float]) -> None:
    """Write result.json: figures of the finished run and of its checkpoint that was best on val.

    `memory` is the peak memory of each worker in bytes.
    """
    best = checkpoint.read_state(checkpoint.best(run))
    result: dict[str, Any] = {
        "protocol": config.episodes.protocol,
        "ways": config.episode("val").ways,
        "shot": config.episode("val").shot,
        "val/accuracy": best.val_accuracy,
        "val/ci95": best.val_ci95,
        "step": best.step,
        "train/steps": total_steps(config),
        "train/episodes": trained_on(config, total_steps(config)).get("episodes", 0),
        "train/seconds": max(row["seconds"] for row in read_metrics(run)),
        "memory/peak_bytes": max(memory),
    }
    if test:
        result |= {"test/accuracy": test.score.accuracy, "test/ci95": test.score.ci95, "test/episodes": test.episodes}
    write_json(run / RESULT, result)


def is_finished(run: Path, config: Config) -> bool:
    """Return True if the run has taken all steps of `config` and has the result of all its test episodes."""
    try:
        result = read_result(run)
    except ValueError:
        return False
    done = result.get("train/steps"), result.get("test/episodes", 0)
    return done == (total_steps(config), config.episodes.test_episodes)
