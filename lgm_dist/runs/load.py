"""The trained network of a run. It needs the run's checkpoints and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lgm_dist.config import Config
from lgm_dist.model import LGMNet
from lgm_dist.runs import checkpoint
from lgm_dist.runs.checkpoint import ImageFacts, TrainState


@dataclass(frozen=True)
class LoadedRun:
    """The network of a checkpoint and what belongs to it."""

    folder: Path
    """The checkpoint's folder."""
    model: LGMNet
    """In evaluation mode, on the CPU."""
    config: Config
    """The configuration that it was trained with."""
    state: TrainState
    """Its step, and its accuracy on val."""
    images: ImageFacts | None
    """The size and normalisation of images, and the base classes; None for a checkpoint of the first version."""


def load_run(folder: str | Path) -> LoadedRun:
    """Load the checkpoint of a run that was best on val, or one checkpoint.

    `folder` is a run's folder or one of its folders `checkpoints/step-...`; a copy on another machine will do, without the
    data set. Modules that register parts of your own (`config.run.plugins`) have to be imported before. Raises ValueError
    if there is no checkpoint or if it is damaged.
    """
    path = Path(folder)
    chosen = path if (path / "state.json").exists() else checkpoint.best(path)
    model, config, state = checkpoint.load_model(chosen)
    return LoadedRun(chosen, model, config, state, checkpoint.image_facts(chosen))


def start_from(folder: str | Path, model: LGMNet) -> None:
    """Give `model` the backbone of another run, and its classifier of the base classes if both have one of the same size.

    Raises ValueError if there is no checkpoint, or if its backbone does not fit.
    """
    theirs = load_run(folder).model
    assert isinstance(model.backbone, nn.Module)
    assert isinstance(theirs.backbone, nn.Module)
    ours = model.backbone.state_dict()
    counters = {name for name in (*ours, *theirs.backbone.state_dict()) if name.endswith(".calls")}  # of DropBlock
    kept = {name: tensor for name, tensor in theirs.backbone.state_dict().items() if name not in counters}
    try:
        model.backbone.load_state_dict(kept | {name: ours[name] for name in counters & ours.keys()})
    except RuntimeError:
        raise ValueError(
            f"start ({folder}) has another backbone ({theirs.config.backbone} with {theirs.config.filters} filters, norm "
            f"{theirs.config.norm}) than this run ({model.config.backbone} with {model.config.filters}, norm "
            f"{model.config.norm}); set model.backbone, model.filters and model.norm as there"
        ) from None
    if model.classifier is not None and theirs.config.base_outputs == model.config.base_outputs:
        assert theirs.classifier is not None
        model.classifier.load_state_dict(theirs.classifier.state_dict())
