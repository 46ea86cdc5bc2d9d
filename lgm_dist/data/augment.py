"""Augmentation of batches of images: flips and shifts, and the rotation of the authors' pipeline.

Both give an image the same bits whatever else is in the batch, so that an episode does not depend on how the
meta-batch is sliced over workers.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]

ANGLES = (-45.0, -11.25, 0.0, 11.25, 45.0)
"""Degrees, positive as np.rot90 turns (counter-clockwise)."""

_POLE = math.sqrt(3.0) - 2.0  # of the recursive filter that turns samples into cubic B-spline coefficients
_PAD = 12  # border pixels; the filter's answer decays by _POLE a pixel, to 1.4e-7 after 12


def flip_shift(images: Pixels, flip: npt.NDArray[np.bool_], dy: Index, dx: Index) -> Pixels:
    """Mirror the images marked in `flip` left to right, then move each by dy rows down and dx columns to the right.

    Shapes: images (n, H, W, C), the others (n,). Pixels from outside are copies of the nearest border pixel.
    """
    n, height, width, channels = images.shape
    reach = int(np.abs(dx).max(initial=0))
    wide = np.empty((n, height, width + 2 * reach, channels), np.uint8)
    middle = wide[:, :, reach : reach + width]
    middle[...] = images
    index = np.flatnonzero(flip)
    chosen = torch.from_numpy(images[index]).permute(0, 3, 1, 2)  # (f, C, H, W), the layout torch flips fastest
    middle[index] = chosen.flip(3).permute(0, 2, 3, 1).numpy()  # (f, H, W, C)
    wide[:, :, :reach] = middle[:, :, :1]
    wide[:, :, reach + width :] = middle[:, :, -1:]
    # Row y of the answer is a window of a row of `wide`: one gather of whole windows, each a single item, does both shifts.
    window = np.dtype((np.void, width * channels))
    windows = np.ndarray((n, height, 2 * reach + 1), window, wide, strides=wide.strides[:3])
    row = np.clip(np.arange(height) - dy[:, None], 0, height - 1)  # (n, H)
    moved = windows[np.arange(n)[:, None], row, reach - dx[:, None]]  # (n, H)
    pixels: Pixels = moved.view(np.uint8).reshape(images.shape)
    return pixels


def rotate(images: Pixels, angle: Index) -> npt.NDArray[np.float32]:
    """Rotate image i by ANGLES[angle[i]] degrees: (n, H, W, C), (n,) -> (n, H, W, C) float32 on the 0 to 255 scale.

    The same as scipy.ndimage.rotate(image, degrees, reshape=False, mode="nearest", order=3) in float arithmetic:
    cubic B-splines over replicated borders. As there, overshoot beyond 0 and 255 is kept.
    """
    turned = images.astype(np.float32)
    for number, degrees in enumerate(ANGLES):
        index = np.flatnonzero(angle == number)
        if degrees and len(index):
            turned[index] = _rotate_by(turned[index], degrees)
    return turned


def _rotate_by(images: npt.NDArray[np.float32], degrees: float) -> npt.NDArray[np.float32]:
    n, height, width, channels = images.shape
    lines = images.transpose(1, 2, 0, 3).reshape(height, width, n * channels)  # (H, W, n*C)
    lines = _coefficients(lines)  # (H+2P, W, n*C)
    lines = _coefficients(lines.swapaxes(0, 1))  # (W+2P, H+2P, n*C)
    index, weight = _taps(height, width, degrees)
    flat = torch.from_numpy(lines).flatten(0, 1)  # ((W+2P)*(H+2P), n*C)
    turned = torch.nn.functional.embedding_bag(index, flat, per_sample_weights=weight, mode="sum").numpy()  # (H*W, n*C)
    rotated: npt.NDArray[np.float32] = turned.reshape(height, width, n, channels).transpose(2, 0, 1, 3)
    return rotated  # (n, H, W, C)


def _coefficients(lines: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Samples along axis 0 to cubic B-spline coefficients, with P = 12 replicated samples at both ends.

    One recursion forwards and one backwards (Unser et al., IEEE Trans. PAMI 13, 1991), started as if the border went
    on for ever. Elementwise sums, unlike a matrix product, round alike for any number of images.
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


def _cubic(source: npt.NDArray[np.float64], size: int) -> tuple[Index, npt.NDArray[np.float64]]:
    """The four taps of a cubic B-spline at a coordinate of an axis of `size` pixels: (H, W) -> two of (H, W, 4)."""
    last = size + 2 * _PAD - 1
    source = np.clip(source + _PAD, 0, last)
    start = np.floor(source).astype(np.int64)
    t = source - start
    weights = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3)
    index = np.clip(start[..., None] + np.arange(-1, 3), 0, last)  # (H, W, 4)
    return index, np.stack(weights, axis=-1) / 6.0  # (H, W, 4)
