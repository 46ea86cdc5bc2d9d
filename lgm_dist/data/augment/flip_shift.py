"""Random mirroring and shifts by up to an eighth of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.data.augment import Augmentation, register_augmentation
from lgm_dist.data.philox import Purpose, bounded


@register_augmentation("flip_shift")
class FlipShift(Augmentation):
    """Mirrors half of the images left to right and moves each by up to H // 8 rows and W // 8 columns.

    Pixels from outside the image are copies of the nearest border pixel. Parameters: whether to mirror, rows down, columns to
    the right.
    """

    purpose = Purpose.FLIP_SHIFT
    words = 3

    def draw(self, words: Tensor) -> Tensor:
        """words (..., 3) -> parameters (..., 3), int64."""
        up, left = self.shape[0] // 8, self.shape[1] // 8  # 4 of 32 pixels
        flip, down = bounded(words[..., 0], 2), bounded(words[..., 1], 2 * up + 1) - up
        return torch.stack([flip, down, bounded(words[..., 2], 2 * left + 1) - left], dim=-1)  # (..., 3)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """See Augmentation. The result has the type of `images`."""
        n, height, width, channels = images.shape
        flip, down, right = parameters[..., None].unbind(1)  # (n, 1) each
        y = (torch.arange(height, device=images.device) - down).clamp(
            0, height - 1
        )  # (n, H): the row that each row shows
        x = (torch.arange(width, device=images.device) - right).clamp(0, width - 1)  # (n, W): likewise, the column
        x = torch.where(flip == 1, width - 1 - x, x)  # (n, W)
        rows = torch.arange(n, device=images.device)[:, None] * height + y  # (n, H)
        moved = images.reshape(n * height, -1).index_select(0, rows.flatten()).view(n, height, -1)  # (n, H, W*C)
        values = x[..., None] * channels + torch.arange(channels, device=images.device)  # (n, W, C)
        return moved.gather(2, values.view(n, 1, -1).expand_as(moved)).view_as(images)  # (n, H, W, C)
