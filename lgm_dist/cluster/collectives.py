"""Sums over the workers of a process group. Workers that train on the CPU of one host sum through shared memory.

A training step has a dozen sums of a kilobyte, and in each of them the workers wait for the slowest. torch.distributed puts a
waiting thread to sleep, and waking it takes part of a millisecond, in which the others wait in turn. Its sum of the gradients
goes through the network stack. docs/performance.md has the gain of shared memory.
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

_BLOCK_BYTES = 512 * 1024
"""Bytes that are summed at once, few enough to stay in the cache meanwhile."""
_LINE_BYTES = 64  # of a cache line
_TOKEN_BYTES = 16  # of the random token by which the workers recognise the memory
_SPIN_S = 0.02
"""A worker that waits for another spins for so long, then sleeps for _PAUSE_S at a time."""
_PAUSE_S = 0.0001
_CHECK_S = 1.0
"""Seconds between two checks that a worker that is waited for is alive."""


def all_reduce(x: Tensor) -> None:
    """Sum `x` over the workers of the process group, in place."""
    torch.distributed.all_reduce(x)


def make_all_reduce(rank: int, world_size: int, device: str) -> AllReduce:
    """Return the fastest function that sums a tensor over these workers in place. All workers call this together."""
    if device != "cpu" or platform.machine() not in ("x86_64", "AMD64"):  # other processors reorder a core's writes
        return all_reduce
    memory = _share_memory(rank, SharedMemoryAllReduce.size(world_size))
    has_memory = torch.tensor([float(memory is not None)])  # (1,)
    all_reduce(has_memory)
    if memory is None or float(has_memory) < world_size:
        return all_reduce
    return SharedMemoryAllReduce(memory, rank, world_size)


def _share_memory(rank: int, size: int) -> mmap.mmap | None:
    """Return `size` bytes that all workers map, None on a worker that cannot map them. All workers call this together."""
    place: list[tuple[str, bytes]] = [("", b"")]
    own = _create(size) if rank == 0 else None
    if own is not None:
        place = [(f"/proc/{os.getpid()}/fd/{own}", secrets.token_bytes(_TOKEN_BYTES))]
        os.pwrite(own, place[0][1], 0)
    torch.distributed.broadcast_object_list(place)
    memory = _open(*place[0], size)
    torch.distributed.barrier()  # the descriptor is needed until all have opened it
    if own is not None:
        os.close(own)
    return memory


class SharedMemoryAllReduce:
    """Sums tensors over the workers of one host, in the order of the ranks.

    Raises RuntimeError if a worker that is waited for has ended.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int) -> None:
        self._rank, self._ranks, self._calls = rank, range(world_size), 0
        head = memoryview(memory)[: self._head(world_size)].cast("q")
        # a cache line for each worker holds the number of its calls and its pid
        self._reached = head[_LINE_BYTES // 8 :: _LINE_BYTES // 8]
        self._pids = head[_LINE_BYTES // 8 + 1 :: _LINE_BYTES // 8]
        # two blocks for each worker: it writes one while another worker may still read the other
        blocks = torch.frombuffer(memory, dtype=torch.uint8, offset=self._head(world_size))
        self._blocks = blocks.view(2, world_size, _BLOCK_BYTES)
        self._spin_s = _SPIN_S if len(os.sched_getaffinity(0)) >= world_size else 0.0
        self._pids[rank] = os.getpid()

    @classmethod
    def size(cls, world_size: int) -> int:
        """Return the bytes of memory that so many workers need."""
        return cls._head(world_size) + 2 * world_size * _BLOCK_BYTES

    @staticmethod
    def _head(world_size: int) -> int:
        return (1 + world_size) * _LINE_BYTES

    def __call__(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1)  # (x.numel(),), a view of x if that is contiguous, as large ones are
        for block in flat.split(_BLOCK_BYTES // x.element_size()):
            self._sum(block)
        if flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view(x.shape))

    def _sum(self, x: Tensor) -> None:
        """Sum `x` (n,) of at most _BLOCK_BYTES bytes in place."""
        self._calls += 1
        values = self._blocks[self._calls % 2, :, : x.nbytes].view(x.dtype)  # (W, n)
        values[self._rank].copy_(x)
        self._reached[self._rank] = self._calls
        for rank in self._ranks:
            self._wait(rank)
        torch.add(values[0], values[1], out=x)
        for rank in self._ranks[2:]:
            x += values[rank]

    def _wait(self, rank: int) -> None:
        """Wait until worker `rank` has written its values of this call."""
        reached, calls = self._reached, self._calls
        if reached[rank] >= calls:
            return
        start = time.monotonic()
        check_at = start + _CHECK_S
        while reached[rank] < calls:
            now = time.monotonic()
            if now - start >= self._spin_s:
                time.sleep(_PAUSE_S)
            if now > check_at:
                check_at = now + _CHECK_S
                self._check(rank)

    def _check(self, rank: int) -> None:
        """Raise RuntimeError if the process of worker `rank` has ended."""
        pid = self._pids[rank]
        if pid:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                raise RuntimeError(f"worker {rank} (process {pid}) has ended") from None


def data_parallel(model: nn.Module, sums: AllReduce, world_size: int) -> nn.Module:
    """Wrap the network so that its gradients are averaged over the workers."""
    # the buffers, the normalisation's running averages, are equal on all workers without being sent
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **local_buffers())
    if isinstance(sums, SharedMemoryAllReduce):
        # a lambda, since torch refuses a function whose annotations are strings, as in this module
        parallel.register_comm_hook(sums, lambda sums, bucket: _mean(sums, bucket.buffer(), world_size))
    return parallel


def local_buffers() -> dict[str, Any]:
    """The argument that keeps DistributedDataParallel from sending buffers before each step, in this version of torch."""
    named = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False}


def _mean(sums: AllReduce, gradients: Tensor, world_size: int) -> torch.futures.Future[Tensor]:
    """Return the gradients averaged over the workers, as DistributedDataParallel expects them from a hook."""
    sums(gradients)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradients.div_(world_size))
    return future


def make_worker(rank: int, world_size: int, device: str, heartbeat: Callable[[], None]) -> Worker:
    """This process as a worker, with the fastest sums of its process group. All workers call this together."""
    if world_size == 1:
        return Worker(device=device, heartbeat=heartbeat)
    sums = make_all_reduce(rank, world_size, device)
    return Worker(rank, world_size, device, sums, partial(data_parallel, sums=sums, world_size=world_size), heartbeat)


def _create(size: int) -> int | None:
    """Return a descriptor of new memory, which the kernel frees with the last process that maps it. None if it has none."""
    try:
        descriptor = os.memfd_create("lgm_dist")
        os.ftruncate(descriptor, size)
    except (OSError, AttributeError):
        return None
    return descriptor


def _open(path: str, token: bytes, size: int) -> mmap.mmap | None:
    """Map the memory. None if it is out of reach, on another host or in another container."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            if os.pread(descriptor, len(token), 0) == token:
                return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    return None
