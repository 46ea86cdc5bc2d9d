"""Batches of episodes that the worker's device draws itself, many steps at a time, with nothing that waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data import EpisodeBatch, ImageBank
from lgm_dist.data.episodes import Drawn, EpisodeSampler
from lgm_dist.training.worker import Slice, Worker

AHEAD = 32
"""Steps whose episodes are drawn at once. On a GPU drawing takes as long for one step as for many."""


@dataclass(frozen=True)
class DeviceBatch:
    """The episodes of the step that `DeviceBatches` was last asked for. Its tensors keep their place in memory."""

    sampler: EpisodeSampler
    drawn: Drawn
    """The episodes of a block of AHEAD steps, one step after the other."""
    place: Tensor
    """(), int64: the step within the block."""

    def make(self) -> EpisodeBatch:
        """Make the images of the step."""
        return self.sampler.make(self.drawn.map(self._of_step))

    def _of_step(self, x: Tensor) -> Tensor:
        """x (AHEAD * B, ...) of the block -> (B, ...) of the step."""
        of_step: Tensor = x.unflatten(0, (AHEAD, -1)).index_select(0, self.place)[0]
        return of_step


class DeviceBatches:
    """This worker's slice of the episodes of a step, by the step's number. The bits do not depend on where training began."""

    def __init__(self, bank: ImageBank, config: Config, worker: Worker, of_first: Slice) -> None:
        self._sampler, self._config, self._slice = (
            EpisodeSampler(bank, config, worker.device, resident=True),
            config,
            of_first,
        )
        self._block = torch.zeros((), dtype=torch.int64, device=self._sampler.device)
        self._in_memory = 0  # number of the block that is drawn
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch = DeviceBatch(self._sampler, self._draw(), torch.zeros_like(self._block))

    def __call__(self, step: int) -> DeviceBatch:
        block, place = divmod(step, AHEAD)
        self._batch.place.fill_(place)
        if block != self._in_memory:
            self._block.fill_(block)
            self._redraw()
            self._in_memory = block
        return self._batch

    def capture(self) -> None:
        """Draw blocks with a CUDA graph from now on."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries take their workspace before the capture
            self._draw()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = self._draw()
        graph.replay()
        self._graph, self._batch = graph, DeviceBatch(self._sampler, drawn, self._batch.place)

    def _redraw(self) -> None:
        if self._graph:
            self._graph.replay()
        else:
            self._batch = DeviceBatch(self._sampler, self._draw(), self._batch.place)

    def _draw(self) -> Drawn:
        """This worker's slices of the steps of the block, one after the other."""
        steps = self._block * AHEAD + torch.arange(AHEAD, device=self._block.device)  # (AHEAD,)
        slices = torch.arange(self._slice.size, device=self._block.device) + self._slice.first  # (B,)
        return self._sampler.draw((steps[:, None] * self._config.episodes.meta_batch + slices).flatten())
