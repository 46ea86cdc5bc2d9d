"""What the training loop reads from and writes into the run's folder. Rank 0 writes, and retries while the storage fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgm_dist.config import Config
from lgm_dist.data import open_bank
from lgm_dist.data.streamed import BaseImages, open_base
from lgm_dist.model import LGMNet
from lgm_dist.plugins import load_plugins
from lgm_dist.runs import checkpoint
from lgm_dist.runs.facts import write_facts, write_result
from lgm_dist.runs.folder import retry_writes
from lgm_dist.runs.job import Job
from lgm_dist.runs.load import load_run, start_from
from lgm_dist.runs.metrics import MetricsLog
from lgm_dist.runs.stop import STOP
from lgm_dist.training.evaluation import Evaluation
from lgm_dist.training.loop import Report, train
from lgm_dist.training.tasks import Banks, stage_of
from lgm_dist.training.worker import Worker


def train_fn(job: Job, worker: Worker, report: Report | None = None) -> None:
    """Train a job as one of its workers."""
    config = Config.from_dict(job.config)
    load_plugins(config)
    base = open_base(job.manifest, job.cache, config.data.stream == "always")
    banks: Banks = {"train": base, **{split: open_bank(job.manifest, split, job.cache) for split in ("val", "test")}}
    train(config, banks, worker, RunRecord(job, config, worker, base), report)


class RunRecord:
    """A run's folder as `lgm_dist.training.loop.Record`."""

    def __init__(self, job: Job, config: Config, worker: Worker, base: BaseImages) -> None:
        self._job, self._config, self._worker, self._run = job, config, worker, Path(job.run)
        self._base = base
        self._log: MetricsLog | None = None
        self._late: tuple[int, dict[str, float]] | None = None
        self._write: Callable[..., Any] = partial(retry_writes, self._run, config.run.storage_seconds)

    def restore(
        self, model: LGMNet, optimizer_at: Callable[[int], torch.optim.Optimizer | None]
    ) -> tuple[int, torch.optim.Optimizer | None]:
        """Load the newest whole checkpoint and open the metrics behind it.

        `optimizer_at` gives the optimizer of the stage that trains at a step. Returns the steps done and the optimizer.
        """
        state, optimizer = checkpoint.restore(self._run, model, optimizer_at)
        if not state.step and self._config.run.start:
            start_from(self._config.run.start, model)
        if self._worker.rank == 0:
            self._log = self._write(MetricsLog, self._run, state.step)
            self._write(write_facts, self._job, self._worker, state.step)
        return state.step, optimizer

    def log(self, step: int, metrics: dict[str, float], late: bool) -> None:
        """Write a row of metrics; a late one at the next `flush`."""
        if late:
            self._late = step, metrics
        elif self._log:
            self._write(self._log.write, step, metrics)

    def flush(self) -> None:
        """Write the late row; its `seconds` are those of now."""
        if self._log and self._late:
            self._write(self._log.write, *self._late)
        self._late = None

    def stop_requested(self) -> bool:
        """Return True on rank 0 if the run was asked to stop after this step."""
        return self._worker.rank == 0 and (self._run / STOP).exists()

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, val: Evaluation | None
    ) -> Path | None:
        """Write a checkpoint; return its folder on rank 0, None elsewhere."""
        if self._worker.rank != 0:
            return None
        state = checkpoint.TrainState.after(step, val, stage_of(self._config, step))
        images = checkpoint.ImageFacts.of(self._base, self._config)
        folder: Path = self._write(
            checkpoint.save, self._run, state, model, optimizer, self._config, val, self._base.digest, images
        )
        return folder

    def load_network(self, folder: str) -> LGMNet:
        """The network of another run, in evaluation mode. Raises ValueError if there is none."""
        return load_run(folder).model

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints."""
        return [folder.name for folder in checkpoint.states_of(self._run)]

    def load_best(self, model: LGMNet) -> None:
        """Load the weights that were best on val."""
        model.load_state_dict(checkpoint.load_model(checkpoint.best(self._run))[0].state_dict())

    def finish(self, test: Evaluation | None, memory: list[float]) -> None:
        """Write the result of the finished run."""
        if self._log:
            self._log.close()
            self._write(write_result, self._run, self._config, test, memory)
