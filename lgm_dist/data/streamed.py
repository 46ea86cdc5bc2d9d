"""StreamedSplit: a train split whose images stay in their shards; `lgm_dist.data.stream` reads them during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lgm_dist.config import Split
from lgm_dist.data.bank import ImageBank, open_bank
from lgm_dist.data.manifest import Manifest, SplitEntry, read_manifest

if TYPE_CHECKING:
    from lgm_dist.data.shards import StoredSample


@dataclass(frozen=True)
class StreamedSplit:
    """What is known about the train split without its pixels; it stands in the place of its `ImageBank`."""

    manifest: Manifest
    split: Split = "train"

    @property
    def _entry(self) -> SplitEntry:
        return self.manifest.splits[self.split]

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.manifest.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W, C of an image."""
        return self.manifest.shape

    @property
    def channels(self) -> int:
        """C: 1 for grey images, 3 for RGB."""
        return self.shape[2]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Images of each class, (classes,)."""
        return np.array([info.images for info in self._entry.classes])

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""
        return tuple(info.name for info in self._entry.classes)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the images of the train split, on the 0 to 255 scale."""
        return self.manifest.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation, likewise."""
        return self.manifest.std

    @property
    def digest(self) -> str:
        """sha256 of the manifest (hex)."""
        return self.manifest.digest

    def first_images(self, most: int, heartbeat: Callable[[], None] = lambda: None) -> ImageBank:
        """A bank, in memory, of at most `most` images of each class: those that come first in the bank of the whole split.

        Reads all shards once, with a heartbeat after each, and decodes the images that it keeps. Raises ValueError if a shard
        is missing or damaged.
        """
        from lgm_dist.data.shards import decode_sample, read_shard  # the facts need neither webdataset nor PIL

        kept: list[list[StoredSample]] = [[] for _ in self.classes]
        for shard in self._entry.shards:
            for sample in read_shard(self.manifest, self.split, shard):
                kept[sample.label].append(sample)
            kept = [sorted(samples, key=attrgetter("key"))[:most] for samples in kept]
            heartbeat()
        images = np.stack(
            [decode_sample(self.manifest, sample) for samples in kept for sample in samples]
        )  # (m, H, W, C)
        offsets = np.cumsum([0, *map(len, kept)])  # (classes + 1,)
        groups = tuple(info.group for info in self._entry.classes)
        return ImageBank(self.name, self.split, images, offsets, self.classes, groups, self.mean, self.std, self.digest)


BaseImages = ImageBank | StreamedSplit
"""The images of the base classes."""


def open_base(manifest: str | Path, cache: str, stream: bool) -> BaseImages:
    """The train split: as a bank, or to be streamed. Raises ValueError as `open_bank`."""
    return StreamedSplit(read_manifest(str(manifest))) if stream else open_bank(manifest, "train", cache)
