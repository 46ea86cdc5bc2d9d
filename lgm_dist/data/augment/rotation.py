"""The rotation of the authors' pipeline: every class of an episode is rotated by one of five angles (protocol paper)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lgm_dist.data.augment import Augmentation, register_augmentation
from lgm_dist.data.philox import Purpose, bounded

ANGLES = (-45.0, -11.25, 0.0, 11.25, 45.0)
"""Degrees. Positive angles rotate counter-clockwise, as np.rot90 does."""

_POLE = math.sqrt(3.0) - 2.0
"""Pole of the recursive filter that turns samples into cubic B-spline coefficients."""
_PAD = 12
"""Border pixels. The filter's response decays by _POLE a pixel, to 1.4e-7 after 12."""


@register_augmentation("rotation")
class Rotation(Augmentation):
    """Rotates each class of an episode by one of ANGLES. The parameter is the angle's index.

    The result is float32 and equals scipy.ndimage.rotate(image, degrees, reshape=False, mode="nearest", order=3) in float
    arithmetic: cubic B-splines over replicated borders. As there, values beyond 0 and 255 are kept.
    """

    purpose = Purpose.ROTATION
    per_class = True
    variants = len(ANGLES)

    def draw(self, words: Tensor) -> Tensor:
        """words (..., 1) -> index of the angle (..., 1), int64."""
        return bounded(words, len(ANGLES))

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """See Augmentation. The result is float32. It is computed on the CPU; a GPU keeps the variants instead."""
        rotated = images.to(torch.float32, copy=True)  # (n, H, W, C)
        for number, degrees in enumerate(ANGLES):
            index = (parameters[:, 0] == number).nonzero()[:, 0]  # (m,)
            if degrees and len(index):
                rotated[index] = _rotate_by(rotated[index].cpu(), degrees).to(images.device)
        return rotated


def _rotate_by(images: Tensor, degrees: float) -> Tensor:
    n, height, width, channels = images.shape
    lines = images.numpy().transpose(1, 2, 0, 3).reshape(height, width, n * channels)  # (H, W, n*C)
    lines = _coefficients(lines)  # (H+2P, W, n*C)
    lines = _coefficients(lines.swapaxes(0, 1))  # (W+2P, H+2P, n*C)
    index, weight = _taps(height, width, degrees)  # (H*W, 16)
    flat = torch.from_numpy(lines).flatten(0, 1)  # ((W+2P)*(H+2P), n*C)
    rotated = embedding_bag(index, flat, per_sample_weights=weight, mode="sum")  # (H*W, n*C)
    return rotated.view(height, width, n, channels).permute(2, 0, 1, 3)  # (n, H, W, C)


def _coefficients(lines: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Samples along axis 0 to cubic B-spline coefficients, with P = 12 replicated samples at both ends.

    One recursion forwards and one backwards (Unser et al., IEEE Trans. PAMI 13, 1991), started as if the border went on for
    ever. Unlike a matrix product, elementwise sums round alike for any number of images. In numpy: torch would start its
    threads for each of these short sums, which takes several times as long on a busy machine.
    """
    lines = np.pad(lines, ((_PAD, _PAD), (0, 0), (0, 0)), mode="edge") * np.float32(6.0)
    pole = np.float32(_POLE)
    lines[0] /= np.float32(1.0 - _POLE)
    for i in range(1, len(lines)):
        lines[i] += pole * lines[i - 1]
    lines[-1] *= np.float32(_POLE / (_POLE - 1.0))
    for i in range(len(lines) - 2, -1, -1):
        np.subtract(lines[i + 1], lines[i], out=lines[i])
        lines[i] *= pole
    return lines


@lru_cache(maxsize=16)
def _taps(height: int, width: int, degrees: float) -> tuple[Tensor, Tensor]:
    """Where each output pixel reads the padded coefficients, and with what weight: both (H*W, 16)."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    rows, row_weight = _cubic(cosine * y + sine * x + (height - 1) / 2, height)  # (H, W, 4)
    columns, column_weight = _cubic(-sine * y + cosine * x + (width - 1) / 2, width)  # (H, W, 4)
    index = columns[..., None, :] * (height + 2 * _PAD) + rows[..., :, None]  # (H, W, 4, 4)
    weight = row_weight[..., :, None] * column_weight[..., None, :]  # (H, W, 4, 4)
    return torch.from_numpy(index).view(-1, 16), torch.from_numpy(weight).float().view(-1, 16)  # (H*W, 16)


def _cubic(source: npt.NDArray[np.float64], size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The four taps of a cubic B-spline at coordinates of an axis of `size` pixels: (H, W) -> two of (H, W, 4)."""
    last = size + 2 * _PAD - 1
    source = np.clip(source + _PAD, 0, last)
    start = np.floor(source).astype(np.int64)
    t = source - start
    weights = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3)
    index = np.clip(start[..., None] + np.arange(-1, 3), 0, last)  # (H, W, 4)
    return index, np.stack(weights, axis=-1) / 6.0  # (H, W, 4)
