"""Faults of a cluster: nodes are added and lost."""

from __future__ import annotations

import argparse
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.losses import differing_losses
from chaos.trainings import Outcome, Training, newest_step, past_this_step

ELASTIC = ("--eval-every=100", "--lr=1e-6", "--lr-min=0", "--wandb=disabled", "--meta-batch=12", "--storage-seconds=5")
"""With so small a learning rate the rounding, which depends on the number of workers, does not grow."""
SETTINGS: dict[str, Any] = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def elastic(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """Train with --workers 1:4 on a cluster on this machine. Add three nodes one by one, then remove a busy one abruptly."""
    from lgm_dist.cluster.connection import prepare_for_ray

    prepare_for_ray()
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": True})
    training = Training(
        *(folder, "elastic", *ELASTIC, "--steps-per-epoch=1000000", "--workers=1:4", "--max-failures=20"),
        RAY_ADDRESS=cluster.address,
        GLOO_SOCKET_IFNAME="lo",
        **SETTINGS,
    )
    outcomes = []
    changes: list[tuple[str, Callable[[], Any], int]] = [
        ("node added", lambda: cluster.add_node(**node), 2),
        ("second node added", lambda: cluster.add_node(**node), 3),
        ("third node added", lambda: cluster.add_node(**node), 4),
        ("node removed hard", lambda: cluster.remove_node(next(iter(cluster.worker_nodes)), False), 3),
    ]
    try:
        training.until(lambda: training.step() >= 100)
        for name, change, size in changes:
            before = len(world_sizes(training))
            past = past_this_step(training)
            start = time.monotonic()
            change()
            training.until(lambda n=before, size=size: world_sizes(training)[n:][-1:] == [size])  # type: ignore[misc]
            training.until(past)
            outcomes.append(Outcome(name, 1, 1, [time.monotonic() - start], note=f"in the log: world size -> {size}"))
        training.process.send_signal(signal.SIGTERM)
        training.wait(status=1)  # with a checkpoint
    finally:
        training.process.kill()
        cluster.shutdown()
    return [*outcomes, compare(folder, training, len(changes))]


def compare(folder: Path, training: Training, changes: int) -> Outcome:
    """Compare a training with the flags ELASTIC that has survived `changes` with as many steps in one process."""
    steps = newest_step(training.run)
    alone = Training(folder, f"{training.run.name}-alone", *ELASTIC, "--workers=0", f"--steps-per-epoch={steps}")
    alone.wait()
    rows, note = differing_losses(training.run, alone.run)
    return Outcome("all of these in one training", changes, changes, rows=rows, note=note)


def world_sizes(training: Training) -> list[int]:
    """Return the world sizes with which the run went on, from its log."""
    return [int(size) for size in re.findall(r"world size \d+ -> (\d+) from step", training.said())]
