"""The speed of pretraining: a step of conv4 against the rate of the machine's best convolution."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from lgm_dist.bench.measure import Section, Spread, in_turn, plain
from lgm_dist.config import Config, ModelConfig
from lgm_dist.data.bank import ImageBank
from lgm_dist.training.loop import build_network
from lgm_dist.training.memory import keep_freed_memory
from lgm_dist.training.pretraining_task import Pretraining
from lgm_dist.training.step import make_step
from lgm_dist.training.worker import Worker

CLASSES, IMAGES = 60, 8
HEADER = ("precision", "images/s", "best convolution (GFLOP/s)", "share of its rate", "outside the model")


def pretraining(rounds: int, threads: int = 2) -> Section:
    """Time steps of 128 images of 32 x 32 in four rotations, in float32 and, if the CPU has it, in bf16."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    half = ["bf16"] if torch.cpu._is_avx512_bf16_supported() else []
    rows, values = [], {}
    for precision in ("float32", *half):
        steps = _Steps(precision)
        found = in_turn({"step": steps.take, "batch": steps.make, "convolution": _convolution(precision)}, rounds, 2)
        rows.append((precision, *_figures(steps, found)))
        values[precision] = plain(found)
    note = (
        f"conv4 with 64 filters, crop, flip and jitter, {threads} threads; median [smallest, largest] of {rounds} "
        f"rounds in turn. An image takes {flops() / 1e6:.1f} MFLOP forward and backward; each rotation counts as an image."
    )
    return Section("pretraining", "lgm-dist bench pretraining", HEADER, rows, note, values)


def flops(filters: int = 64) -> int:
    """FLOPs of an image of 32 x 32 x 3 in conv4, forward and backward: 2 for a multiply-add, convolutions only."""
    layers = [
        2 * 9 * inputs * filters * side**2 for inputs, side in ((3, 32), (filters, 16), (filters, 8), (filters, 4))
    ]
    return 2 * layers[0] + 3 * sum(layers[1:])  # the images need no gradient


class _Steps:
    """Steps of the task on random images."""

    def __init__(self, precision: str) -> None:
        outputs = CLASSES * 4
        model = ModelConfig(channels=3, generator="none", head="class_means", base_outputs=outputs)
        config = Config.of(stages=("pretraining",), precision=precision, model=model)
        network = build_network(config, Worker())
        self._task = Pretraining(config, {"train": _random_bank()}, Worker())
        module = self._task.module(network).train()
        self._take = make_step(self._task, module, module, self._task.optimizer(network), 0)
        self._number = 0
        self.images = self._task.items_per_step

    def make(self) -> float:
        """Make a batch; return the seconds."""
        start = time.perf_counter()
        self._batch = self._task.batch(self._number)
        return time.perf_counter() - start

    def take(self) -> float:
        """Take a step, without making its batch; return the seconds."""
        self.make()
        start = time.perf_counter()
        self._take(self._batch, self._number)
        self._number += 1
        return time.perf_counter() - start


def _random_bank() -> ImageBank:
    images = np.random.default_rng(0).integers(0, 256, (CLASSES * IMAGES, 32, 32, 3), np.uint8)
    offsets, names = np.arange(CLASSES + 1) * IMAGES, tuple(map(str, range(CLASSES)))
    return ImageBank("random", "train", images, offsets, names, ("",) * CLASSES, (128.0,) * 3, (64.0,) * 3, "")


def _convolution(precision: str) -> Callable[[], float]:
    """Seconds of the forward and backward pass of the largest convolution of the step, without anything around it."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x, grad = (torch.randn(512, 64, 16, 16, dtype=kind).contiguous(memory_format=torch.channels_last) for _ in range(2))
    kernel = torch.randn(64, 64, 3, 3, dtype=kind).contiguous(memory_format=torch.channels_last).requires_grad_()
    x.requires_grad_()

    def run() -> float:
        start = time.perf_counter()
        torch.autograd.grad(F.conv2d(x, kernel, padding=1), [x, kernel], grad)
        return time.perf_counter() - start

    return run


def _figures(steps: _Steps, found: dict[str, Spread]) -> tuple[str, ...]:
    work = 3 * 2 * 9 * 64 * 64 * 16 * 16 * 512
    every = zip(*(found[name].values for name in ("step", "batch", "convolution")), strict=True)
    speed, rate, share, outside = [], [], [], []
    for step, batch, convolution in every:
        speed.append(steps.images / (step + batch))
        rate.append(work / convolution / 1e9)
        share.append(100 * speed[-1] * flops() / 1e9 / rate[-1])
        outside.append(100 * batch / (step + batch))
    texts = [Spread(tuple(v)).text(d) for v, d in ((speed, 0), (rate, 0), (share, 0), (outside, 1))]
    return texts[0], texts[1], f"{texts[2]} %", f"{texts[3]} %"
