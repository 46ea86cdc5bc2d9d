"""Counter-based random numbers of the data.

A number is a pure function of (seed, split, purpose, episode, position). There is no generator state to save, to share among
workers or to restore, and no number depends on how many others are drawn.

A word is an unsigned 32-bit number in an int64 tensor. All functions run on the device of their arguments and never wait for
it, so that a CUDA graph can hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from lgm_dist.config import SPLITS, Split
from lgm_dist.philox import LOW, Philox


class Purpose(IntEnum):
    """What a random number decides. The numbers are part of the streams: never reuse one."""

    CLASSES = 0
    IMAGES = 1
    TARGET = 2
    ROTATION = 3
    FLIP_SHIFT = 4
    NOISE = 5
    CROP = 6
    FLIP = 7
    JITTER = 8
    RESIZED_CROP = 9
    ERASE = 10
    ORDER = 11
    MIXUP = 12
    SHARDS = 13
    BUFFER = 14
    FEATURE_COPY = 16
    HOLDOUT = 17
    COPIES = 32


FIRST_FREE_PURPOSE = 1000
"""Purposes from here up to LAST_PURPOSE are for augmentations from outside the package."""
LAST_PURPOSE = 2**16 - 1


class RandomWords:
    """Random words for any episodes: `RandomWords(seed, split, {purpose: words of an episode})(episodes)[purpose]`.

    The key is the 64-bit seed (low word, high word). The words of a counter are: block, episode (low, high), and
    65536 * number of the split + purpose. Block b holds words 4b to 4b + 3, so a longer draw begins with the shorter one.
    """

    def __init__(self, seed: int, split: Split, counts: Mapping[int, int], device: torch.device | str = "cpu") -> None:
        self._counts = counts
        blocks = {purpose: -(-count // 4) for purpose, count in counts.items()}
        streams = [SPLITS.index(split) << 16 | purpose for purpose, n in blocks.items() for _ in range(n)]
        self._block = torch.tensor([b for n in blocks.values() for b in range(n)], device=device)  # (blocks,)
        self._stream = torch.tensor(streams, device=device)  # (blocks,)
        self._philox = Philox((seed & LOW, seed >> 32), device)

    def __call__(self, episodes: Tensor) -> dict[int, Tensor]:
        """Words of the episodes (B,) by purpose: (B, count)."""
        counter = torch.empty(4, len(episodes), len(self._block), dtype=torch.int64, device=episodes.device)
        counter[0], counter[3] = self._block, self._stream
        counter[1], counter[2] = (episodes & LOW)[:, None], (episodes >> 32)[:, None]
        words = self._philox(counter).permute(1, 2, 0).flatten(1)  # (B, 4 * blocks)
        found, first = {}, 0
        for purpose, count in self._counts.items():
            found[purpose] = words[:, first : first + count]
            first += -(-count // 4) * 4
        return found


def bounded(words: Tensor, n: int | Tensor) -> Tensor:
    """Whole numbers in 0 to n - 1, uniform up to a bias of n / 2**32, by multiply and shift; n broadcasts with words."""
    return words * n >> 32


def uniform(words: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Real numbers from low to high: low plus one of 2**24 equally likely steps, float32, the same bits on all devices."""
    return (words >> 8).float() * 2.0**-24 * (high - low) + low


def choose(words: Tensor, sizes: Tensor) -> Tensor:
    """Ordered choices without replacement, m out of each size: words (..., m), sizes (...) -> (..., m).

    Choice j is element `bounded(word j, size - j)` of what choices 0 to j - 1 have left, as in a Fisher-Yates shuffle: every
    ordered choice is equally likely, and more choices leave the first ones as they are.
    """
    ranks = bounded(words, sizes[..., None] - torch.arange(words.shape[-1], device=words.device))  # (..., m)
    chosen = ranks.movedim(-1, 0).contiguous()  # (m, ...)
    for i in range(len(chosen) - 2, -1, -1):  # put choice i back: later ranks that reach its place move up by one
        later = chosen[i + 1 :]  # (m - 1 - i, ...)
        later += later >= chosen[i]
    return chosen.movedim(0, -1)  # (..., m)


def normals(words: Tensor) -> Tensor:
    """Standard normals by Box-Muller, in float64 and then rounded: words (..., 2n) -> float32 (..., 2n). None exceeds 6.67.

    The CPU computes them with numpy, whose logarithm and cosine the streams are made of. Those of another device may differ in
    the last bit.
    """
    if words.device.type == "cpu":
        pairs = words.unflatten(-1, (-1, 2)).numpy().astype(np.float64)  # (..., n, 2)
        radius = np.sqrt(-2.0 * np.log((pairs[..., 0] + 1.0) / 2.0**32))  # the logarithm's argument lies in (0, 1]
        angle = 2.0 * np.pi * pairs[..., 1] / 2.0**32
        both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # (..., n, 2)
        return torch.from_numpy(both.astype(np.float32)).flatten(-2)  # (..., 2n)
    double = words.unflatten(-1, (-1, 2)).double()  # (..., n, 2)
    distance = (-2.0 * ((double[..., 0] + 1.0) / 2.0**32).log()).sqrt()
    turn = (2.0 * math.pi / 2.0**32) * double[..., 1]
    return torch.stack([distance * turn.cos(), distance * turn.sin()], dim=-1).float().flatten(-2)  # (..., 2n)
