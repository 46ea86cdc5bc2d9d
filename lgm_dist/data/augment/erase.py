"""Random erasing (Zhong et al., AAAI 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.data.augment import Augmentation, exact_mean, register_augmentation
from lgm_dist.data.augment.boxes import random_boxes
from lgm_dist.data.philox import Purpose, bounded


@register_augmentation("erase")
class Erase(Augmentation):
    """Fills a random box of half of the images with the image's own mean colour.

    The box has 2 to 33 % of the area and a ratio of height to width of 0.3 to 1 / 0.3, as in torchvision's RandomErasing, but
    is not drawn again if it does not fit (see `random_boxes`). It covers the pixels whose middle lies inside. Parameters: top,
    left, height and width of the box in pixels; height 0 erases nothing.
    """

    purpose = Purpose.ERASE
    words = 5

    def draw(self, words: Tensor) -> Tensor:
        """words (..., 5) -> parameters (..., 4), float32."""
        top, left, height, width = random_boxes(words[..., 1:], self.shape, area=(0.02, 0.33), ratio=1 / 0.3).unbind(-1)
        return torch.stack([top, left, height * bounded(words[..., 0], 2), width], dim=-1)  # (..., 4)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """See Augmentation. The result has the type of `images`; a mean of uint8 is rounded."""
        top, left, height, width = parameters[..., None].unbind(1)  # (n, 1) each
        rows, columns = _inside(top, height, images.shape[1]), _inside(left, width, images.shape[2])  # (n, H), (n, W)
        mean = exact_mean(images, (1, 2))  # (n, C)
        fill = (mean if images.is_floating_point() else mean.round()).to(images.dtype)[:, None, None]  # (n, 1, 1, C)
        return torch.where((rows[:, :, None] & columns[:, None])[..., None], fill, images)  # (n, H, W, C)


def _inside(start: Tensor, size: Tensor, length: int) -> Tensor:
    """Which of `length` lines have their middle in [start, start + size), both (n, 1): (n, length)."""
    middle = torch.arange(length, device=start.device) + 0.5  # (length,)
    return (middle >= start) & (middle < start + size)
