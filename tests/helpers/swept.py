"""A sweep of chosen accuracies, written trial by trial, for the tests of what is made of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from helpers.fabricated import write_state, write_trial

from lgm_dist.config import Config
from lgm_dist.runs.checkpoint_files import TrainState

BASE = Config.of(epochs=1, steps_per_epoch=20, meta_batch=4, eval_every=10, eval_episodes=4, eval_ways=5, eval_shot=1)
NORM: dict[str, Any] = {"kind": "choice", "values": ["batch", "group"], "when": {}}
SCOPE = {"kind": "choice", "values": ["global", "episode"], "when": {"model.norm": ["batch"]}}
LR: dict[str, Any] = {"kind": "loguniform", "low": 1e-4, "high": 1e-2, "when": {}}
NOISE: dict[str, Any] = {"kind": "choice", "values": ["sample", "mean"], "when": {}}
WEIGHT_DECAY: dict[str, Any] = {"kind": "uniform", "low": 0.0, "high": 0.3, "when": {}}


def begin(folder: Path, base: Config = BASE, **params: dict[str, Any]) -> Path:
    """sweep.json; by default of lr, model.norm and, where that is batch, model.norm_scope. Returns the sweep's folder."""
    chosen = {name.replace("__", "."): param for name, param in params.items()}
    chosen = chosen or {"lr": LR, "model.norm": NORM, "model.norm_scope": SCOPE}
    folder.mkdir(exist_ok=True)
    spec = {"name": folder.name, "params": chosen, "target": {"ways": 5, "shot": 1}, "base": base.to_dict()}
    (folder / "sweep.json").write_text(json.dumps(spec))
    return folder


def add(
    sweep: Path,
    sample: dict[str, Any],
    *evaluations: list[float],
    config: dict[str, Any] | None = None,
    kept: int | None = None,
    **more: Any,
) -> Path:
    """One more trial: accuracies of the 4 val episodes at step 10, 20, …, each after 30 s; checkpoints of the last `kept`."""
    number = len(list(sweep.glob("trials/*")))
    base = json.loads((sweep / "sweep.json").read_text())["base"]
    rows, val = [], [float(np.mean(accuracies)) for accuracies in evaluations]
    for i, accuracy in enumerate(val, 1):
        rows.append({"step": 10 * i - 5, "train/loss": 1.0, "seconds": 30.0 * i - 15})
        rows.append({"step": 10 * i, "val/accuracy": accuracy, "val/ci95": 0.01, "seconds": 30.0 * i})
    run = write_trial(
        sweep, number, Config.from_dict(Config.from_dict(base).flat() | (config or {})), rows, sample, **more
    )
    for i in range(1 if kept is None else len(val) + 1 - kept, len(val) + 1):
        folder = run / "checkpoints" / f"step-{10 * i:08d}"
        folder.mkdir(parents=True)
        np.save(folder / "val.npy", np.array(evaluations[i - 1]))
        write_state(folder, TrainState(10 * i, val[i - 1], 0.01), Config())
    return run


def same(accuracy: float) -> list[float]:
    return [accuracy] * 4


def winner_and_second(sweep: Path) -> None:
    add(sweep, {"lr": 1e-3, "model.norm": "batch", "model.norm_scope": "global"}, same(0.4), [0.5, 0.25, 0.75, 0.5])
    add(sweep, {"lr": 1e-2, "model.norm": "group"}, [0.25, 0.25, 0.5, 0.25], same(0.25), status="stopped")
