"""Random mirroring."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.data.augment import Augmentation, register_augmentation
from lgm_dist.data.philox import Purpose, bounded


@register_augmentation("flip")
class Flip(Augmentation):
    """Mirrors half of the images left to right. The parameter is 1 if the image is mirrored, else 0."""

    purpose = Purpose.FLIP

    def draw(self, words: Tensor) -> Tensor:
        """words (..., 1) -> parameters (..., 1), int64."""
        return bounded(words, 2)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """See Augmentation. The result has the type of `images`."""
        both = torch.cat([images, images.flip(2)])  # (2n, H, W, C); a copy of whole images is faster than torch.where
        number = torch.arange(len(images), device=images.device)  # (n,)
        return both.index_select(0, number + parameters[:, 0] * len(images))  # (n, H, W, C)
