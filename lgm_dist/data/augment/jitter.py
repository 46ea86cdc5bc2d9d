"""Random brightness, contrast and saturation."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.data.augment import Augmentation, exact_mean, register_augmentation
from lgm_dist.data.philox import Purpose, uniform

STRENGTH = 0.4
"""Largest distance of a factor from 1, as in RFS (Tian et al., "Rethinking few-shot image classification", ECCV 2020)."""


@register_augmentation("jitter")
class Jitter(Augmentation):
    """Changes brightness, contrast and saturation, each by a factor that is uniform in 0.6 to 1.4.

    This is torchvision's ColorJitter(0.4, 0.4, 0.4) with two differences: the order is always brightness, contrast,
    saturation, and nothing is rounded to whole numbers in between. After each change, values are clamped to 0 to 255. Images
    of one channel have no saturation. Parameters: the three factors.
    """

    purpose = Purpose.JITTER
    words = 3

    def draw(self, words: Tensor) -> Tensor:
        """words (..., 3) -> parameters (..., 3), float32."""
        return uniform(words, 1.0 - STRENGTH, 1.0 + STRENGTH)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """See Augmentation. The result is float32."""
        n, height, width, channels = images.shape
        brightness, contrast, saturation = parameters[..., None].unbind(1)  # (n, 1) each
        # Channel by channel, because sums over channels that lie side by side in memory are slow.
        x = images.permute(3, 0, 1, 2).flatten(2)  # (C, n, H*W)
        x = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        x.mul_(brightness).clamp_(0.0, 255.0)
        _blend(x, _grey(exact_mean(x, 2))[:, None], contrast)
        if channels == 3:
            _blend(x, _grey(x), saturation)
        return x.view(channels, n, height, width).permute(1, 2, 3, 0).contiguous()  # (n, H, W, C)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> None:
    """x (C, n, H*W) becomes factor * x + (1 - factor) * other, clamped, in place; others broadcast.

    One operation at a time: in torch.lerp and the like a GPU may round once where a CPU rounds twice.
    """
    x.mul_(factor).add_((1.0 - factor) * other).clamp_(0.0, 255.0)


def _grey(x: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of (3, ...), or the only channel of (1, ...): (...)."""
    return (x[0] * 0.2989).add_(x[1] * 0.587).add_(x[2] * 0.114) if len(x) == 3 else x[0]
