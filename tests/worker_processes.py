"""Workers with gloo in processes that are started without Ray."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from helpers.steps import train_step
from torch import Tensor, distributed

from lgm_dist.cluster.collectives import make_worker
from lgm_dist.config import Config
from lgm_dist.data import open_bank, sample_episodes
from lgm_dist.training.loop import build_network
from lgm_dist.training.schedule import make_optimizer
from lgm_dist.training.worker import Worker

_TIMEOUT_S = 120  # after which the processes count as hung


def run_workers(world_size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call work(worker, *arguments) in `world_size` processes and return its results (tensors and plain values) by rank.

    A single worker works in this process, without a process group, as a run without Ray does.
    """
    if world_size == 1:
        return [work(Worker(), *arguments)]
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not by every worker
    context.set_forkserver_preload(
        ["torch._dynamo", "lgm_dist.cluster.fit"]
    )  # torch._dynamo, because optimizers import it
    processes = [
        context.Process(target=_process, args=(rank, world_size, folder, work, arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_TIMEOUT_S)
    exits = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exits == [0] * world_size, f"exit codes {exits} (None: still running after {_TIMEOUT_S} s)"
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _process(rank: int, world_size: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_S / 2),
    )
    worker = make_worker(rank, world_size, "cpu", lambda: None)
    torch.save(work(worker, *arguments), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def train(worker: Worker, config: Config, dtype: torch.dtype, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Take the steps of lgm_dist.training.loop.train_fn in `dtype`. Return the loss of each and the state of the model."""
    bank = open_bank(config.data.name, "train", config.data.cache)
    model = build_network(config, worker).to(dtype).train()
    parallel = worker.data_parallel(model)
    optimizer, losses = make_optimizer(model, config), []
    for step in range(steps):
        first, count, weight = worker.slice_of(step * config.episodes.meta_batch, config.episodes.meta_batch)
        batch = sample_episodes(bank, config, "train", first, count)
        batch = replace(batch, images=batch.images.to(dtype), noise=batch.noise.to(dtype))
        losses.append(worker.mean(train_step(parallel, optimizer, batch, config, step, weight))[0].item())
    return losses, {name: value.detach().clone() for name, value in model.state_dict().items()}
