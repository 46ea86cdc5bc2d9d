"""Checkpoints: folders `checkpoints/step-00001000` with state.pt (tensors) and state.json (all else). torch and JSON, no Ray.

A checkpoint is complete or absent: it is written beside its place and renamed, state.json carries the digest of state.pt,
and files load without executing anything. The newest two and the best on val are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lgm_dist.config import Config
from lgm_dist.engine import Evaluation
from lgm_dist.model import LGMNet

FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    val_accuracy: float = -1.0
    """Of this very checkpoint, in 0 to 1; -1 before the first evaluation."""
    val_ci95: float = 0.0

    @classmethod
    def after(cls, step: int, val: Evaluation | None) -> TrainState:
        """The state after `step` steps and an evaluation on val, if there was one."""
        return cls(step, val.score.accuracy, val.score.ci95) if val else cls(step)


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are missing, unreadable or not those that were written."""


def save(
    run: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    val: Evaluation | None = None,
) -> Path:
    """Writes the checkpoint of `state` into the run's folder, drops those no longer needed, returns its folder.

    The accuracies of `val`'s episodes are kept with it, see `val_accuracies`.
    """
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    for leftover in folder.parent.glob(".step-*"):  # of a process that was killed here
        shutil.rmtree(leftover)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    tensors = io.BytesIO()  # torch tells of a full disk in words of its own
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tensors)
    digest = hashlib.sha256(tensors.getbuffer()).hexdigest()
    meta = {"format": FORMAT, "sha256": digest, "state": dataclasses.asdict(state), "config": config.to_dict()}
    try:
        (beside / "state.pt").write_bytes(tensors.getbuffer())
        if val:
            np.save(beside / "val.npy", val.accuracies[next(iter(val.scores))])
        (beside / "state.json").write_text(json.dumps(meta, indent=1) + "\n")
    except OSError as error:
        shutil.rmtree(beside)
        reason = f"{error.strerror}; the checkpoints before it are whole, and the same command goes on from them"
        raise OSError(
            error.errno, f"the checkpoint of step {state.step} cannot be written: {reason}", str(folder)
        ) from None
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    _prune(run)
    return folder


def restore(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Loads the newest whole checkpoint of the run into model and optimizer; without one, leaves them at step 0.

    A damaged one is named in a warning and the one before it is used.
    """
    for folder in reversed(_folders(run)):
        try:
            state, tensors = _read(folder)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
            continue
        model.load_state_dict(tensors["model"])
        optimizer.load_state_dict(tensors["optimizer"])
        return state
    return TrainState()


def newest(run: Path) -> Path:
    """Folder of the run's newest readable checkpoint. Raises ValueError where there is none."""
    return list(_some_states(run))[-1]


def best(run: Path) -> Path:
    """Folder of the run's checkpoint with the highest val accuracy (of equals, the earliest)."""
    states = _some_states(run)
    return max(states, key=lambda folder: states[folder].val_accuracy)  # max takes the first of equals


def _some_states(run: Path) -> dict[Path, TrainState]:
    states = states_of(run)
    if not states:
        raise ValueError(f"{run} has no checkpoint; train it with scripts/train.py first")
    return states


def val_accuracies(folder: Path) -> npt.NDArray[np.float64] | None:
    """Accuracy of each val episode (n,) at a checkpoint; None where it was not kept."""
    path = folder / "val.npy"
    return np.load(path) if path.exists() else None


def load_model(folder: Path) -> tuple[LGMNet, Config, TrainState]:
    """The network of a checkpoint, in evaluation mode, on the CPU. Raises ValueError for a damaged one."""
    try:
        state, tensors = _read(folder)
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; name another run or train it anew") from None
    config = Config.from_dict(_meta(folder)["config"])
    model = LGMNet(config.model)
    model.load_state_dict(tensors["model"])
    return model.eval(), config, state


def adopt(source: Path, run: Path) -> None:
    """Makes another run's checkpoint folder `source` the newest checkpoint of `run`, whose own from that step on are dropped.

    Its val accuracy is not `run`'s and is left behind. Raises ValueError where `source` is damaged.
    """
    try:
        step, meta = _read(source)[0].step, _meta(source)
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; it cannot be taken over") from None
    folder = run / "checkpoints" / source.name
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    shutil.copyfile(source / "state.pt", beside / "state.pt")
    meta["state"] = dataclasses.asdict(TrainState(step))
    (beside / "state.json").write_text(json.dumps(meta, indent=1) + "\n")
    drop_after(run, step - 1)
    beside.rename(folder)


def drop_after(run: Path, step: int) -> None:
    """Removes the run's checkpoints of later steps."""
    for folder in _folders(run):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def _prune(run: Path) -> None:
    for folder in set(_folders(run)) - set(list(states_of(run))[-2:]) - {best(run)}:
        shutil.rmtree(folder)


def _folders(run: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def states_of(run: Path) -> dict[Path, TrainState]:
    """The checkpoints with their states, oldest first; one without a readable state.json is named in a warning."""
    states = {}
    for folder in _folders(run):
        try:
            states[folder] = _state(_meta(folder))
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; it is left out", stacklevel=2)
    return states


def _read(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    meta = _meta(folder)
    try:
        digest = _sha256(folder / "state.pt")
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read ({error})") from error
    if digest != meta["sha256"]:
        raise DamagedCheckpoint(f"checkpoint {folder}/state.pt is not the file that was written (sha256 differs)")
    try:
        return _state(meta), torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint(f"checkpoint {folder}/state.pt holds more than tensors and is not loaded") from error


def _meta(folder: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((folder / "state.json").read_text())
        known = meta["format"] == FORMAT and {"sha256", "state", "config"} <= meta.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}/state.json cannot be read ({error})") from error
    if not known:
        raise DamagedCheckpoint(f"checkpoint {folder}/state.json is not of format {FORMAT}")
    return meta


def _state(meta: dict[str, Any]) -> TrainState:
    return TrainState(**meta["state"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
