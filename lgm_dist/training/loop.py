"""The training loop of one worker: the same with and without Ray."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lgm_dist.cluster.collectives import data_parallel
from lgm_dist.config import SPLITS, Config
from lgm_dist.console import RunFailed
from lgm_dist.data import open_bank
from lgm_dist.model import LGMNet
from lgm_dist.model import build_model as build_network
from lgm_dist.runs import checkpoint
from lgm_dist.runs.job import Job, persist, write_facts, write_result
from lgm_dist.runs.metrics import MetricsLog
from lgm_dist.training import diagnosis
from lgm_dist.training.engine import Worker, evaluate, make_optimizer
from lgm_dist.training.memory import peak_memory
from lgm_dist.training.steps import make_steps

STOP = "stop"
"""A file of this name in a run's folder asks its workers to end after their step, with a checkpoint."""

Report = Callable[[int, dict[str, float], Path | None], None]
"""Hears of an evaluation after so many steps and, on rank 0, of its checkpoint's folder."""


def train_fn(job: Job, worker: Worker, report: Report | None = None) -> None:
    """The training of one worker, top to bottom."""
    config, run = Config.from_dict(job.config), Path(job.run)
    banks = {split: open_bank(job.manifest, split, job.cache) for split in SPLITS}
    model = build_model(config, worker)
    parallel = data_parallel(model, worker)
    optimizer = make_optimizer(model, config)
    state = checkpoint.restore(run, model, optimizer)
    take_step = make_steps(model, parallel.train(), optimizer, banks["train"], config, worker)
    written: Callable[..., Any] = partial(persist, run, config.storage_seconds)
    log = written(MetricsLog, run, state.step) if worker.rank == 0 else None
    if log:
        written(write_facts, job, worker, state.step)

    row: tuple[int, dict[str, float]] | None = None
    for step in range(state.step, config.steps):
        _not_hung(config)
        start = time.monotonic()
        figures = take_step(step)
        if log and row:  # that of the step before, while a GPU takes this one; its `seconds` are those of now
            written(log.write, *row)
        asked = torch.tensor([float(worker.rank == 0 and (run / STOP).exists())], device=worker.device)
        loss, accuracy, grad_norm, stop = worker.mean(torch.cat([figures, asked])).tolist()
        if not math.isfinite(loss + grad_norm):
            raise NotFinite(diagnosis.explain(model, take_step.batch(step), config, step, worker), run)
        metrics = {"train/loss": loss, "train/accuracy": accuracy, "optim/grad_norm": grad_norm}
        metrics["optim/lr"] = optimizer.param_groups[0]["lr"]
        metrics["speed/episodes_per_s"] = config.meta_batch / (time.monotonic() - start)
        metrics["memory/peak_bytes"] = _peak_memory(worker)
        done, val = step + 1, None
        if done % config.eval_every == 0 or done == config.steps:
            _not_hung(config)
            val = evaluate(model, banks["val"], config.evaluation, "val", config.eval_episodes, worker=worker)
            metrics |= {"val/accuracy": val.score.accuracy, "val/ci95": val.score.ci95}
        row = (done, metrics)
        if log and (val or stop or worker.device == "cpu"):
            # before the checkpoint: a resumed run drops rows that will come again, but brings no lost one back
            written(log.write, *row)
            row = None
        if val or stop:
            folder = None
            if worker.rank == 0:
                kept = checkpoint.TrainState.after(done, val)
                folder = written(checkpoint.save, run, kept, model, optimizer, config, val, banks["train"].digest)
            if report:
                report(done, metrics, folder)
        if stop and done < config.steps:
            return

    _not_hung(config)
    test = None
    if config.test_episodes:
        model.load_state_dict(checkpoint.load_model(checkpoint.best(run))[0].state_dict())
        test = evaluate(model, banks["test"], config.evaluation, "test", config.test_episodes, worker=worker)
    memory = worker.gather(_peak_memory(worker))
    if log:
        log.close()
        written(write_result, run, config, test, memory)


class NotFinite(RunFailed):
    """The loss or its gradient is infinite or no number; the weights are those of the last finite step."""

    def __init__(self, what: str, run: Path) -> None:
        kept = [folder.name for folder in checkpoint.states_of(run)]
        where = f"the checkpoints {', '.join(kept)} are kept" if kept else "there is no checkpoint yet"
        super().__init__(f"{what}; {where}; another --name can train with a lower --lr")


def _not_hung(config: Config) -> None:
    """A Ray Train worker that is not here again within config.hang_seconds shows where it is and ends, to be replaced."""
    if config.workers and config.hang_seconds:
        faulthandler.dump_traceback_later(config.hang_seconds, exit=True, file=2)


def build_model(config: Config, worker: Worker) -> LGMNet:
    """The network with the initial weights of config.seed, its normalisation tied to the other workers."""
    model = build_network(config.model, config.seed)
    model.reduce_over(worker.all_reduce)
    return model.to(worker.device)


def _peak_memory(worker: Worker) -> float:
    """Most bytes that this worker has had in memory so far: on the GPU where it trains on one."""
    if not worker.device.startswith("cuda"):
        return float(peak_memory())
    # many times faster than max_memory_allocated(), which a GPU would wait for at every step
    return float(torch.cuda.memory_stats_as_nested_dict()["allocated_bytes"]["all"]["peak"])


@contextmanager
def stop_on_signals(run: Path) -> Iterator[Callable[[], None]]:
    """SIGTERM (`ray job stop`) and the first Ctrl-C end the run after its step with a checkpoint; a second Ctrl-C, at once.

    What it gives makes it so again where somebody, such as Ray, has set handlers meanwhile.
    """

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and (run / STOP).exists():
            raise KeyboardInterrupt
        try:
            (run / STOP).touch()
        except OSError:  # a storage that is away
            threading.Thread(target=_until_written, args=(run / STOP,), daemon=True).start()

    def listen() -> None:
        for number in before:
            signal.signal(number, ask)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signals are its own
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _until_written(path: Path) -> None:
    while True:
        with contextlib.suppress(OSError):
            path.touch()
            return
        time.sleep(0.2)
