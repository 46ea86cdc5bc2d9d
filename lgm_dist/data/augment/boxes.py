"""Random boxes in an image, for augmentations that need one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgm_dist.data.philox import uniform


def random_boxes(words: Tensor, shape: tuple[int, int, int], area: tuple[float, float], ratio: float) -> Tensor:
    """Words (..., 4) -> top, left, height, width (..., 4) of boxes inside images of `shape`, float32, in pixels.

    The share of the image's area is uniform in `area`, and height / width lies in 1 / ratio to ratio. Its square root is
    (1 + t) / (1 - t) with a uniform t: a ratio and its inverse are equally likely, and the logarithm is close to uniform (its
    density varies by 0.5 % for a ratio of 4/3, by 9 % for 10/3). Unlike an exponential, all of this is rounded alike on every
    device. A box that is higher or wider than the image is cut down to the image's height or width, so that there is nothing
    to draw again. The place is then uniform over all places inside the image, between the pixels too.
    """
    height, width, _ = shape
    share, turn, down, right = words.unbind(-1)  # (...) each
    most = (math.sqrt(ratio) - 1.0) / (math.sqrt(ratio) + 1.0)
    t = uniform(turn, -most, most)
    stretch = (1.0 + t) / (1.0 - t)
    side = (uniform(share, *area) * (height * width)).sqrt()
    high, wide = (side * stretch).clamp(max=height), (side / stretch).clamp(max=width)
    top, left = uniform(down) * (height - high), uniform(right) * (width - wide)
    return torch.stack([top, left, high, wide], dim=-1)  # (..., 4)
