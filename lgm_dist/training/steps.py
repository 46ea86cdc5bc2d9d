"""The training steps of one worker: their episodes made by numpy on the host, or on its GPU, there as two CUDA graphs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from lgm_dist.config import Config
from lgm_dist.data import EpisodeBatch, ImageBank, sample_episodes
from lgm_dist.data.episodes import Drawn, EpisodeSampler
from lgm_dist.model import LGMNet
from lgm_dist.training.engine import Worker, apply, gradients, train_step

AHEAD = 32
"""Steps whose episodes are drawn at once on a GPU, where drawing takes as long for one step as for many."""


class Steps(Protocol):
    """Step i (from 0) of the optimizer, on this worker's slice of episodes i * meta_batch and after."""

    def __call__(self, step: int) -> Tensor:
        """Takes step `step`; returns what `train_step` does, (3,), without waiting for a GPU."""

    def batch(self, step: int) -> EpisodeBatch:
        """The slice that step `step` is taken on, on the worker's device."""


def make_steps(
    model: LGMNet,
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    bank: ImageBank,
    config: Config,
    worker: Worker,
) -> Steps:
    """The fastest steps for this worker. `parallel` is `model` in training mode, or the wrapped one; the state is restored."""
    if not worker.device.startswith("cuda"):
        return HostSteps(parallel, optimizer, bank, config, worker)
    sampler = EpisodeSampler(bank, config, worker.device)
    return DeviceSteps(model, parallel, optimizer, sampler, worker, graph=worker.world_size == 1)


def _slice(worker: Worker, config: Config, step: int) -> tuple[int, int, float]:
    """This worker's first episode of a step, how many there are, and the weight that `train_step` is to give them."""
    first, count = worker.slice_of(step * config.episodes.meta_batch, config.episodes.meta_batch)
    # 1 unless elastic workers have slices of unequal size
    return first, count, count * worker.world_size / config.episodes.meta_batch


class HostSteps:
    """See `Steps`; on any device."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, bank: ImageBank, config: Config, worker: Worker
    ) -> None:
        self._model, self._optimizer, self._bank, self._config, self._worker = model, optimizer, bank, config, worker

    def __call__(self, step: int) -> Tensor:
        weight = _slice(self._worker, self._config, step)[2]
        return train_step(self._model, self._optimizer, self.batch(step), self._config, step, weight)

    def batch(self, step: int) -> EpisodeBatch:
        first, count, _ = _slice(self._worker, self._config, step)
        return sample_episodes(self._bank, self._config, "train", first, count).to(self._worker.device)


class DeviceSteps:
    """See `Steps`; the sampler's device makes the episodes, AHEAD steps of them at a time, and nothing waits for the host.

    With `graph` (CUDA alone, one worker) drawing is one CUDA graph, and images, forward and backward pass another; the
    optimizer, whose rates change, stays outside. A step's bits do not depend on where the steps began.
    """

    def __init__(
        self,
        model: LGMNet,
        parallel: nn.Module,
        optimizer: torch.optim.Optimizer,
        sampler: EpisodeSampler,
        worker: Worker,
        *,
        graph: bool,
    ) -> None:
        self._model, self._optimizer, self._sampler, self._config = parallel, optimizer, sampler, sampler.config
        self._first, self._count, self._weight = _slice(worker, self._config, 0)
        self._block = torch.zeros(
            (), dtype=torch.int64, device=sampler.device
        )  # the block of AHEAD steps that is drawn
        self._place = torch.zeros_like(self._block)  # the step within it
        self._drawn_block, self._drawn = 0, self._draw()
        self._graphs = self._capture(model) if graph else None

    def __call__(self, step: int) -> Tensor:
        self._seek(step)
        if self._graphs:
            self._graphs[1].replay()  # writes the gradients anew
            figures = self._figures.clone()
        else:
            self._optimizer.zero_grad()
            figures = self._gradients()
        apply(self._optimizer, self._config, step, figures)
        return figures

    def batch(self, step: int) -> EpisodeBatch:
        self._seek(step)
        return self._made()

    def _seek(self, step: int) -> None:
        """Makes `step` the one that is to be taken."""
        block, place = divmod(step, AHEAD)
        self._place.fill_(place)
        if block != self._drawn_block:
            self._block.fill_(block)
            if self._graphs:
                self._graphs[0].replay()
            else:
                self._drawn = self._draw()
            self._drawn_block = block

    def _draw(self) -> Drawn:
        """This worker's slices of the block's steps, one after the other."""
        steps = self._block * AHEAD + torch.arange(AHEAD, device=self._block.device)  # (AHEAD,)
        slices = torch.arange(self._count, device=self._block.device) + self._first  # (B,)
        return self._sampler.draw((steps[:, None] * self._config.episodes.meta_batch + slices).flatten())

    def _made(self) -> EpisodeBatch:
        steps = self._drawn.map(lambda x: x.unflatten(0, (AHEAD, self._count)))
        return self._sampler.make(steps.map(lambda x: x.index_select(0, self._place)[0]))

    def _gradients(self) -> Tensor:
        return gradients(self._model, self._made(), self._config, self._weight)

    def _capture(self, model: LGMNet) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        """The graphs that draw a block and that take a step but for its optimizer."""
        averages = {name: buffer.clone() for name, buffer in model.named_buffers()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels and take their workspace before the capture
                self._optimizer.zero_grad()
                self._draw()
                self._gradients()
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad()  # so that the gradients lie in the graph's own memory
        draw, step = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(draw):
            self._drawn = self._draw()
        draw.replay()
        with torch.cuda.graph(step):
            self._figures = self._gradients()
        for name, buffer in model.named_buffers():
            buffer.copy_(averages[name])
        return draw, step
