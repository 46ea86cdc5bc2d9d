"""ImageBank: the decoded images of one split, grouped by class, in a memory-mapped file shared by all processes of a node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lgm_dist.config import Split


@dataclass(frozen=True)
class ImageBank:
    """All images of one split; class c owns rows offsets[c] to offsets[c + 1]."""

    name: str
    """Data set."""
    split: Split
    images: npt.NDArray[np.uint8]
    """(n, H, W, C), memory-mapped and read-only."""
    offsets: npt.NDArray[np.int64]
    """(classes + 1,)"""
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    """Superclass (or script) of each class, "" where there is none."""
    mean: tuple[float, ...]
    """Per channel over the images of the train split, on the 0 to 255 scale."""
    std: tuple[float, ...]
