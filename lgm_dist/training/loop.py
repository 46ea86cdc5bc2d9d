"""The training loop of one worker: the same with and without Ray, for every task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lgm_dist.config import Config
from lgm_dist.errors import RunFailed
from lgm_dist.model import LGMNet, build_model
from lgm_dist.training import diagnosis
from lgm_dist.training.evaluation import Evaluation
from lgm_dist.training.memory import peak_memory
from lgm_dist.training.step import make_step
from lgm_dist.training.tasks import Banks, Stage, make_stages, total_steps
from lgm_dist.training.worker import Worker

__all__ = ["NotFinite", "Record", "Report", "build_network", "total_steps", "train", "train_stage"]

Optimizer = torch.optim.Optimizer
OptimizerAt = Callable[[int], Optimizer | None]
"""The optimizer of the stage inside which a step lies; None between two stages."""
Report = Callable[[int, dict[str, float], Path | None], None]
"""Hears of an evaluation after so many steps and, on rank 0, of its checkpoint's folder."""


class Record(Protocol):
    """What the loop asks of the run's folder. Only rank 0 writes. `lgm_dist.runs.record` keeps it."""

    def restore(self, model: LGMNet, optimizer_at: OptimizerAt) -> tuple[int, Optimizer | None]:
        """Load the newest checkpoint; return the steps done and the optimizer, None at the start of a stage."""

    def log(self, step: int, metrics: dict[str, float], late: bool) -> None:
        """Write a row of metrics; a late one at the next `flush`."""

    def flush(self) -> None:
        """Write the late row."""

    def stop_requested(self) -> bool:
        """Return True if the run was asked to stop after this step."""

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, val: Evaluation | None) -> Path | None:
        """Write a checkpoint; return its folder on rank 0."""

    def load_network(self, folder: str) -> LGMNet:
        """The network of another run, in evaluation mode. Raises ValueError if there is none."""

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints."""

    def load_best(self, model: LGMNet) -> None:
        """Load the weights that were best on val."""

    def finish(self, test: Evaluation | None, memory: list[float]) -> None:
        """Write the result of the finished run."""


def train(config: Config, banks: Banks, worker: Worker, record: Record, report: Report | None = None) -> None:
    """Train all stages of a run, from its newest checkpoint on, and evaluate its best checkpoint on test."""
    model = build_network(config, worker)
    stages = make_stages(config, banks, worker)

    def optimizer_at(step: int) -> Optimizer | None:
        inside = (stage for stage in stages if stage.first < step < stage.last)
        return next((stage.task.optimizer(model) for stage in inside), None)

    done, optimizer = record.restore(model, optimizer_at)
    for stage in stages:
        if done < stage.last:
            done = train_stage(stage, model, optimizer, record, done, report)
            optimizer = None
            if done < stage.last:
                return  # the run was asked to stop
    worker.heartbeat()
    test = None
    if config.episodes.test_episodes:
        record.load_best(model)
        test = stages[-1].task.evaluate(model, "test")
    record.finish(test, worker.gather(_peak_memory(worker)))


def train_stage(
    stage: Stage, model: LGMNet, restored: Optimizer | None, record: Record, done: int, report: Report | None
) -> int:
    """Train a stage, of whose run `done` steps are done. Returns the steps done: fewer than `stage.last` after a stop.

    `restored` is the optimizer of a checkpoint inside the stage; None at its start.
    """
    task, worker = stage.task, stage.task.worker
    task.begin(record.load_network)
    optimizer = restored or task.optimizer(model)
    if restored:
        task.exchange(optimizer)  # a checkpoint holds the evaluated weights in the place of the trained ones
    model.train().zero_grad()
    module = task.module(model)
    parallel = worker.data_parallel(module).train()
    take_step = make_step(task, module, parallel, optimizer, done - stage.first)
    for step in range(done - stage.first, task.steps):
        worker.heartbeat()
        start = time.monotonic()
        batch = task.batch(step)
        figures = take_step(batch, step)  # (3,)
        record.flush()  # the row of the step before, while a GPU takes this one
        asked = torch.tensor([float(record.stop_requested())], device=worker.device)
        loss, accuracy, grad_norm, stop = worker.mean(torch.cat([figures, asked])).tolist()
        if not math.isfinite(loss + grad_norm):
            raise NotFinite(diagnosis.explain(stage, model, batch, step), record.checkpoints())
        metrics = {"train/loss": loss, "train/accuracy": accuracy, "optim/grad_norm": grad_norm}
        metrics["optim/lr"] = optimizer.param_groups[0]["lr"]
        metrics[f"speed/{task.unit}_per_s"] = task.items_per_step / (time.monotonic() - start)
        metrics["memory/peak_bytes"] = _peak_memory(worker)
        done, val = stage.first + step + 1, None
        due = (step + 1) % task.eval_every == 0 or done == stage.last
        keep = bool(stop) or due
        if keep:
            task.exchange(optimizer)
        if due:
            worker.heartbeat()
            val = task.evaluate(model, "val")
            metrics |= {"val/accuracy": val.score.accuracy, "val/ci95": val.score.ci95} if val else {}
        # before the checkpoint: a resumed run drops rows that will come again, but brings no lost one back
        record.log(done, metrics, late=not keep and worker.device != "cpu")
        if keep:
            folder = record.save(done, model, optimizer, val)
            if done < stage.last:  # the next stage goes on from the weights that are kept
                task.exchange(optimizer)
            if report:
                report(done, metrics, folder)
        if stop:
            break
    return done


class NotFinite(RunFailed):
    """The loss or its gradient is not finite; the weights are those of the last finite step."""

    def __init__(self, what: str, checkpoints: list[str]) -> None:
        where = f"the checkpoints {', '.join(checkpoints)} are kept" if checkpoints else "there is no checkpoint yet"
        super().__init__(f"{what}; {where}; another --name can train with a lower --lr")


def build_network(config: Config, worker: Worker) -> LGMNet:
    """The network with the initial weights of the run's seed; its normalisation spans the workers."""
    model = build_model(config.model, config.run.seed)
    model.reduce_over(worker.all_reduce)
    return model.to(worker.device)


def _peak_memory(worker: Worker) -> float:
    """Most bytes that this worker has had in memory so far: on the GPU if it trains on one."""
    if not worker.device.startswith("cuda"):
        return float(peak_memory())
    # many times faster than max_memory_allocated(), which a GPU would wait for at every step
    return float(torch.cuda.memory_stats_as_nested_dict()["allocated_bytes"]["all"]["peak"])
