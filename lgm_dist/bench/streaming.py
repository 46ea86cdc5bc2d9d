"""Speed of pretraining from the shards against pretraining from the bank."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import torch

from lgm_dist.bench.measure import Section, Spread, in_turn, plain, ratio
from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.labelled import ImageSampler
from lgm_dist.data.streamed import BaseImages, StreamedSplit
from lgm_dist.model import build_model
from lgm_dist.training.memory import keep_freed_memory
from lgm_dist.training.pretraining_task import Pretraining
from lgm_dist.training.step import train_step
from lgm_dist.training.worker import Worker

HEADER = (
    "what",
    "bank (images/s)",
    "stream (images/s)",
    "stream to bank",
    "CPU time of an image: bank (µs)",
    "stream (µs)",
)


def stream(bank: ImageBank, split: StreamedSplit, rounds: int, threads: int = 2, steps: int = 20) -> Section:
    """Time an epoch of batches alone, and training steps, with the images of a bank and with the same ones streamed."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    config = Config.of(
        stages=("pretraining",),
        **{"pretraining.augmentations": ("flip_shift",), "model.generator": "none", "model.head": "class_means"},
        **{"model.channels": bank.channels, "model.base_outputs": 4 * len(bank.classes)},
    )
    epoch = math.ceil(len(bank.images) / config.pretraining.batch)
    contenders = {
        "batches alone, bank": _Timed(_batches(bank, config), epoch, config),
        "batches alone, stream": _Timed(_batches(split, config), epoch, config),
        "in training, bank": _Timed(_training(bank, config), steps, config),
        "in training, stream": _Timed(_training(split, config), steps, config),
    }
    found = in_turn(contenders, rounds)
    cpu = {name: Spread(tuple(contender.cpu[-rounds:])) for name, contender in contenders.items()}
    rows = []
    for what in ("batches alone", "in training"):
        ours, theirs = f"{what}, stream", f"{what}, bank"
        rate = found[theirs].text(0), found[ours].text(0), ratio(found[ours], found[theirs]).text(2)
        rows.append((what, *rate, cpu[theirs].text(0), cpu[ours].text(0)))
    note = (
        f"{bank.name}, batches of {config.pretraining.batch} images in 4 rotations, augmented, each counted once; conv4 with "
        f"{config.model.filters} filters in float32, {threads} threads; median [smallest, largest] of {rounds} rounds of "
        f"{epoch} batches and {steps} steps in turn."
    )
    return Section(
        "stream", "lgm-dist bench stream", HEADER, rows, note, {"images/s": plain(found), "CPU µs": plain(cpu)}
    )


def _batches(base: BaseImages, config: Config) -> Callable[[], object]:
    sampler, starts = ImageSampler(base, config), itertools.count(0, config.pretraining.batch)
    return lambda: sampler(next(starts), config.pretraining.batch)


def _training(base: BaseImages, config: Config) -> Callable[[], object]:
    task, model = Pretraining(config, {"train": base}, Worker()), build_model(config.model, 0)
    optimizer, module, steps = task.optimizer(model), task.module(model).train(), itertools.count()

    def step() -> object:
        at = next(steps)
        return train_step(task, module, optimizer, task.batch(at), at)

    return step


class _Timed:
    """Images/s of `count` batches; `cpu` has the microseconds of CPU time of an image, over all threads, of each call."""

    def __init__(self, work: Callable[[], object], count: int, config: Config) -> None:
        self._work, self._count, self._images = work, count, count * config.pretraining.batch
        self.cpu: list[float] = []

    def __call__(self) -> float:
        start, used = time.perf_counter(), time.process_time()
        for _ in range(self._count):
            self._work()
        self.cpu.append((time.process_time() - used) / self._images * 1e6)
        return self._images / (time.perf_counter() - start)
