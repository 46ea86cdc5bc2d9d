"""Images of a bank, normalised for the model and back to pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.streamed import BaseImages

_PAPER_MEAN, _PAPER_STD = 113.77, 70.1899  # the authors' data.py: one scalar each, for all channels
_VALUES_AT_ONCE = 2**20
"""Pixel values that the CPU normalises at a time. They stay in its cache from the bank's bytes to the last step."""


class Pixels(NamedTuple):
    """m images as they were prepared: rows of a tensor."""

    pixels: Tensor
    """(k, H, W, C) uint8"""
    rows: Tensor
    """(m,) int64: where the images are in `pixels`."""
    classes: Tensor
    """(m,) int64"""


class Normalisation:
    """Subtracts the mean and divides by the standard deviation of each channel, on one device."""

    def __init__(self, bank: BaseImages, config: Config, device: torch.device | str = "cpu") -> None:
        height, width, _ = bank.shape
        mean, std = statistics(bank, config)
        self._mean = torch.tensor(mean, device=device).repeat(height * width)  # (H*W*C,)
        self._std = torch.tensor(std, device=device).repeat(height * width)  # (H*W*C,)

    def __call__(
        self, pixels: Tensor, rows: Tensor, augment: Callable[[Tensor, slice], Tensor] | None = None
    ) -> Tensor:
        """Rows (m,) of `pixels` (n, H, W, C), normalised: (m, C, H, W) float32, channels_last in memory.

        `augment`, if given, changes a slice of the images before they are normalised: it gets (k, H, W, C) and the slice's
        place among the rows.
        """
        _, height, width, channels = pixels.shape
        out = torch.empty(len(rows), height * width * channels, device=pixels.device)
        at_once = max(_VALUES_AT_ONCE // out.shape[1], 1) if pixels.device.type == "cpu" else max(len(rows), 1)
        for first in range(0, len(rows), at_once):
            place = slice(first, first + at_once)
            images = pixels.index_select(0, rows[place])  # (k, H, W, C)
            images = augment(images, place) if augment else images
            out[place].copy_(images.flatten(1)).sub_(self._mean).div_(self._std)
        return out.view(-1, height, width, channels).permute(0, 3, 1, 2)  # (m, C, H, W)


def load_images(bank: ImageBank, config: Config, rows: npt.NDArray[np.int64]) -> Tensor:
    """The images of the given rows (n,), normalised, never augmented: (n, C, H, W) float32, channels_last in memory."""
    return Normalisation(bank, config)(bank.tensor, torch.from_numpy(rows))


def to_pixels(images: Tensor, bank: ImageBank, config: Config) -> npt.NDArray[np.float32]:
    """Normalised images (n, C, H, W) as pixels to show: (n, H, W, C), 0 to 1."""
    mean, std = statistics(bank, config)
    pixels = images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)  # (n, H, W, C)
    shown: npt.NDArray[np.float32] = (pixels / 255).clamp(0, 1).numpy()
    return shown


def statistics(bank: BaseImages, config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the normalisation, per channel on the 0 to 255 scale."""
    if config.episodes.protocol == "paper":
        return (_PAPER_MEAN,) * bank.channels, (_PAPER_STD,) * bank.channels
    return bank.mean, bank.std
