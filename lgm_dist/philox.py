"""Philox4x32-10, a counter-based random generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Each counter gives its own random words, so there is no generator state to keep. A word is an unsigned 32-bit number in an int64
tensor. Nothing waits for the device, so that a CUDA graph can hold all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF
"""Mask of a word."""


class Philox:
    """The ten-round bijection with a key of two words, on one device."""

    def __init__(self, key: tuple[int, int], device: torch.device | str = "cpu") -> None:
        rounds = [[(word + turn * step) & LOW for word, step in zip(key, WEYL, strict=True)] for turn in range(ROUNDS)]
        self._keys = torch.tensor(rounds, device=device).flip(1)[..., None]  # (10, 2, 1): second word, first word
        self._multipliers = torch.tensor(MULTIPLIERS, device=device)[:, None]  # (2, 1)

    def __call__(self, counter: Tensor) -> Tensor:
        """Counters of four words (4, ...) -> four random words (4, ...)."""
        # (c0, c2) and (c3, c1): in this order one flip a round is enough
        flat = counter.reshape(4, -1)  # (4, n)
        c02, c31 = flat[::2], flat[1::2].flip(0)  # (2, n)
        for key in self._keys.unbind():
            product = self._multipliers * c02  # (2, n); int64 wraps to the bits of the unsigned product
            low = product & LOW
            product >>= 32
            product &= LOW
            product ^= c31
            product ^= key
            c02, c31 = product.flip(0), low
        return torch.stack([c02[0], c31[1], c02[1], c31[0]]).view_as(counter)
