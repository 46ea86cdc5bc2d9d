"""This process's place among the workers of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lgm_dist.model import AllReduce


class Slice(NamedTuple):
    """A worker's part of a range."""

    first: int
    size: int
    weight: float
    """Factor on the slice's mean loss, so that the mean over the workers is the mean over the range. It is 1 unless elastic
    workers have slices of unequal size."""


def _same(model: nn.Module) -> nn.Module:
    return model


def _nothing() -> None:
    """No heartbeat."""


@dataclass(frozen=True)
class Worker:
    """This process among the workers of a run. The default is a run of one process."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    all_reduce: AllReduce | None = None
    """Sums a tensor over the workers in place; None if there is one worker."""
    data_parallel: Callable[[nn.Module], nn.Module] = _same
    """Wraps the network so that its gradients are averaged over the workers."""
    heartbeat: Callable[[], None] = _nothing
    """Called before each step and evaluation; a worker that does not call it for too long may be replaced."""

    def slice_of(self, start: int, count: int) -> Slice:
        """This worker's consecutive part of the range [start, start + count)."""
        first = self.rank * count // self.world_size
        last = (self.rank + 1) * count // self.world_size
        return Slice(start + first, last - first, (last - first) * self.world_size / max(count, 1))

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over the workers, in place."""
        if self.all_reduce is not None:
            self.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """`x` averaged over the workers."""
        return self.sum(x) / self.world_size

    def gather(self, value: float) -> list[float]:
        """Every worker's `value`, by rank."""
        values = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        return self.sum(values).tolist()
