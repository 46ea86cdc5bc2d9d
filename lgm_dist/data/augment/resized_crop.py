"""Random parts of the image, enlarged to its size."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.data.augment import Augmentation, register_augmentation
from lgm_dist.data.augment.boxes import random_boxes
from lgm_dist.data.philox import Purpose


@register_augmentation("resized_crop")
class ResizedCrop(Augmentation):
    """Enlarges a random box of the image to the image's size, bilinearly.

    The box has 20 to 100 % of the area, as public recipes for 32 x 32 pixels have it (SupCon, Khosla et al., NeurIPS 2020),
    and a ratio of height to width of 3/4 to 4/3. Unlike in torchvision's RandomResizedCrop, its edges lie between pixels too,
    it is not drawn again if it does not fit (see `random_boxes`), and pixels at its edge are interpolated with their
    neighbours outside. Parameters: top, left, height and width of the box in pixels.
    """

    purpose = Purpose.RESIZED_CROP
    words = 4

    def draw(self, words: Tensor) -> Tensor:
        """words (..., 4) -> parameters (..., 4), float32."""
        return random_boxes(words, self.shape, area=(0.2, 1.0), ratio=4 / 3)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """See Augmentation. The result is float32."""
        top, left, height, width = parameters.unbind(1)  # (n,) each
        rows = _resample(images.float(), top, height)  # (n, H, W, C)
        return _resample(rows.transpose(1, 2), left, width).transpose(1, 2).contiguous()  # (n, H, W, C)


def _resample(lines: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Lines (n, L, M, C) at L evenly spaced places of [start, start + size), by linear interpolation: (n, L, M, C)."""
    n, length = lines.shape[:2]
    middle = torch.arange(length, device=lines.device) + 0.5  # (L,): the middle of a line is half a line from its start
    place = (middle * (size / length)[:, None] + (start[:, None] - 0.5)).clamp(0, length - 1)  # (n, L)
    lower = place.floor()
    number = torch.stack([lower, (lower + 1).clamp(max=length - 1)]).long()  # (2, n, L)
    number += torch.arange(n, device=lines.device)[:, None] * length
    before, after = lines.reshape(n * length, -1).index_select(0, number.flatten()).chunk(2)  # (n*L, M*C) each
    # Not torch.lerp, in which a GPU may round once where a CPU rounds twice.
    return (after - before).mul_((place - lower).view(-1, 1)).add_(before).view(lines.shape)  # (n, L, M, C)
