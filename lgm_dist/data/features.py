"""FeatureBank: feature maps of the images of a split under a frozen backbone, in a memory-mapped file that all processes of a
node share; and episodes of them.

A row of the bank is an image in one variant, and has a number of augmented copies. Copy c of an image in a variant is a pure
function of (seed, split, row of the image, c), and so an episode of features is a pure function of its index.

Shapes: n rows, A copies, F channels and h x w pixels of a map, m images of C channels and H x W pixels; else as in
`lgm_dist.data.episodes`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import Config, Split
from lgm_dist.console import notify
from lgm_dist.data.augment import augmentations_of
from lgm_dist.data.bank import ImageBank, cache_folder, make_once
from lgm_dist.data.episodes import EpisodeBatch, check_episodes, episode_seed, standard_rows
from lgm_dist.data.holdout import episode_classes
from lgm_dist.data.images import Normalisation, statistics
from lgm_dist.data.philox import Purpose, RandomWords, bounded, choose, normals

Embed = Callable[[Tensor], Tensor]
"""Normalised images (m, C, H, W), channels last in memory -> feature maps (m, F, h, w) on any device."""
_AT_ONCE = 256
"""Images that are embedded at once."""
_COPY, _FIRST = 2**40, 2**62
"""Copy c of image i takes the augmentation's random words number _FIRST + c * _COPY + i, which no episode reaches."""


class Variant(NamedTuple):
    """A change of all images of a class that makes another class of it."""

    turns: int
    """Turns by 90 degrees counter-clockwise."""
    channels: int
    """Places by which the channels are moved on: red becomes green, green blue, and blue red."""

    def apply(self, images: Tensor) -> Tensor:
        """images (m, H, W, C) -> (m, H, W, C)."""
        return images.rot90(self.turns, (1, 2)).roll(self.channels, 3)

    @property
    def name(self) -> str:
        """What it adds to the name of a class."""
        turned, moved = f", turned {90 * self.turns}", f", channels {self.channels}"
        return turned * bool(self.turns) + moved * bool(self.channels)


def variants_of(config: Config, split: Split) -> list[Variant]:
    """The variants of each class of a split, the images as they are first; training classes alone have others."""
    wanted = config.generator.variants if split == "train" else "none"
    turns = range(4 if wanted in ("rotations", "all") else 1)
    return [Variant(*both) for both in product(turns, range(3 if wanted in ("channels", "all") else 1))]


def check_variants(shape: tuple[int, int, int], config: Config) -> None:
    """Raise ValueError for variants that images of `shape` H, W, C cannot have."""
    (height, width, channels), variants = shape, variants_of(config, "train")
    if any(v.turns % 2 for v in variants) and height != width:
        raise ValueError(
            f"generator.variants (rotations) need square images, and these are {width} x {height}; use none or channels"
        )
    if any(v.channels for v in variants) and channels == 1:
        raise ValueError("generator.variants (channels) need colour images, and these are grey; use none or rotations")


