"""One worker against several: measured on this machine, and calculated for a cluster.

`python -m lgm_dist.bench.scaling STORE WORLD_SIZE RANK [apart]` is one of the measured workers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from lgm_dist.bench.measure import Section, Spread, in_turn, plain, ratio
from lgm_dist.bench.steps import ROOT, StepSetup, batch_of
from lgm_dist.cluster.collectives import all_reduce, data_parallel, make_all_reduce
from lgm_dist.config import Config
from lgm_dist.model import AllReduce
from lgm_dist.training.episodes_task import Episodes
from lgm_dist.training.loop import build_network
from lgm_dist.training.memory import keep_freed_memory, peak_memory
from lgm_dist.training.schedule import make_optimizer
from lgm_dist.training.step import train_step
from lgm_dist.training.worker import Worker

META_BATCH, STEPS = 32, 12
GRADIENTS = 2_661_376 * 4
"""Bytes of the gradients of the paper's model."""
SIZES = (4, GRADIENTS)
"""Bytes of the all-reduces that are timed."""
NETWORKS = {"10 Gbit/s, 50 µs": (50e-6, 1.25e9), "100 Gbit/s, 10 µs": (10e-6, 12.5e9)}
"""Latency in seconds and bandwidth in bytes/s of networks that are assumed, not measured."""
WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def scaling(rounds: int) -> Section:
    """Compare 2 and 4 workers of one thread with one such worker, at the same global meta-batch of 32 episodes.

    Two processes that each take half of the meta-batch and share nothing show the limit of the machine.
    """
    names = ("1 worker", "2 processes that share nothing", "2 workers", "4 workers on 2 cores")
    found = in_turn(
        dict(zip(names, (lambda: _ddp(1), _apart, lambda: _ddp(2), lambda: _ddp(4)), strict=True)), rounds, warmup=0
    )
    rows = []
    for name, seconds in found.items():
        gain = ratio(found["1 worker"], seconds)
        target = " (target: 1.85)" if name == "2 workers" else ""
        faster = "" if name == "1 worker" else f"{gain.text(2)}{target}"
        rows.append((name, seconds.each(lambda s: META_BATCH / s).text(), faster))
    note = (
        "One thread a process, 5-way 1-shot, one query an episode, global meta-batch 32, float32, normalisation over the "
        f"global meta-batch, sums through shared memory; median [smallest, largest] of {rounds} rounds in turn, each of "
        f"{STEPS} steps."
    )
    header = ("workers", "episodes/s", "faster by")
    return Section("scaling", "lgm-dist bench scaling", header, rows, note, {"seconds": plain(found)})


def model() -> Section:
    """Calculate what more workers would do, from this machine's measured compute and all-reduces and two assumed networks.

    A worker of one thread keeps a slice of 32 episodes, so the meta-batch grows with the workers. The gradients go round a
    ring, 2 (W - 1) / W times their bytes; each small all-reduce of the normalisation takes 2 log2(W) latencies, and so
    does the start of the ring. Nothing is hidden behind the backward pass, so this is an upper bound of the time.
    """
    alone, two = _workers(1)[0], _workers(2)
    small, large, told = (
        max(one[key] for one in two) for key in ("all_reduce 4", f"all_reduce {GRADIENTS}", "collectives")
    )
    loopback = (small / 2, GRADIENTS / max(large - small, 1e-9))
    networks = {
        f"gloo on loopback, {1e6 * loopback[0]:.0f} µs, {loopback[1] / 1e9:.1f} GB/s, measured": loopback
    } | NETWORKS
    rows, values = [], {}
    for network, (latency, rate) in networks.items():
        costs = [communication(workers, latency, rate, int(told)) for workers in WORLD_SIZES]
        passes = next((w for w, cost in zip(WORLD_SIZES, costs, strict=True) if cost > alone["seconds"]), None)
        share = [f"{100 * alone['seconds'] / (alone['seconds'] + cost):.1f} %" for cost in costs]
        rows.append((network, *share, str(passes or "no")))
        values[network] = {"latency": latency, "bytes_per_second": rate, "seconds": costs}
    note = (
        f"Share of a step that is compute. A worker's own step of 32 episodes, one thread: {alone['seconds']:.3f} s "
        f"(measured); {told:.0f} all-reduces of the normalisation a step (counted), {GRADIENTS / 1e6:.1f} MB of gradients; two "
        f"processes on loopback: {1e6 * small:.0f} µs an all-reduce of 4 bytes, {1e3 * large:.1f} ms of the gradients "
        "(medians of 30)."
    )
    header = ("network", *(str(w) for w in WORLD_SIZES), "communication passes compute at")
    values["measured"] = {"alone": alone, "two": two}
    return Section("scaling on paper", "lgm-dist bench scaling --model", header, rows, note, values)


