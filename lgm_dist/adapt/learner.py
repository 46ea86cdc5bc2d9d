"""`load`: a trained learner by name, from a file or from a run's folder. It needs no data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.adapt import learner_file
from lgm_dist.checks import did_you_mean
from lgm_dist.config import Config
from lgm_dist.model import LGMNet
from lgm_dist.runs.checkpoint import ImageFacts, TrainState
from lgm_dist.runs.load import load_run

LEARNERS = Path(__file__).parent / "learners"
"""The learners that the package brings along: NAME.safetensors and its card, NAME.md."""


@dataclass(frozen=True)
class Learner:
    """A trained network and what belongs to it."""

    name: str
    """The name of a learner of the package, or the path of the file or the checkpoint's folder."""
    model: LGMNet
    """In evaluation mode, on the CPU."""
    config: Config
    """The configuration that it was trained with; a file has no paths in it."""
    state: TrainState
    """Its step, and its accuracy on val."""
    images: ImageFacts | None
    """The size and normalisation of images, and the base classes; None for a checkpoint of the first version."""

    def prepare(self, pixels: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise images as in training: uint8 (n, H, W, C) -> float32 (n, C, H, W), channels last in memory.

        Raises ValueError for images of another type, size or number of channels, and if the checkpoint lacks `images`.
        """
        images = self._images()
        x = torch.as_tensor(pixels)  # (n, H, W, C)
        wanted = (images.height, images.width, images.channels)
        if x.dtype != torch.uint8 or x.dim() != 4 or tuple(x.shape[1:]) != wanted:
            found = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            raise ValueError(
                f"pixels ({found}) must be uint8 (n, {', '.join(map(str, wanted))}), the size of the images that the network "
                "was trained on; resize them"
            )
        mean, std = (torch.tensor(values, device=x.device) for values in (images.mean, images.std))  # (C,)
        return x.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # (n, C, H, W)

    def save(self, path: str | Path, rank: int = learner_file.RANK) -> Path:
        """Write the learner to one file, which `load` reads without executing anything, and return its path.

        Weights of backbone and generator are kept in half precision. Of a whitening matrix (D, D), the `rank` components
        that differ most from the others are kept, and the others by their mean.

        Raises ValueError for a checkpoint of the first version, and OSError if the file cannot be written.
        """
        return learner_file.write(Path(path), self.model, self.config, self.state, self._images(), rank)

    def card(self) -> str:
        """What a learner of the package was trained on, how, and how accurate it is (Markdown); empty for others."""
        path = LEARNERS / f"{self.name}.md"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _images(self) -> ImageFacts:
        if self.images is None:
            raise ValueError(
                f"checkpoint {self.name} is of an earlier version, which did not keep the mean and size of its images; "
                "make them with load_images of lgm_dist.data.episodes from its data set, or train the run again"
            )
        return self.images

    def __repr__(self) -> str:
        accuracy = f", val accuracy {100 * self.state.val_accuracy:.2f} %" if self.state.val_accuracy >= 0 else ""
        return f"Learner({self.name!r}, step {self.state.step:,}{accuracy})"


def load(source: str | Path) -> Learner:
    """Load a trained learner.

    Args:
        source: The name of a learner of the package (`learners()`), a file of `Learner.save`, the folder of a run, whose
            checkpoint with the best val accuracy is taken, or a folder `checkpoints/step-...`. A copy on another machine
            will do, without the data set.

    Modules that register parts of your own (`config.run.plugins`) have to be imported before. Raises ValueError if there is
    no learner, or if it is damaged.
    """
    path = Path(source)
    if path.is_dir():
        run = load_run(path)
        return Learner(str(run.folder), run.model, run.config, run.state, run.images)
    if path.is_file():
        return Learner(str(path), *learner_file.read(path))
    if str(source) in learners():
        return Learner(str(source), *learner_file.read(LEARNERS / f"{source}.safetensors"))
    raise ValueError(
        f"there is no run, no file and no learner {str(source)!r}; name a run's folder, a file of Learner.save, or a learner "
        f"of the package ({did_you_mean(str(source), learners())})"
    )


def learners() -> list[str]:
    """Names of the learners that the package brings along."""
    return sorted(path.stem for path in LEARNERS.glob("*.safetensors"))
