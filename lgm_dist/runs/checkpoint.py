"""Checkpoints: folders `checkpoints/step-00001000` with state.pt (tensors) and state.json (everything else).

A checkpoint is complete or absent: it is written beside its place and renamed, state.json carries the digests of all files
and of itself, and the files load without executing anything. The newest two and the best on val are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lgm_dist.config import Config, ModelConfig, differing, marked
from lgm_dist.model import LGMNet
from lgm_dist.runs.checkpoint_files import (
    DamagedCheckpoint,
    ImageFacts,
    Meta,
    TrainState,
    check_tensors,
    config_of,
    folder_name,
    read,
    read_file,
    read_meta,
    sha256,
    step_of,
)
from lgm_dist.training.evaluation import Evaluation

__all__ = [
    "DamagedCheckpoint",
    "ImageFacts",
    "TrainState",
    "adopt",
    "best",
    "check",
    "drop_after",
    "load_model",
    "newest",
    "restore",
    "save",
]


def save(
    run: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    val: Evaluation | None = None,
    data: str = "",
    images: ImageFacts | None = None,
) -> Path:
    """Write the checkpoint of `state` into the run's folder, drop those that are no longer needed, and return its folder.

    The accuracies of the episodes of `val` are kept with it, see `val_accuracies`. `data` is the digest of the data set's
    manifest. Raises OSError, with the step, if the checkpoint cannot be written.
    """
    folder = run / "checkpoints" / folder_name(state.step)
    for leftover in folder.parent.glob(".step-*"):  # of a process that was killed here
        shutil.rmtree(leftover)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    contents = {"state.pt": io.BytesIO()}  # in memory, because torch and numpy report a full disk in words of their own
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, contents["state.pt"])
    if val:
        contents["val.npy"] = io.BytesIO()
        np.save(contents["val.npy"], val.accuracies[next(iter(val.scores))])
    digests = {name: sha256(content.getbuffer()) for name, content in contents.items()}
    try:
        for name, content in contents.items():
            (beside / name).write_bytes(content.getbuffer())
        Meta(state, config.to_dict(), digests, data, images).write(beside)
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


def restore(
    run: Path, model: LGMNet, optimizer_at: Callable[[int], torch.optim.Optimizer | None]
) -> tuple[TrainState, torch.optim.Optimizer | None]:
    """Load the newest whole checkpoint of the run into the model and the optimizer of its step, and return both.

    `optimizer_at` gives the optimizer that trains at a step, or None if a stage begins there. Without a checkpoint the model
    stays as it is, at step 0. A damaged checkpoint is named in a warning, and the one before it is used. Raises ValueError
    for a checkpoint of another network or of a later format.
    """
    for folder in reversed(_folders(run)):
        try:
            meta, tensors = read(folder)
            _check_network(folder, meta, model.config)
            optimizer = optimizer_at(meta.state.step)
            check_tensors(folder, tensors, model, optimizer)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
            continue
        model.load_state_dict(tensors["model"])
        if optimizer:
            optimizer.load_state_dict(tensors["optimizer"])
        return meta.state, optimizer
    return TrainState(), None


def check(run: Path, config: Config, data: str) -> None:
    """Raise ValueError if the run's newest checkpoint is of another network than `config.model` or of another data set.

    `data` is the digest of the data set's manifest.
    """
    for folder in reversed(_folders(run)):
        with contextlib.suppress(DamagedCheckpoint):  # `restore` warns of it
            _check_network(folder, read_meta(folder), config.model, data)
            return


def newest(run: Path) -> Path:
    """Folder of the run's newest readable checkpoint. Raises ValueError if there is none."""
    return list(_some_states(run))[-1]


def best(run: Path) -> Path:
    """Folder of the evaluated checkpoint of the latest stage with the highest val accuracy; the earliest of equals."""
    states = _some_states(run)
    return max(states, key=lambda folder: states[folder].rank)  # max takes the first of equals


def _some_states(run: Path) -> dict[Path, TrainState]:
    states = states_of(run)
    if not states:
        raise ValueError(f"{run} has no checkpoint; train it with lgm-dist train first")
    return states


