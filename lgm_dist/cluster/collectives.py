"""Sums over the workers of a process group: where they share a host and train on its CPU, through memory that they share.

A training step has a dozen sums of a kilobyte, and each waits for the slowest worker. torch.distributed puts the waiting to
sleep, and on a CPU that costs more than the sum: waking up takes part of a millisecond, in which the others wait in turn.
Its sum of the gradients goes through the network's stack.
"""

from __future__ import annotations

import contextlib
import inspect
import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lgm_dist.model import AllReduce
from lgm_dist.training.worker import Worker

_PIECE = 512 * 1024
"""Bytes that a worker hands over at once: as many as stay in its cache until they are summed."""
_LINE, _TOKEN = 64, 16  # bytes of a cache line and of the token by which the workers know the memory
_SPIN_SECONDS, _PAUSE_SECONDS, _LOOK_SECONDS = 0.02, 0.0001, 1.0


def all_reduce(x: Tensor) -> None:
    """Sums `x` over the workers of the process group, in place."""
    torch.distributed.all_reduce(x)


def make_all_reduce(rank: int, world_size: int, device: str) -> AllReduce:
    """The fastest way for these workers to sum a tensor over all of them in place. All workers call it together."""
    if device != "cpu" or platform.machine() not in ("x86_64", "AMD64"):  # which keeps the order of one core's writes
        return all_reduce
    size = SharedMemory.size(world_size)
    place: list[tuple[str, bytes]] = [("", b"")]
    own = _create(size) if rank == 0 else None
    if own is not None:
        place = [(f"/proc/{os.getpid()}/fd/{own}", secrets.token_bytes(_TOKEN))]
        os.pwrite(own, place[0][1], 0)
    torch.distributed.broadcast_object_list(place)
    memory = _open(*place[0], size)
    found = torch.tensor([float(memory is not None)])  # (1,)
    all_reduce(found)  # after which nobody needs the descriptor
    if own is not None:
        os.close(own)
    if memory is None or float(found) < world_size:
        return all_reduce
    return SharedMemory(memory, rank, world_size)


class SharedMemory:
    """Sums tensors of a process group's workers, all on one host, in the order of the ranks.

    Raises RuntimeError where a worker that is waited for has ended.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int) -> None:
        self._rank, self._ranks, self._calls = rank, range(world_size), 0
        head = memoryview(memory)[: self._head(world_size)].cast("q")
        # a cache line each: how many calls each worker has got to, and its process
        self._reached = head[_LINE // 8 :: _LINE // 8]
        self._pids = head[_LINE // 8 + 1 :: _LINE // 8]
        # two places for each worker: one is written while another worker may still read the other
        places = torch.frombuffer(memory, dtype=torch.uint8, offset=self._head(world_size))
        self._places = places.view(2, world_size, _PIECE)  # in bytes
        self._spin = _SPIN_SECONDS if len(os.sched_getaffinity(0)) >= world_size else 0.0
        self._pids[rank] = os.getpid()

    @classmethod
    def size(cls, world_size: int) -> int:
        """Bytes of memory wanted."""
        return cls._head(world_size) + 2 * world_size * _PIECE

    @staticmethod
    def _head(world_size: int) -> int:
        return (1 + world_size) * _LINE

    def __call__(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1)  # (x.numel(),), a view of x where it is contiguous, as large ones are
        for piece in flat.split(_PIECE // x.element_size()):
            self._sum(piece)
        if flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view(x.shape))

    def _sum(self, x: Tensor) -> None:
        """x (n,), of at most _PIECE bytes."""
        self._calls += 1
        values = self._places[self._calls % 2, :, : x.nbytes].view(x.dtype)  # (W, n)
        values[self._rank].copy_(x)
        self._reached[self._rank] = self._calls
        for rank in self._ranks:
            self._wait(rank)
        torch.add(values[0], values[1], out=x)
        for rank in self._ranks[2:]:
            x += values[rank]

    def _wait(self, rank: int) -> None:
        """Until worker `rank` has got as far as this one."""
        reached, calls = self._reached, self._calls
        if reached[rank] >= calls:
            return
        start = time.monotonic()
        look = start + _LOOK_SECONDS
        while reached[rank] < calls:
            now = time.monotonic()
            if now - start >= self._spin:
                time.sleep(_PAUSE_SECONDS)
            if now > look:
                look = now + _LOOK_SECONDS
                self._check(rank)

    def _check(self, rank: int) -> None:
        pid = self._pids[rank]
        if pid:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                raise RuntimeError(f"worker {rank} (process {pid}) has ended") from None


def make_worker(rank: int, world_size: int, device: str, heartbeat: Callable[[], None]) -> Worker:
    """A worker of the process group, with the fastest ways to sum and to average gradients. All workers call it together."""
    if world_size == 1:
        return Worker(device=device, heartbeat=heartbeat)
    sums = make_all_reduce(rank, world_size, device)
    return Worker(rank, world_size, device, sums, partial(data_parallel, sums=sums, world_size=world_size), heartbeat)


def data_parallel(model: nn.Module, sums: AllReduce, world_size: int) -> nn.Module:
    """Wrap the network so that its gradients are averaged over the workers."""
    # the buffers are the normalisation's averages, which are equal on all workers by themselves
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **local_buffers())
    if isinstance(sums, SharedMemory):
        # torch refuses a hook whose annotations are strings, as they are here
        parallel.register_comm_hook(sums, lambda sums, bucket: _mean(sums, bucket.buffer(), world_size))
    return parallel


def local_buffers() -> dict[str, Any]:
    """The argument that keeps DistributedDataParallel from sending buffers before each step, in this version of torch."""
    named = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False}


def _mean(sums: AllReduce, gradients: Tensor, world_size: int) -> torch.futures.Future[Tensor]:
    sums(gradients)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradients.div_(world_size))
    return future


def _create(size: int) -> int | None:
    """A descriptor of new memory, which is gone with the last process that has it."""
    try:
        descriptor = os.memfd_create("lgm_dist")
        os.ftruncate(descriptor, size)
    except (OSError, AttributeError):
        return None
    return descriptor


def _open(path: str, token: bytes, size: int) -> mmap.mmap | None:
    """The memory, if this process can reach it: not where it is on another host or in another container."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            if os.pread(descriptor, len(token), 0) == token:
                return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    return None
