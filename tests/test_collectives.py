"""Sums over real processes, through shared memory and without it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from worker_processes import run_workers

from lgm_dist.cluster import collectives
from lgm_dist.training.worker import Worker

SIZES = (1, 7, 131_072, 131_073, 400_000)
"""Numbers of float32 values: small ones, a block of 512 KiB, one more than a block, several blocks."""


def values(rank: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * rank + size % 97)).to(dtype)


def sums(worker: Worker) -> dict[str, Any]:
    """The sums that a worker gets for each size, from gloo too, and those of other types and layouts."""
    results: dict[str, Any] = {"through": type(worker.all_reduce).__name__}
    for size in SIZES:
        ours, theirs = (values(worker.rank, size) for _ in range(2))
        worker.sum(ours)
        distributed.all_reduce(theirs)
        results[f"{size}"] = ours, theirs
    results["float64"] = worker.sum(values(worker.rank, 9, torch.float64).reshape(3, 3))
    results["int64"] = worker.sum(torch.full((), 2 + worker.rank))
    base = torch.zeros(4, 6)
    base[:, ::2] = worker.rank + 1
    worker.sum(base[:, ::2])  # not contiguous
    results["strided"] = base
    results["empty"] = worker.sum(torch.zeros(0))
    results["many"] = worker.sum(torch.zeros(1))
    for i in range(2000):
        results["many"] = worker.sum(torch.tensor([float(worker.rank * 2000 + i)]))
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_of_all_sizes_and_types(tmp_path: Path, world_size: int) -> None:
    """They are bit for bit the sums of additions in the order of the ranks."""
    results = run_workers(world_size, tmp_path / "workers", sums)
    ranks = range(world_size)
    for one in results:
        assert one["through"] == "SharedMemoryAllReduce"
        for size in SIZES:
            expected = values(0, size)
            for rank in ranks[1:]:
                expected = expected + values(rank, size)
            ours, theirs = one[f"{size}"]
            assert torch.equal(ours, expected)
            assert torch.allclose(theirs, expected, atol=1e-6)
        double = sum(values(rank, 9, torch.float64) for rank in ranks)
        assert torch.allclose(one["float64"], torch.as_tensor(double).reshape(3, 3), atol=1e-14)
        assert one["int64"].item() == sum(2 + rank for rank in ranks)
        total = float(sum(rank + 1 for rank in ranks))
        assert one["strided"].tolist() == [[total, 0.0] * 3] * 4
        assert one["empty"].numel() == 0
        assert one["many"].item() == sum(rank * 2000 + 1999 for rank in ranks)


def apart(worker: Worker, monkeypatched: str) -> str:
    """Sum as if one worker could not reach the memory, or there were none."""
    if monkeypatched == "no memory":
        collectives._create = lambda _: None
    elif worker.rank == 1:
        collectives._open = lambda *_: None
    reduce = collectives.make_all_reduce(worker.rank, worker.world_size, "cpu")
    x = torch.tensor([float(worker.rank + 1)])
    reduce(x)
    assert x.item() == 3.0
    return getattr(reduce, "__name__", type(reduce).__name__)


@pytest.mark.parametrize("what", ["no memory", "another host"])
def test_workers_that_share_no_memory_sum_with_torch(tmp_path: Path, what: str) -> None:
    assert run_workers(2, tmp_path / "workers", apart, what) == ["all_reduce", "all_reduce"]


def test_memory_with_another_token_is_not_used(tmp_path: Path) -> None:
    """Another host may have a process with the same pid and a descriptor with the same number."""
    (tmp_path / "other").write_bytes(b"x" * 4096)
    assert collectives._open(str(tmp_path / "other"), b"y" * 16, 4096) is None
    assert collectives._open(str(tmp_path / "none"), b"y" * 16, 4096) is None


def dying(worker: Worker) -> str:
    worker.sum(torch.zeros(1))
    if worker.rank == 1:
        pid = os.fork()  # dies in place of this process, whose exit status run_workers checks
        if pid == 0:
            time.sleep(3600)
        worker.all_reduce._pids[1] = pid  # type: ignore[union-attr]
        worker.sum(torch.zeros(1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return ""
    worker.sum(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"worker 1 \(process \d+\) has ended") as caught:
        worker.sum(torch.zeros(1))
    return str(caught.value)


def test_waiting_for_a_worker_that_has_ended_raises_an_error(tmp_path: Path) -> None:
    start = time.monotonic()
    assert run_workers(2, tmp_path / "workers", dying)[0]
    assert time.monotonic() - start < 60


def test_buffers_stay_where_they_are_in_any_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 knows `broadcast_buffers` alone, later versions warn of it."""

    class OfTorch211:
        def __init__(self, module: Any, broadcast_buffers: bool = True) -> None:
            raise NotImplementedError

    class Later:
        def __init__(self, module: Any, broadcast_buffers: None = None, forward_sync_buffers: None = None) -> None:
            raise NotImplementedError

    monkeypatch.setattr(collectives, "DistributedDataParallel", OfTorch211)
    assert collectives.local_buffers() == {"broadcast_buffers": False}
    monkeypatch.setattr(collectives, "DistributedDataParallel", Later)
    assert collectives.local_buffers() == {"forward_sync_buffers": False}
