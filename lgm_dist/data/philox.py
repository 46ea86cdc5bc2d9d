"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of (seed, split, purpose, episode, position): there is no state to save, to share among
workers or to restore, and no draw depends on how many others were made.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from lgm_dist.config import SPLITS, Split

Words = npt.NDArray[np.uint32]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Purpose(IntEnum):
    """What a draw decides; each purpose has a stream of its own. The numbers are part of the streams: never reuse one."""

    CLASSES = 0
    IMAGES = 1
    TARGET = 2
    ROTATION = 3
    FLIP_SHIFT = 4
    NOISE = 5


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> Words:
    """The ten-round bijection: counter (..., 4) of 32-bit words and a key of two -> (..., 4) random 32-bit words."""
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    for turn in range(ROUNDS):
        k0, k1 = (np.uint64((k + turn * w) & 0xFFFFFFFF) for k, w in zip(key, WEYL, strict=True))
        p0, p1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)  # (..., 4)


def draws(seed: int, split: Split, purpose: Purpose, episodes: npt.NDArray[np.int64], count: int) -> Words:
    """`count` random 32-bit words of each episode: episodes (B,) -> (B, count).

    The key is the 64-bit seed (low word, high word). The counter's words are: block, episode (low, high), and
    65536 * number of the split + purpose. Block b holds words 4b to 4b + 3, so a longer draw begins with the shorter.
    """
    blocks = -(-count // 4)
    counter = np.empty((len(episodes), blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = (episodes.astype(np.uint64) & _LOW)[:, None]
    counter[..., 2] = (episodes.astype(np.uint64) >> _HALF)[:, None]
    counter[..., 3] = SPLITS.index(split) << 16 | purpose
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))  # (B, blocks, 4)
    return words.reshape(len(episodes), 4 * blocks)[:, :count]  # (B, count)


def below(words: Words, n: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Whole numbers in 0 .. n - 1, uniform up to a bias of n / 2**32, by multiply and shift; n broadcasts with words."""
    product = words.astype(np.uint64) * np.asarray(n).astype(np.uint64)
    return (product >> _HALF).astype(np.int64)


def normals(words: Words) -> npt.NDArray[np.float32]:
    """Standard normals by Box-Muller, in float64 and then rounded: words (..., 2n) -> (..., 2n). None exceeds 6.67."""
    pairs = words.reshape(*words.shape[:-1], -1, 2).astype(np.float64)  # (..., n, 2)
    radius = np.sqrt(-2.0 * np.log((pairs[..., 0] + 1.0) / 2.0**32))  # the logarithm's argument lies in (0, 1]
    angle = 2.0 * np.pi * pairs[..., 1] / 2.0**32
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # (..., n, 2)
    return both.reshape(words.shape).astype(np.float32)  # (..., 2n)


def choose(words: Words, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ordered choices without replacement, of words.shape[1] out of sizes[r] in row r: (R, m), (R,) -> (R, m).

    Choice j is the below(word j, size - j)-th of what choices 0 .. j - 1 left, as in a Fisher-Yates shuffle: every
    ordered choice is equally likely, and more choices leave the first ones as they are. Costs O(m**2) a row, whatever
    the size.
    """
    rank = below(words, sizes[:, None] - np.arange(words.shape[1])).T.astype(np.int32)  # (m, R)
    chosen = np.empty_like(rank)
    taken: list[npt.NDArray[np.int32]] = []  # the choices so far, (R,) each, in every row in rising order
    for j, number in enumerate(rank.copy()):
        for before in taken:
            number += before <= number  # the rank counts what is left, so each one taken below moves it up
        chosen[j] = number
        for t, before in enumerate(taken):  # insert it
            taken[t], number = np.minimum(before, number), np.maximum(before, number)
        taken.append(number)
    return chosen.T.astype(np.int64)
