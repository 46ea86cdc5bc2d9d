"""Folders of runs and sweeps written by hand, for the tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lgm_dist.config import Config
from lgm_dist.runs.checkpoint_files import Meta, TrainState, sha256

FACTS = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "manifest": "data/fc100/fc100.json",
    "manifest_digest": "d1" * 32,
    "world_size": 1,
    "threads": 2,
    "device": "cpu",
    "machine": "x86_64, 2 CPUs",
    "python": "3.11.9",
    "torch": "2.15.0",
}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63606060f80f00010401005fe5c34b0000000049454e44ae426082"
)
"""One pixel."""


def write_run(
    folder: Path,
    config: Config,
    rows: Sequence[dict[str, Any]],
    facts: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
) -> Path:
    """A run's folder; without `result`, of one that is not finished."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "facts.json").write_text(json.dumps(FACTS | (facts or {})))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def row(step: int, val: tuple[float, float] | None = None, **more: float) -> dict[str, Any]:
    """A row of metrics.jsonl, a second a step; `val` is accuracy and interval."""
    train = {"train/loss": 2.0 - step / 1000, "train/accuracy": 0.25, "optim/lr": 1e-3, "optim/grad_norm": 1.0}
    speed = {"speed/episodes_per_s": 100.0, "memory/peak_bytes": 2.0**30}
    evaluation = {"val/accuracy": val[0], "val/ci95": val[1]} if val else {}
    return {"step": step, **train, **speed, **evaluation, "seconds": float(step)} | {
        k.replace("__", "/"): v for k, v in more.items()
    }


def write_sweep(folder: Path, spec: dict[str, Any]) -> Path:
    """A sweep's folder, without trials so far."""
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(spec))
    return folder


def write_trial(
    sweep: Path,
    number: int,
    config: Config,
    rows: Sequence[dict[str, Any]],
    sample: dict[str, Any],
    accuracies: Sequence[float] | None = None,
    **more: Any,
) -> Path:
    """A trial and, with the accuracies of its val episodes, the checkpoint of its best evaluation."""
    run = write_run(sweep / "trials" / f"trial-{number:03d}", config, rows)
    trial = {"number": number, "sample": sample, "status": "finished", "error": "", "exploits": []}
    (run / "trial.json").write_text(json.dumps(trial | more))
    if accuracies is not None:
        best = max((r for r in rows if "val/accuracy" in r), key=lambda r: float(r["val/accuracy"]))
        folder = run / "checkpoints" / f"step-{best['step']:08d}"
        folder.mkdir(parents=True)
        np.save(folder / "val.npy", np.asarray(accuracies, dtype=np.float64))
        write_state(folder, TrainState(best["step"], best["val/accuracy"], best["val/ci95"]), config)
    return run


def write_state(folder: Path, state: TrainState, config: Config) -> None:
    """The state.json of a checkpoint folder, with the digests of the files that are there."""
    digests = {path.name: sha256(path.read_bytes()) for path in folder.iterdir()}
    Meta(state, config.to_dict(), {"state.pt": "", **digests}, "").write(folder)
