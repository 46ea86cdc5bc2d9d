"""`load`: a trained learner by name, from a file or from a run's folder. It needs no data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.adapt import learner_file
from lgm_dist.checks import did_you_mean
from lgm_dist.config import Config
from lgm_dist.model import LGMNet
from lgm_dist.runs.checkpoint import ImageFacts, TrainState
from lgm_dist.runs.files import read_json
from lgm_dist.runs.load import load_run
from lgm_dist.training.calibration import Calibration

if TYPE_CHECKING:
    from lgm_dist.adapt.classifier import Classifier
    from lgm_dist.adapt.photos import Problem

LEARNERS = Path(__file__).parent / "learners"
"""The learners that the package brings along: NAME.safetensors and its card, NAME.md."""


CALIBRATION = "calibration.json"
"""In the folder of a run: the calibration of its checkpoint that was best on val."""


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
    calibration: Calibration | None = None
    """What makes its probabilities mean something; None before `calibrate`."""

    def adapt(self, photos: Problem) -> Classifier:
        """Make a classifier of labelled photos of new classes, in one forward pass.

        Args:
            photos: A folder of class folders, or the photos of each class by name: paths, PIL images, arrays (H, W, C) or
                tensors. 2 to 1,000 classes, each with any number of photos.

        A photo is read as `lgm-dist prepare folder` reads it, and resized to the size that the learner knows. Raises ValueError
        for a photo that cannot be read, and for classes of unequal size if a part of the network needs equal ones.
        """
        return self.adapt_many([photos])[0]

    def adapt_many(self, problems: Sequence[Problem]) -> list[Classifier]:
        """Make the classifiers of several problems, whose photos are embedded together: the same as `adapt` makes of each.

        Raises ValueError as `adapt`.
        """
        from lgm_dist.adapt.classifier import adapt_many

        return adapt_many(self, problems)

    def prepare(self, pixels: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise images as in training: uint8 (n, H, W, C) -> float32 (n, C, H, W), channels last in memory.

        Raises ValueError for images of another type, size or number of channels, and if the checkpoint lacks `images`.
        """
        images = self.image_facts()
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

        Weights of backbone and generator are kept in half precision. Of a whitening matrix (D, D), the `rank` components of
        most variance are kept, and the others are replaced by their mean.

        Raises ValueError for a checkpoint of the first version, and OSError if the file cannot be written.
        """
        return learner_file.write(Path(path), learner_file.pack(self.contents(), rank))

    def contents(self) -> learner_file.Contents:
        """What its file holds. Raises ValueError for a checkpoint of the first version."""
        return learner_file.Contents(self.model, self.config, self.state, self.image_facts(), self.calibration)

    def card(self) -> str:
        """What a learner of the package was trained on, how, and how accurate it is (Markdown); empty for others."""
        path = LEARNERS / f"{self.name}.md"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W, C of the images that the network sees. Raises ValueError as `image_facts`."""
        facts = self.image_facts()
        return facts.height, facts.width, facts.channels

    def image_facts(self) -> ImageFacts:
        """`images`. Raises ValueError for a checkpoint of the first version."""
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
        return Learner(str(run.folder), run.model, run.config, run.state, run.images, _calibration_of(run.folder))
    if path.is_file():
        return Learner(str(path), *learner_file.read(path))
    if str(source) in learners():
        return Learner(str(source), *learner_file.read(LEARNERS / f"{source}.safetensors"))
    raise ValueError(
        f"there is no run, no file and no learner {str(source)!r}; name a run's folder, a file of Learner.save, or a learner "
        f"of the package ({did_you_mean(str(source), learners())})"
    )


def _calibration_of(checkpoint: Path) -> Calibration | None:
    """What `lgm-dist export` has written beside the checkpoints of a run; of this very checkpoint alone."""
    path = checkpoint.parent.parent / CALIBRATION
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        return Calibration.from_dict(record) if record["checkpoint"] == checkpoint.name else None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or write it again with lgm-dist export") from None


def learners() -> list[str]:
    """Names of the learners that the package brings along."""
    return sorted(path.stem for path in LEARNERS.glob("*.safetensors"))
