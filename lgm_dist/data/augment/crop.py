"""Random crops of the image with a border of zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lgm_dist.data.augment import Augmentation, register_augmentation
from lgm_dist.data.philox import Purpose, bounded


@register_augmentation("crop")
class Crop(Augmentation):
    """Adds H // 8 rows and W // 8 columns of zeros (black) on each side and cuts out H x W pixels at a random place.

    This is torchvision's RandomCrop(32, padding=4) at 32 x 32. Parameters: first row and first column of the crop in the
    enlarged image.
    """

    purpose = Purpose.CROP
    words = 2

    def draw(self, words: Tensor) -> Tensor:
        """words (..., 2) -> parameters (..., 2), int64."""
        height, width, _ = self.shape
        top, left = bounded(words[..., 0], 2 * (height // 8) + 1), bounded(words[..., 1], 2 * (width // 8) + 1)
        return torch.stack([top, left], dim=-1)  # (..., 2)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """See Augmentation. The result has the type of `images`."""
        n, height, width, channels = images.shape
        up, left = height // 8, width // 8
        large = pad(images, (0, 0, left, left, up, up)).contiguous()  # (n, H+2*up, W+2*left, C)
        # Each row of a crop is a run of W pixels in memory. `runs` views the run from every pixel on, without a copy.
        pixels = large.flatten(0, 2)  # (p, C)
        runs = pixels.as_strided((len(pixels) - width + 1, width * channels), (channels, 1))  # (p - W + 1, W*C)
        row = torch.arange(height, device=images.device) + parameters[:, :1]  # (n, H)
        row += torch.arange(n, device=images.device)[:, None] * large.shape[1]
        first = row * large.shape[2] + parameters[:, 1:]  # (n, H)
        return runs.index_select(0, first.flatten()).view(n, height, width, channels)  # (n, H, W, C)
