"""Episodes made where the model is: sampling, augmentation and normalisation by torch on any device, the images resident there.

The same stream as `lgm_dist.data.episodes` makes in numpy, image for image: whole numbers and pixels are equal, noise up to
the last bit of the device's logarithm and cosine. Nothing waits for the host, so a CUDA graph can hold all of it. Shapes as in
`lgm_dist.data.episodes`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgm_dist.config import SPLITS, Config
from lgm_dist.data.augment import ANGLES, rotate
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import EpisodeBatch, check_episodes, statistics
from lgm_dist.data.philox import MULTIPLIERS, ROUNDS, WEYL, Purpose

_LOW = 0xFFFFFFFF
_AT_ONCE = 1024  # images that are rotated at a time


class Drawn(NamedTuple):
    """What was drawn for B episodes, on the device."""

    rows: Tensor
    """(B, S + T) int64: places in DeviceSampler.images, support first."""
    labels: Tensor
    """(B, T) int64"""
    noise: Tensor
    """(B, 2, Z) float32"""
    y: Tensor
    """(B, S + T, H) int16: the row of the image that each row of pixels shows."""
    x: Tensor
    """(B, S + T, W) int16: likewise, the columns."""


class DeviceSampler:
    """The stream of training episodes, made on `device`, where it keeps the bank's images.

    They are uint8; under protocol paper, whose rotations keep what overshoots, float32 and there once for each of the five
    angles: 61 KB an image of 32 x 32 pixels. Raises ValueError as `check_episodes` does.
    """

    def __init__(self, bank: ImageBank, config: Config, device: torch.device | str) -> None:
        check_episodes(config, bank.split, bank.name, bank.counts.tolist(), bank.classes)
        self.config, self.split, self.device = config, bank.split, torch.device(device)
        pixels = _rotated(bank) if config.episodes.protocol == "paper" else torch.from_numpy(np.array(bank.images))
        self.images = pixels.to(self.device)  # (n, H, W, C)
        self.offsets = torch.from_numpy(bank.offsets).to(self.device)  # (classes + 1,)
        self.mean, self.std = (torch.tensor(s, device=self.device) for s in statistics(bank, config))  # (C,)
        self.shape = config.episode(bank.split)
        self.shifted = config.episodes.protocol == "standard" and config.episodes.augment and bank.split == "train"

    def __call__(self, start: int, count: int) -> EpisodeBatch:
        """Episodes start … start + count - 1 of the stream."""
        return self.make(self.draw(torch.arange(start, start + count, device=self.device)))

    def draw(self, episodes: Tensor) -> Drawn:
        """Draws the episodes of these numbers (B,), int64. Takes as long for many as for few: hundreds of small kernels."""
        rows, labels = self._paper(episodes) if self.config.episodes.protocol == "paper" else self._standard(episodes)
        return Drawn(rows, labels, self._noise(episodes), *self._places(episodes, rows.shape[1]))

    def make(self, drawn: Drawn) -> EpisodeBatch:
        """The episodes that were drawn, their images augmented and normalised."""
        rows = drawn.rows
        if self.shifted:
            pixels = self.images[rows[..., None, None], drawn.y.long()[..., None], drawn.x.long()[..., None, :]]
        else:
            pixels = self.images[rows]  # (B, S+T, H, W, C)
        images = ((pixels - self.mean) / self.std).permute(0, 1, 4, 2, 3)  # (B, S+T, C, H, W)
        return EpisodeBatch(images, drawn.labels, drawn.noise, self.shape.ways * self.shape.shot)

    def _standard(self, episodes: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, S + T) and labels (B, T): of each class its shots and its queries."""
        n, k, q, _ = self.shape
        sizes, classes = self.offsets.diff(), self._classes(episodes)  # (classes,), (B, N)
        words = (
            self._words(Purpose.IMAGES, episodes, (k + q) * n).unflatten(1, (k + q, n)).transpose(1, 2)
        )  # (B, N, K+Q)
        rows = self.offsets[classes][..., None] + choose(words, sizes[classes])  # (B, N, K+Q)
        labels = torch.arange(n, device=self.device).repeat_interleave(q).expand(len(episodes), -1)  # (B, T)
        return torch.cat([rows[..., :k].flatten(1), rows[..., k:].flatten(1)], dim=1), labels

    def _paper(self, episodes: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, S + 1) of the rotated images and labels (B, 1): one query, which is turned as its class is."""
        n, k = self.shape.ways, self.shape.shot
        sizes, classes = self.offsets.diff(), self._classes(episodes)  # (classes,), (B, N)
        labels = below(self._words(Purpose.TARGET, episodes, 1), n)  # (B, 1)
        index = choose(self._words(Purpose.IMAGES, episodes, k + 1), sizes[classes].min(1)[0])  # (B, K+1)
        angles = below(self._words(Purpose.ROTATION, episodes, n), len(ANGLES))  # (B, N)
        first = self.offsets[classes] + angles * (len(self.images) // len(ANGLES))  # (B, N)
        support = (first[..., None] + index[:, None, :k]).flatten(1)  # (B, S)
        return torch.cat([support, first.gather(1, labels) + index[:, k:]], dim=1), labels

    def _classes(self, episodes: Tensor) -> Tensor:
        """(B, N)"""
        there = self.offsets.new_full((), len(self.offsets) - 1)
        return choose(self._words(Purpose.CLASSES, episodes, self.shape.ways), there)

    def _noise(self, episodes: Tensor) -> Tensor:
        """(B, 2, Z): Box-Muller in float64, then rounded."""
        words = self._words(Purpose.NOISE, episodes, 2 * self.config.model.noise_size)
        pairs = words.unflatten(1, (-1, 2)).double()  # (B, Z, 2)
        radius = (-2.0 * ((pairs[..., 0] + 1.0) / 2.0**32).log()).sqrt()
        angle = (2.0 * math.pi / 2.0**32) * pairs[..., 1]
        both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)  # (B, Z, 2)
        return both.float().view(len(episodes), 2, -1)

    def _places(self, episodes: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """y (B, S + T, H) and x (B, S + T, W) of images that are mirrored and moved; empty where none is."""
        if not self.shifted:
            empty = torch.empty(len(episodes), 0, dtype=torch.int16, device=self.device)
            return empty, empty
        words = self._words(Purpose.FLIP_SHIFT, episodes, 3 * images).unflatten(1, (images, 3))  # (B, S+T, 3)
        height, width = self.images.shape[1:3]
        (up, down), (left, right) = ((size // 8, 2 * (size // 8) + 1) for size in (height, width))
        flip = below(words[..., 0], 2)[..., None] == 1  # (B, S+T, 1)
        dy, dx = below(words[..., 1], down) - up, below(words[..., 2], right) - left  # (B, S+T)
        y = (torch.arange(height, device=self.device) - dy[..., None]).clamp(0, height - 1)  # (B, S+T, H)
        x = (torch.arange(width, device=self.device) - dx[..., None]).clamp(0, width - 1)  # (B, S+T, W)
        return y.to(torch.int16), torch.where(flip, width - 1 - x, x).to(torch.int16)

    def _words(self, purpose: Purpose, episodes: Tensor, count: int) -> Tensor:
        """`count` random words of 32 bits (B, count) of each of the episodes (B,), in int64; see `philox.draws`."""
        seed = self.config.run.seed if self.split == "train" else self.config.episodes.eval_seed
        block = torch.arange(-(-count // 4), device=self.device)  # (blocks,)
        episode = episodes[:, None].expand(-1, len(block))  # (B, blocks)
        stream = torch.full_like(episode, SPLITS.index(self.split) << 16 | purpose)
        counter = (block.expand_as(episode), episode & _LOW, episode >> 32, stream)
        words = philox(counter, (seed & _LOW, seed >> 32))
        return torch.stack(words, dim=-1).flatten(1)[:, :count]


def _rotated(bank: ImageBank) -> Tensor:
    """All images by the first angle, by the second …: (ANGLES * n, H, W, C) float32."""
    turned = torch.empty(len(ANGLES), *bank.images.shape)
    for angle in range(len(ANGLES)):
        for first in range(0, len(bank.images), _AT_ONCE):
            piece = bank.images[first : first + _AT_ONCE]
            turned[angle, first : first + len(piece)] = torch.from_numpy(rotate(piece, np.full(len(piece), angle)))
    return turned.flatten(0, 1)


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
