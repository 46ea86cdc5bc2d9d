"""Speed of pretraining from the shards against pretraining from the bank."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import torch

from lgm_dist.bench.measure import Section, in_turn, plain, ratio
from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.labelled import ImageSampler
from lgm_dist.data.streamed import BaseImages, StreamedSplit
from lgm_dist.model import build_model
from lgm_dist.training.memory import keep_freed_memory
from lgm_dist.training.pretraining_task import Pretraining
from lgm_dist.training.step import train_step
from lgm_dist.training.worker import Worker

HEADER = ("what", "bank (images/s)", "stream (images/s)", "stream to bank")


def stream(bank: ImageBank, split: StreamedSplit, rounds: int, threads: int = 2, steps: int = 40) -> Section:
    """Time an epoch of batches alone, and training steps, with the images of a bank and with the same ones streamed."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    config = Config.of(
        stages=("pretraining",),
        **{"pretraining.augmentations": ("flip_shift",), "model.generator": "none", "model.head": "class_means"},
        **{"model.channels": bank.channels, "model.base_outputs": 4 * len(bank.classes)},
    )
    epoch = math.ceil(len(bank.images) / config.pretraining.batch)
    found = in_turn(
        {
            "batches alone, bank": _batches(bank, config, epoch),
            "batches alone, stream": _batches(split, config, epoch),
            "in training, bank": _training(bank, config, steps),
            "in training, stream": _training(split, config, steps),
        },
        rounds,
    )
    rows = []
    for what in ("batches alone", "in training"):
        ours, theirs = found[f"{what}, stream"], found[f"{what}, bank"]
        rows.append((what, theirs.text(0), ours.text(0), ratio(ours, theirs).text(2)))
    note = (
        f"{bank.name}, batches of {config.pretraining.batch} images in 4 rotations, augmented, each counted once; conv4 with "
        f"{config.model.filters} filters in float32, {threads} threads; median [smallest, largest] of {rounds} rounds of "
        f"{epoch} batches and {steps} steps in turn."
    )
    return Section("stream", "lgm-dist bench stream", HEADER, rows, note, {"images/s": plain(found)})


def _batches(base: BaseImages, config: Config, count: int) -> Callable[[], float]:
    sampler, starts = ImageSampler(base, config), itertools.count(0, config.pretraining.batch)
    return _rate(lambda: sampler(next(starts), config.pretraining.batch), count, config)


def _training(base: BaseImages, config: Config, count: int) -> Callable[[], float]:
    task, model = Pretraining(config, {"train": base}, Worker()), build_model(config.model, 0)
    optimizer, module, steps = task.optimizer(model), task.module(model).train(), itertools.count()

    def step() -> object:
        at = next(steps)
        return train_step(task, module, optimizer, task.batch(at), at, 1.0)

    return _rate(step, count, config)


def _rate(work: Callable[[], object], count: int, config: Config) -> Callable[[], float]:
    """Images/s of `count` batches."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        return count * config.pretraining.batch / (time.perf_counter() - start)

    return run