def val_accuracies(folder: Path) -> npt.NDArray[np.float64] | None:
    """Accuracy of each val episode (n,) at a checkpoint; None if it was not kept or, with a warning, if it is damaged."""
    if not (folder / "val.npy").exists():
        return None
    try:
        content = read_file(folder, "val.npy", read_meta(folder))
        accuracies: npt.NDArray[np.float64] = np.load(io.BytesIO(content), allow_pickle=False)
        assert accuracies.dtype == np.float64, accuracies.dtype
        return accuracies
    except Exception as error:  # a damaged file can raise almost anything
        warnings.warn(f"{folder}/val.npy holds no accuracies ({error}); they are left out", stacklevel=2)
        return None


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint. Raises ValueError for a damaged one."""
    try:
        return read_meta(folder).state
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; name another run or train it anew") from None


def image_facts(folder: Path) -> ImageFacts | None:
    """What a checkpoint's network has to know about images; None for checkpoints of the first version."""
    try:
        return read_meta(folder).images
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; name another run or train it anew") from None


def load_model(folder: Path) -> tuple[LGMNet, Config, TrainState]:
    """The network of a checkpoint, in evaluation mode, on the CPU. Raises ValueError for a damaged one."""
    try:
        meta, tensors = read(folder)
        config = config_of(folder, meta)
        with torch.device("meta"):  # takes no memory, however large the network that the checkpoint claims to hold
            check_tensors(folder, tensors, LGMNet(config.model))
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; name another run or train it anew") from None
    model = LGMNet(config.model)
    model.load_state_dict(tensors["model"])
    return model.eval(), config, meta.state


def adopt(source: Path, run: Path) -> None:
    """Make the checkpoint folder `source` of another run the newest checkpoint of `run`, and drop its own from that step on.

    The val accuracy of the other run is left behind. Raises ValueError if `source` is damaged.
    """
    try:
        meta = read(source)[0]
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; it cannot be taken over") from None
    step, folder = meta.state.step, run / "checkpoints" / source.name
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    shutil.copyfile(source / "state.pt", beside / "state.pt")
    files = {"state.pt": meta.files["state.pt"]}
    dataclasses.replace(meta, state=TrainState(step), files=files).write(beside)
    drop_after(run, step - 1)
    beside.rename(folder)


def drop_after(run: Path, step: int) -> None:
    """Remove the run's checkpoints of later steps."""
    for folder in _folders(run):
        if (step_of(folder) or 0) > step:
            shutil.rmtree(folder)


def _prune(run: Path) -> None:
    for folder in set(_folders(run)) - set(list(states_of(run))[-2:]) - {best(run)}:
        shutil.rmtree(folder)


def _folders(run: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    steps = {folder: step_of(folder) for folder in (run / "checkpoints").glob("step-*")}
    return sorted((folder for folder, step in steps.items() if step is not None), key=lambda f: steps[f] or 0)


def states_of(run: Path) -> dict[Path, TrainState]:
    """The checkpoints with their states, oldest first. One without a readable state.json is named in a warning."""
    states = {}
    for folder in _folders(run):
        try:
            states[folder] = read_meta(folder).state
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; it is left out", stacklevel=2)
    return states


def _check_network(folder: Path, meta: Meta, ours: ModelConfig, data: str = "") -> None:
    """Raise ValueError with the differing settings if the checkpoint holds another network or, if both are known, data set."""
    theirs, wanted = _network_settings(config_of(folder, meta).model), _network_settings(ours)
    if data and meta.data:
        theirs["the data set's digest"], wanted["the data set's digest"] = meta.data[:16], data[:16]
    if found := differing(theirs, wanted):
        raise ValueError(
            f"checkpoint {folder} is of another configuration: it has {found}; give another --name, or delete "
            f"{folder.parents[1]}"
        )


def _network_settings(model: ModelConfig) -> dict[str, Any]:
    """The settings that decide which tensors a network has and what they compute, by flag name."""
    may_differ = marked("perturbed") | marked("resumable")
    built = dataclasses.replace(model, channels=model.channels or 3)  # as LGMNet reads it
    flat = Config.of(model=built).flat()
    return {name: value for name, value in flat.items() if name.startswith("model.") and name not in may_differ}
