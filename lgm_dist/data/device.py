"""Episodes made where the model is: sampling, augmentation and normalisation by torch on any device, the images resident there.

The same stream as `lgm_dist.data.episodes` makes in numpy, image for image: whole numbers and pixels are equal, noise up to
the last bit of the device's logarithm and cosine. Nothing waits for the host, and the first episode may be a tensor, so a
CUDA graph can hold all of it. Shapes as in `lgm_dist.data.episodes`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lgm_dist.config import SPLITS, Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import EpisodeBatch, check_episodes, statistics
from lgm_dist.data.philox import MULTIPLIERS, ROUNDS, WEYL, Purpose

_LOW = 0xFFFFFFFF


class DeviceSampler:
    """The stream of training episodes of protocol standard, made on `device`, where it keeps the bank's images (uint8).

    Raises ValueError for protocol paper, whose rotations are made in numpy, and as `check_episodes` does.
    """

    def __init__(self, bank: ImageBank, config: Config, device: torch.device | str) -> None:
        if config.protocol != "standard":
            raise ValueError(f"protocol ({config.protocol}) is not made on the device; use sample_episodes")
        check_episodes(config, bank.split, bank.name, bank.counts.tolist(), bank.classes)
        self.config, self.split, self.device = config, bank.split, torch.device(device)
        self.images = torch.from_numpy(np.array(bank.images)).to(self.device)  # (n, H, W, C)
        self.offsets = torch.from_numpy(bank.offsets).to(self.device)  # (classes + 1,)
        self.mean, self.std = (torch.tensor(s, device=self.device) for s in statistics(bank, config))  # (C,)
        self.query = config.query if bank.split == "train" else config.eval_query

    def __call__(self, start: int | Tensor, count: int) -> EpisodeBatch:
        """Episodes start … start + count - 1 of the stream; `start` a number or an int64 tensor () on the device."""
        n, k, q = self.config.ways, self.config.shot, self.query
        episodes = torch.arange(count, device=self.device) + start  # (B,)
        rows = self.rows(episodes)  # (B, N, K+Q)
        rows = torch.cat([rows[..., :k].flatten(1), rows[..., k:].flatten(1)], dim=1)  # (B, S+T)
        images = ((self._pixels(episodes, rows) - self.mean) / self.std).permute(0, 1, 4, 2, 3)  # (B, S+T, C, H, W)
        labels = torch.arange(n, device=self.device).repeat_interleave(q).expand(count, -1)  # (B, T)
        return EpisodeBatch(images, labels, self.noise(episodes), n * k)

    def rows(self, episodes: Tensor) -> Tensor:
        """What is drawn for each of the episodes (B,): the bank's rows (B, N, K + Q), of each class its shots first."""
        n, m = self.config.ways, self.config.shot + self.query
        sizes = self.offsets.diff()  # (classes,)
        classes = choose(self._words(Purpose.CLASSES, episodes, n), sizes.new_full((), len(sizes)))  # (B, N)
        words = self._words(Purpose.IMAGES, episodes, m * n).unflatten(1, (m, n)).transpose(1, 2)  # (B, N, K+Q)
        return self.offsets[classes][..., None] + choose(words, sizes[classes])  # (B, N, K+Q)

    def noise(self, episodes: Tensor) -> Tensor:
        """(B, 2, Z): Box-Muller in float64, then rounded."""
        words = self._words(Purpose.NOISE, episodes, 2 * self.config.model.noise_size)
        pairs = words.unflatten(1, (-1, 2)).double()  # (B, Z, 2)
        radius = (-2.0 * ((pairs[..., 0] + 1.0) / 2.0**32).log()).sqrt()
        angle = (2.0 * math.pi / 2.0**32) * pairs[..., 1]
        both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)  # (B, Z, 2)
        return both.float().view(len(episodes), 2, -1)

    def _pixels(self, episodes: Tensor, rows: Tensor) -> Tensor:
        """The images (B, S + T, H, W, C) uint8 of the rows (B, S + T), mirrored and moved where training is augmented."""
        if not (self.config.augment and self.split == "train"):
            return self.images[rows]
        images = rows.shape[1]
        words = self._words(Purpose.FLIP_SHIFT, episodes, 3 * images).unflatten(1, (images, 3))  # (B, S+T, 3)
        height, width = self.images.shape[1:3]
        (up, down), (left, right) = ((size // 8, 2 * (size // 8) + 1) for size in (height, width))
        flip = below(words[..., 0], 2)[..., None] == 1  # (B, S+T, 1)
        dy, dx = below(words[..., 1], down) - up, below(words[..., 2], right) - left  # (B, S+T)
        y = (torch.arange(height, device=self.device) - dy[..., None]).clamp(0, height - 1)  # (B, S+T, H)
        x = (torch.arange(width, device=self.device) - dx[..., None]).clamp(0, width - 1)  # (B, S+T, W)
        x = torch.where(flip, width - 1 - x, x)
        return self.images[rows[..., None, None], y[..., None], x[..., None, :]]

    def _words(self, purpose: Purpose, episodes: Tensor, count: int) -> Tensor:
        """`count` random words of 32 bits (B, count) of each of the episodes (B,), in int64; see `philox.draws`."""
        seed = self.config.seed if self.split == "train" else self.config.eval_seed
        block = torch.arange(-(-count // 4), device=self.device)  # (blocks,)
        episode = episodes[:, None].expand(-1, len(block))  # (B, blocks)
        stream = torch.full_like(episode, SPLITS.index(self.split) << 16 | purpose)
        counter = (block.expand_as(episode), episode & _LOW, episode >> 32, stream)
        words = philox(counter, (seed & _LOW, seed >> 32))
        return torch.stack(words, dim=-1).flatten(1)[:, :count]


Counter = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Philox4x32-10 of four equal shapes of 32-bit words in int64; a product of 64 bits wraps to the same bits."""
    c0, c1, c2, c3 = counter
    for turn in range(ROUNDS):
        k0, k1 = ((k + turn * w) & _LOW for k, w in zip(key, WEYL, strict=True))
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
    return c0, c1, c2, c3


def below(words: Tensor, n: int | Tensor) -> Tensor:
    """Whole numbers in 0 … n - 1, as `philox.below`."""
    return words * n >> 32


def choose(words: Tensor, sizes: Tensor) -> Tensor:
    """words (..., m), sizes (...) -> m ordered choices without replacement out of each size (..., m), as `philox.choose`."""
    rank = below(words, sizes[..., None] - torch.arange(words.shape[-1], device=words.device))  # (..., m)
    chosen = rank[..., :1]
    for j in range(1, words.shape[-1]):
        left = chosen.sort(-1)[0] - torch.arange(j, device=words.device)  # (..., j)
        chosen = torch.cat([chosen, rank[..., j, None] + (left <= rank[..., j, None]).sum(-1, keepdim=True)], dim=-1)
    return chosen