@dataclass(frozen=True)
class FeatureBank:
    """Feature maps of a split. Class c, which may be a made-up one, owns rows offsets[c] to offsets[c + 1] - 1."""

    name: str
    """Name of the data set."""
    split: Split
    features: npt.NDArray[np.float32]
    """(n, A, h, w, F), memory-mapped and read-only. float32: FC100's train split in 4 copies takes 147 MB for maps of
    64 x 2 x 2, so that float16 would save little, and each gather would have to convert."""
    offsets: npt.NDArray[np.int64]
    """(classes + 1,)"""
    classes: tuple[str, ...]
    """Name of each class."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Rows of each class, (classes,)."""
        return np.diff(self.offsets)

    @cached_property
    def tensor(self) -> Tensor:
        """The memory of `features` as a tensor of copies, (n * A, h, w, F). Writing to it would end the process."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.features).flatten(0, 1)

    def as_images(self) -> ImageBank:
        """Copy 0 of each row as an image of F channels that normalisation leaves as it is.

        For `lgm_dist.training.evaluation.evaluate` with a network that takes feature maps, see `LGMNet.on_features`.
        """
        zeros, ones, groups = (
            (0.0,) * self.features.shape[-1],
            (1.0,) * self.features.shape[-1],
            ("",) * len(self.classes),
        )
        maps: npt.NDArray[np.uint8] = self.features[:, 0]  # type: ignore[assignment]
        return ImageBank(self.name, self.split, maps, self.offsets, self.classes, groups, zeros, ones)


def open_features(
    bank: ImageBank, config: Config, embed: Embed, network: str, waiting: Callable[[], None] | None = None
) -> FeatureBank:
    """The features of the images of `bank`, stored in the cache folder when they are first asked for.

    Split train has the classes of the episodes (see `episode_classes`) in all variants, augmented; the others have all images
    as they are, in one copy. The files are named by a digest of all that they depend on; they may be deleted at any time.

    Args:
        bank: The images.
        config: Gives the copies, variants, classes, augmentations and seed.
        embed: The frozen backbone.
        network: A digest of the backbone and its weights.
        waiting: Called every second while another process makes the same file.

    Raises ValueError if the cache cannot be written, and for variants that the images cannot have.
    """
    copies = _Copies(bank, config)
    shape = (copies.rows, copies.count, *_embedded(embed, copies.first()).shape[1:])
    facts = {"data": [bank.name, bank.digest], "network": network, "shape": shape, **copies.facts()}
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = (bank.folder or cache_folder(config.data.cache)) / f"{bank.name}-{bank.split}-{digest[:32]}.features"
    make_once(path, 4 * int(np.prod(shape)), partial(_write, copies, embed), waiting)
    features = np.asarray(np.memmap(path, np.float32, "r", shape=shape))  # (n, A, h, w, F)
    counts = np.tile(bank.counts[copies.used], len(copies.variants))  # (classes,)
    classes = tuple(bank.classes[c] + v.name for v in copies.variants for c in copies.used)
    return FeatureBank(bank.name, bank.split, features, np.cumsum([0, *counts], dtype=np.int64), classes)


def _write(copies: _Copies, embed: Embed, target: Path) -> None:
    """Write the features of all copies, row by row, to the disk."""
    notify(f"embedding {copies.rows * copies.count:,} images of {copies.bank.name}, split {copies.bank.split}")
    with target.open("wb") as file:
        for images in copies:
            file.write(_embedded(embed, images).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def _embedded(embed: Embed, images: Tensor) -> Tensor:
    """images (m, C, H, W) -> features (m, h, w, F) float32 on the CPU."""
    return embed(images).permute(0, 2, 3, 1).float().cpu().contiguous()


class _Copies:
    """The images whose features a bank holds, in its order: variants, of each the rows, of each the copies."""

    def __init__(self, bank: ImageBank, config: Config) -> None:
        self.bank, self.variants = bank, variants_of(config, bank.split)
        check_variants(bank.shape, config)
        self._augmentations = [make(bank.shape) for make in augmentations_of(config, bank.split)]
        self.count = config.generator.copies if self._augmentations else 1
        self.used = episode_classes(config, bank.split, len(bank.classes))  # (classes,)
        spans = [np.arange(bank.offsets[c], bank.offsets[c + 1]) for c in self.used]
        self._images = torch.from_numpy(np.concatenate(spans)).repeat_interleave(self.count)  # (rows of a variant * A,)
        self._config, self._normalise = config, Normalisation(bank, config)
        self._words = RandomWords(config.run.seed, bank.split, {a.purpose: a.words for a in self._augmentations})

    @property
    def rows(self) -> int:
        """n"""
        return len(self._images) // self.count * len(self.variants)

    def facts(self) -> dict[str, object]:
        """What the images depend on besides the data set."""
        names = self._config.episodes.augmentations if self._augmentations else ()
        return {
            "split": self.bank.split,
            "normalisation": statistics(self.bank, self._config),
            "augmentations": [*names, self._config.run.seed] if names else [],
            "variants": self.variants,
            "classes": self.used.tolist(),
        }

    def first(self) -> Tensor:
        """The first image (1, C, H, W)."""
        return self._make(self.variants[0], slice(0, 1))

    def __iter__(self) -> Iterator[Tensor]:
        """All of them, (m, C, H, W) at a time."""
        for variant in self.variants:
            for start in range(0, len(self._images), _AT_ONCE):
                yield self._make(variant, slice(start, start + _AT_ONCE))

    def _make(self, variant: Variant, place: slice) -> Tensor:
        rows = self._images[place]  # (m,)
        copies = torch.arange(len(self._images))[place] % self.count  # (m,)
        words = self._words(_FIRST + copies * _COPY + rows) if self._augmentations else {}
        drawn = [a.draw(words[a.purpose]) for a in self._augmentations]  # (m, P) each

        def change(images: Tensor, part: slice) -> Tensor:
            images = variant.apply(images)
            for augmentation, parameters in zip(self._augmentations, drawn, strict=True):
                images = augmentation.apply(images, parameters[part])
            return images

        return self._normalise(self.bank.tensor, rows, change)  # (m, C, H, W)


class FeatureSampler:
    """Makes episodes of a feature bank on a device: `FeatureSampler(bank, config)(start, count)`.

    An episode of a bank with all classes and no variants has the images of `EpisodeSampler`'s episode of the same number.
    On the CPU it reads the mapped file; another device keeps all features.

    Raises ValueError if the bank has too few classes or too few images of a class.
    """

    def __init__(self, bank: FeatureBank, config: Config, device: torch.device | str = "cpu") -> None:
        plain = config.replace(classes="all")  # the bank has no other classes
        check_episodes(plain, bank.split, bank.name, bank.counts.tolist(), bank.classes)
        self.shape, self.device = config.episode(bank.split), torch.device(device)
        self._features = bank.tensor if self.device.type == "cpu" else bank.tensor.to(self.device)
        self._copies = bank.features.shape[1]
        self._offsets = torch.from_numpy(bank.offsets).to(self.device)  # (classes + 1,)
        n, k, _, queries = self.shape
        images = n * k + queries
        counts: dict[int, int] = {Purpose.CLASSES: n, Purpose.IMAGES: images, Purpose.FEATURE_COPY: images}
        counts |= {Purpose.NOISE: 2 * config.model.noise_size}
        self._words = RandomWords(episode_seed(config, bank.split), bank.split, counts, self.device)

    def __call__(self, start: int, count: int) -> EpisodeBatch:
        """Episodes start to start + count - 1; their images are feature maps (B, S + T, F, h, w)."""
        words = self._words(torch.arange(start, start + count, device=self.device))
        classes = choose(words[Purpose.CLASSES], self._offsets.new_full((), len(self._offsets) - 1))  # (B, N)
        rows, labels = standard_rows(words[Purpose.IMAGES], classes, self._offsets, self.shape)  # (B, S + T), (B, T)
        copies = rows * self._copies + bounded(words[Purpose.FEATURE_COPY], self._copies)  # (B, S + T)
        maps = self._features.index_select(0, copies.flatten()).unflatten(0, rows.shape)  # (B, S + T, h, w, F)
        noise = normals(words[Purpose.NOISE]).unflatten(1, (2, -1))  # (B, 2, Z)
        return EpisodeBatch(maps.permute(0, 1, 4, 2, 3), labels, noise, self.shape.ways, self.shape.shot)