def communication(workers: int, latency: float, rate: float, collectives: int) -> float:
    """Seconds that a step spends in all-reduces: a ring for the gradients, trees for the small ones."""
    ring = 2 * (workers - 1) / workers * GRADIENTS / rate + 2 * (workers - 1) * latency
    return ring + collectives * 2 * math.ceil(math.log2(workers)) * latency


def _ddp(world_size: int) -> float:
    """Median seconds of a step with `world_size` workers."""
    return max(one["seconds"] for one in _workers(world_size))


def _apart() -> float:
    """Median seconds of a step of two independent processes, each with half of the meta-batch."""
    return max(one["seconds"] for one in _workers(2, "apart"))


def _workers(world_size: int, *words: str) -> list[dict[str, float]]:
    """The measurements of each of `world_size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "lgm_dist.bench.scaling", f"{folder}/store", str(world_size)]
        workers = [
            subprocess.Popen(
                [*command, str(rank), *words], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
            )
            for rank in range(world_size)
        ]
        return [json.loads(worker.communicate()[0]) for worker in workers]


def _worker(store: str, world_size: int, rank: int, *words: str) -> dict[str, float]:
    """Seconds of a step of this worker, and the all-reduces of its normalisation: how many, and their bytes."""
    torch.set_num_threads(1)
    keep_freed_memory()
    config, batch = Config.of(meta_batch=META_BATCH), batch_of(StepSetup("ours", meta_batch=META_BATCH // world_size))
    model = build_network(config, Worker())
    told: list[int] = []
    together = world_size > 1 and "apart" not in words
    if together:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", world_size=world_size, rank=rank)
    parallel: nn.Module = model.train()
    if together:
        sums = make_all_reduce(rank, world_size, "cpu")
        model.reduce_over(_counted(sums, told))
        parallel = data_parallel(model, sums, world_size)
    optimizer, task = make_optimizer(model, config), Episodes(config, {}, Worker())
    taken = []
    for _ in range(3 + STEPS):
        told.clear()
        taken.append(_timed(lambda: float(train_step(task, parallel, optimizer, batch, 0)[0])))
    found = {"seconds": Spread(tuple(taken[3:])).median, "collectives": len(told), "bytes": sum(told)}
    found["peak_bytes"] = peak_memory()
    if together:
        found |= {f"all_reduce {size}": _all_reduce_seconds(all_reduce, size) for size in SIZES}
        found |= {f"shared {size}": _all_reduce_seconds(sums, size) for size in SIZES}
        torch.distributed.destroy_process_group()
    return found


def _counted(sums: AllReduce, told: list[int]) -> AllReduce:
    def reduce(x: torch.Tensor) -> None:
        told.append(x.nbytes)
        sums(x)

    return reduce


def _all_reduce_seconds(reduce: AllReduce, size: int) -> float:
    """Median seconds of an all-reduce of `size` bytes."""
    x = torch.zeros(size // 4)
    return Spread(tuple(_timed(lambda: reduce(x)) for _ in range(30))).median


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])) + "\n")
