"""Whole trainings: from the command to the first step, what is not the model, and one worker against two."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from lgm_dist.allocator import keep_freed_memory
from lgm_dist.bench.measure import Section, Spread, in_turn, plain, ratio
from lgm_dist.bench.steps import ROOT, Steps, batch_of, contender
from lgm_dist.config import Config
from lgm_dist.engine import make_optimizer, train_step
from lgm_dist.metrics import read_metrics
from lgm_dist.model import LGMNet
from lgm_dist.ray_train import all_reduce

STEPS = 60


def train(data: str, data_root: str, rounds: int) -> Section:
    """Real trainings of scripts/train.py: seconds to the first step, and the part of the time after it that is not the model.

    The model's own step is timed in turn with them, in a process of its own, on random episodes of the same size.
    """
    found: dict[str, list[float]] = {name: [] for name in ("first 0", "first 1", "step 0", "step 1", "alone")}
    steps = Steps("ours", queries=5)
    for turn in range(rounds + 1):
        for workers in (0, 1):
            first, each = _run(data, data_root, workers)
            if turn:  # the first finds nothing in the page cache
                found[f"first {workers}"].append(first)
                found[f"step {workers}"].append(each)
        with contender(steps) as take:
            alone = [take()["seconds"] for _ in range(STEPS // 2)]
        if turn:
            found["alone"].append(Spread(tuple(alone[3:])).median)
    spreads = {name: Spread(tuple(values)) for name, values in found.items()}
    rows = []
    for workers, limit in ((0, 4), (1, 15)):
        share = ratio(spreads["alone"], spreads[f"step {workers}"]).each(lambda r: 100 * (1 - r))
        how = "this process (--workers 0)" if not workers else "Ray Train (--workers 1)"
        rows.append((how, f"{spreads[f'first {workers}'].text()} s", f"{limit} s", f"{share.text()} %", "5 %"))
    header = ("trained in", "from command to first step", "target: under", "not the model, after it", "target: under")
    note = (
        f"5-way 1-shot, one query a class, meta-batch 32, {STEPS} steps without an evaluation, warm caches, W&B offline; "
        f"median [smallest, largest] of {rounds} rounds in turn."
    )
    return Section("train", "scripts/bench.py train", header, rows, note, {"seconds": plain(spreads)})


def _run(data: str, data_root: str, workers: int) -> tuple[float, float]:
    """Seconds from the command to its first step, and the median of those between two steps later on."""
    with tempfile.TemporaryDirectory() as storage:
        flags = [
            "--data",
            data,
            "--data-root",
            data_root,
            "--workers",
            str(workers),
            "--storage",
            storage,
            "--name",
            "bench",
            "--epochs",
            "1",
        ]
        flags += ["--steps-per-epoch", str(STEPS), "--eval-every", str(STEPS), "--eval-episodes", "2"]
        flags += ["--test-episodes", "0", "--wandb", "offline", "--eval-query", "1"]
        run, start = Path(storage) / "bench", time.time()
        command = [sys.executable, str(ROOT / "scripts/train.py"), *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while not (run / "metrics.jsonl").exists() or not read_metrics(run):
                if process.poll() is not None:
                    raise ValueError(
                        f"train.py ended before its first step: {process.communicate()[1].decode()[-500:]}"
                    )
                time.sleep(0.02)
            first = time.time() - start
            process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        seconds = [row["seconds"] for row in read_metrics(run)][5:-1]
        return first, (seconds[-1] - seconds[0]) / (len(seconds) - 1)


def scaling(rounds: int) -> Section:
    """Two workers of one thread against one worker of one thread, the same global meta-batch; all-reduces by size."""
    found = in_turn({"one": lambda: _ddp(1), "two": lambda: _ddp(2)}, rounds, warmup=0)
    speed = {name: spread.each(lambda s: 32 / s) for name, spread in found.items()}
    gain = ratio(found["one"], found["two"])
    rows = [
        ("1 worker of 1 thread", speed["one"].text(), ""),
        ("2 workers of 1 thread", speed["two"].text(), f"{gain.text(2)} (target: 1.85)"),
    ]
    note = (
        "5-way 1-shot, one query an episode, global meta-batch 32, float32, normalisation over the global meta-batch, gloo on "
        f"loopback; median [smallest, largest] of {rounds} rounds in turn, each of 12 steps after 3."
    )
    header = ("workers", "episodes/s", "faster by")
    return Section("scaling", "scripts/bench.py scaling", header, rows, note, {"seconds": plain(found)})


def _ddp(world_size: int) -> float:
    """Median seconds of a step of so many workers."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "lgm_dist.bench.training", f"{folder}/store", str(world_size)]
        workers = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
            for rank in range(world_size)
        ]
        return max(float(worker.communicate()[0]) for worker in workers)


def _worker(store: str, world_size: int, rank: int) -> float:
    torch.set_num_threads(1)
    keep_freed_memory()
    steps = Steps("ours", meta_batch=32 // world_size, threads=1)
    config, batch = Config(meta_batch=32), batch_of(steps)
    torch.manual_seed(0)
    model = LGMNet().train()
    parallel: torch.nn.Module = model
    if world_size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", world_size=world_size, rank=rank)
        model.reduce_over(all_reduce)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = make_optimizer(model, config)
    taken = [_timed(lambda: float(train_step(parallel, optimizer, batch, config, 0)[0])) for _ in range(15)]
    if world_size > 1:
        torch.distributed.destroy_process_group()
    return Spread(tuple(taken[3:])).median


def _timed(work: Callable[[], float]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.stdout.write(f"{_worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))}\n")
