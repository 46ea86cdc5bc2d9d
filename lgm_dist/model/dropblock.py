"""DropBlock: squares of activations are set to zero in training (Ghiasi et al., NeurIPS 2018).

What an image loses is a function of its own bits, the layer, and a counter of the training steps in the state_dict. So it
does not depend on which worker has the image or on the rest of the batch, and a resumed run drops the same activations.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from lgm_dist.philox import LOW, Philox

KEY = (0x44524F50, 0x424C4F4B)
"""Key of the random words: "DROPBLOK"."""
LEVELS = 2**16
"""A random word gives two draws of this many levels."""
BLOCKS_AT_ONCE = 32 * 1024
"""Counters that a CPU turns into random words together; they fit into its cache."""
_HASH_FACTOR = 0x1E3779B97F4A7C15
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class DropBlock(nn.Module):
    """Sets squares of `size` x `size` activations to zero in training and scales the others, so that the mean stays.

    The squares of a channel are those of no other. They lie inside the map and may overlap; `share` of the activations are
    zero on average. With `size` 1 this is dropout. Layers with other numbers `layer` drop independently of each other.
    """

    calls: Tensor
    """How often it was called in training."""

    def __init__(self, share: float, size: int, layer: int) -> None:
        super().__init__()
        self.share, self.size, self.layer = share, size, layer
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, hashes: Tensor) -> Tensor:
        """x (n, F, h, w) and the images' hashes (n,), see `image_hashes` -> the same shape as x, which it is in evaluation.

        Raises ValueError for a map that is smaller than the squares.
        """
        if not self.training:
            return x
        n, channels, height, width = x.shape
        if self.size > min(height, width):
            raise ValueError(
                f"model.drop_size ({self.size}) must be at most {min(height, width)} for maps of {height} x {width}"
            )
        level, kept = _level(self.share, self.size, height, width)
        rows, columns = height - self.size + 1, width - self.size + 1
        with torch.no_grad():
            self.calls.add_(1)
            draws = self._draws(hashes, rows * columns * channels)  # (n, rows * columns * F)
            corners = (draws < level - LEVELS // 2).view(n, rows, columns, channels)
            dropped = _squares(corners, self.size).permute(0, 3, 1, 2)  # (n, F, h, w), channels last in memory
        return (x / kept).masked_fill_(dropped, 0)  # in place, as masked_fill returns channels first

    def _draws(self, hashes: Tensor, count: int) -> Tensor:
        """`count` whole numbers from -LEVELS / 2 to LEVELS / 2 - 1 for each image, by its hash (n,): int16 (n, count)."""
        blocks = torch.arange(-(-count // 8), device=hashes.device)  # (b,); a block has four words, so eight draws
        at_once = len(hashes) if hashes.is_cuda else max(BLOCKS_AT_ONCE // len(blocks), 1)
        words = torch.cat([self._words(piece, blocks) for piece in hashes.split(at_once)])  # (n, b, 4)
        return words.flatten(1).view(torch.int16)[:, :count]  # (n, count)

    def _words(self, hashes: Tensor, blocks: Tensor) -> Tensor:
        """Random words by hashes (n,) and numbers of blocks (b,): int32 (n, b, 4), read as unsigned."""
        counter = torch.empty(4, len(hashes), len(blocks), dtype=torch.int64, device=hashes.device)
        counter[0], counter[1] = blocks, hashes[:, None]
        counter[2], counter[3] = self.calls & LOW, self.layer
        return _philox(hashes.device)(counter).permute(1, 2, 0).to(torch.int32)  # (n, b, 4)


@torch.no_grad()
def image_hashes(images: Tensor) -> Tensor:
    """A word for each image, from all its bits: (n, C, H, W) float -> (n,). The upper half of a polynomial modulo 2^64."""
    bits = images.view(_INTEGERS[images.element_size()]).flatten(1).long()  # (n, C * H * W)
    factors = torch.full((bits.shape[1],), _HASH_FACTOR, device=bits.device).cumprod(0)  # (C * H * W,); int64 wraps
    return (bits * factors).sum(1) >> 32 & LOW


@functools.cache
def _philox(device: torch.device) -> Philox:
    return Philox(KEY, device)


def _squares(corners: Tensor, size: int) -> Tensor:
    """The upper left corners of squares (n, h - size + 1, w - size + 1, F) -> what the squares cover (n, h, w, F)."""
    if size == 1:
        return corners
    n, rows, columns, channels = corners.shape
    covered = corners.new_zeros(n, rows + size - 1, columns + size - 1, channels)
    for i in range(size):
        for j in range(size):
            covered[:, i : i + rows, j : j + columns] |= corners
    return covered


@functools.cache
def _level(share: float, size: int, height: int, width: int) -> tuple[int, float]:
    """How many of the LEVELS make a place the corner of a square, and the share of activations that are kept then.

    The first is the number with which the dropped share is nearest to `share`, found by bisection.
    """

    def corners_over(length: int) -> list[int]:
        """For each place, how many squares of a row can cover it."""
        return [min(i, length - size) - max(0, i - size + 1) + 1 for i in range(length)]

    many = [a * b for a in corners_over(height) for b in corners_over(width)]

    def kept(level: int) -> float:
        return sum((1 - level / LEVELS) ** covers for covers in many) / len(many)

    low, high = 0, LEVELS - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if 1 - kept(middle) < share else (low, middle)
    level = min(low, high, key=lambda level: abs(1 - kept(level) - share))
    return level, kept(level)
