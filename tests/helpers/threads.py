"""Workers as threads of this process that sum tensors over each other in the order of their ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lgm_dist.model import AllReduce

T = TypeVar("T")


class Threads:
    """Runs a function of (rank, all_reduce) on several threads that reduce among each other."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.slots: list[Tensor] = [torch.empty(0)] * world_size
        self.barrier = threading.Barrier(world_size, timeout=30)

    def run(self, function: Callable[[int, AllReduce], T]) -> list[T]:
        def guarded(rank: int) -> T:
            try:
                return function(rank, self._all_reduce(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(guarded, range(self.world_size)))

    def _all_reduce(self, rank: int) -> AllReduce:
        def reduce(x: Tensor) -> None:
            self.slots[rank] = x.clone()
            self.barrier.wait()
            x.copy_(sum(self.slots[1:], self.slots[0]))
            self.barrier.wait()

        return reduce
