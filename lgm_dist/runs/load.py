"""`load_run`: the trained network of a run, ready to classify. It needs the run's checkpoints and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

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

    def prepare(self, pixels: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise images as in training: uint8 (n, H, W, C) -> float32 (n, C, H, W), channels last in memory.

        Raises ValueError for images of another type, size or number of channels, and if the checkpoint lacks `images`.
        """
        if self.images is None:
            raise ValueError(
                f"checkpoint {self.folder} is of an earlier version, which did not keep the mean and size of its images; "
                "make them with load_images of lgm_dist.data.episodes from its data set, or train the run again"
            )
        x = torch.as_tensor(pixels)  # (n, H, W, C)
        wanted = (self.images.height, self.images.width, self.images.channels)
        if x.dtype != torch.uint8 or x.dim() != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(
                f"pixels ({_in_words(x.dtype)} {tuple(x.shape)}) must be uint8 (n, {', '.join(map(str, wanted))}), "
                "the size of the images that the network was trained on; resize them"
            )
        mean, std = (torch.tensor(values, device=x.device) for values in (self.images.mean, self.images.std))  # (C,)
        return x.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # (n, C, H, W)

    def __repr__(self) -> str:
        accuracy = f", val accuracy {100 * self.state.val_accuracy:.2f} %" if self.state.val_accuracy >= 0 else ""
        return f"LoadedRun('{self.folder}', step {self.state.step:,}{accuracy})"


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


def _in_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
