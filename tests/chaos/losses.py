"""What a disturbed training has lost compared with an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lgm_dist.runs import checkpoint
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.tracking.wandb_process import held_steps

CLOCKS = ("seconds", "speed/", "memory/")
"""Columns of metrics.jsonl that differ between two equal runs."""


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without times and memory."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read_metrics(run)]


def wandb_runs(run: Path) -> set[str]:
    """Return the ids of the offline W&B runs of a run."""
    return {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}


def lost_rows(run: Path, alone: Path) -> int:
    """Count the rows that are missing, repeated or different in metrics.jsonl, and missing or repeated in W&B's files."""
    held = [step for wandb_id in wandb_runs(run) for step in held_steps(run, wandb_id)[0]]
    twice = len(held) - len(set(held))
    return wrong_rows(run, alone) + twice + len({row["step"] for row in rows_of(alone)} ^ set(held))


def wrong_rows(run: Path, alone: Path) -> int:
    """Count the rows of metrics.jsonl that are missing, repeated or different."""
    ours, theirs = rows_of(run), rows_of(alone)
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def changed_bits(run: Path, alone: Path) -> int:
    """Count the bits by which the tensors of the newest and of the best checkpoint differ."""
    return sum(_differing(_tensors(mine(run)), _tensors(mine(alone))) for mine in (checkpoint.newest, checkpoint.best))


def _tensors(folder: Path) -> dict[str, bytes]:
    state = torch.load(folder / "state.pt", weights_only=True)
    tensors: dict[str, bytes] = {"step": folder.name.encode()}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value.contiguous().numpy().tobytes()
        elif isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                collect(f"{name}.{key}", item)
        else:
            tensors[name] = repr(value).encode()

    collect("", state)
    return tensors


def _differing(ours: dict[str, bytes], theirs: dict[str, bytes]) -> int:
    bits = 0
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name, b""), theirs.get(name, b"")
        size = max(len(a), len(b))
        x, y = (np.frombuffer(value.ljust(size, b"\0"), np.uint8) for value in (a, b))
        bits += int(np.unpackbits(x ^ y).sum())
    return bits


def differing_losses(run: Path, alone: Path) -> tuple[int, str]:
    """Count the missing and repeated rows of `run`, and say by how much its losses differ from those of `alone`."""
    ours = [(row["step"], row["train/loss"]) for row in rows_of(run)]
    theirs = [(row["step"], row["train/loss"]) for row in rows_of(alone)][: len(ours)]
    missing = len({step for step, _ in ours} ^ {step for step, _ in theirs}) + len(ours) - len(dict(ours))
    difference = max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=False))
    return missing, f"{len(ours)} losses differ by at most {difference:.1e}"
