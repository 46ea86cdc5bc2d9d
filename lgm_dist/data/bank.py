"""ImageBank: the decoded images of one split, grouped by class, in a memory-mapped file that all processes of a node share."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import SPLITS, Split
from lgm_dist.console import notify
from lgm_dist.data.lock import exclusive
from lgm_dist.data.manifest import Manifest, read_manifest

log = logging.getLogger(__name__)

LARGEST_BANK = "LGM_DIST_LARGEST_BANK"
"""Variable of the environment: the size in bytes from which on `fits` says no; without it, the disk decides."""


@dataclass(frozen=True)
class ImageBank:
    """All images of one split. Class c owns rows offsets[c] to offsets[c + 1] - 1."""

    name: str
    """Name of the data set."""
    split: Split
    images: npt.NDArray[np.uint8]
    """(n, H, W, C), memory-mapped and read-only."""
    offsets: npt.NDArray[np.int64]
    """(classes + 1,)"""
    classes: tuple[str, ...]
    """Name of each class."""
    groups: tuple[str, ...]
    """Superclass (or script) of each class, "" if it has none."""
    mean: tuple[float, ...]
    """Mean of each channel over the images of the train split, on the 0 to 255 scale."""
    std: tuple[float, ...]
    """Standard deviation, likewise."""
    digest: str = ""
    """sha256 of the manifest (hex)."""
    folder: Path | None = None
    """Folder of the mapped file; None if the images are in memory only."""
    counters: npt.NDArray[np.int64] | None = None
    """(n,): what the random copies of each image are drawn from; None: its row."""

    def __repr__(self) -> str:
        height, width, channels = self.images.shape[1:]
        size = f"{len(self.classes):,} classes, {len(self.images):,} images of {width} x {height} x {channels}"
        return f"ImageBank({self.name!r}, {self.split}: {size})"

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Images of each class, (classes,)."""
        return np.diff(self.offsets)

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W, C of an image."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    @property
    def channels(self) -> int:
        """C: 1 for grey images, 3 for RGB."""
        return self.shape[2]

    @cached_property
    def tensor(self) -> Tensor:
        """The memory of `images` as a tensor, (n, H, W, C) uint8. Writing to it would end the process."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.images)


def open_bank(manifest: str | Path, split: Split, cache: str = "") -> ImageBank:
    """The images of one split of a prepared data set, shared by all processes of this machine.

    The first call decodes the shards into the cache folder while other processes wait for it. Later calls map the file and do
    not read the shards. Within a class the images are sorted by key.

    Args:
        manifest: Path or URL of NAME.json.
        split: train, val or test.
        cache: Cache folder (see `cache_folder`).

    Raises ValueError if the manifest or a shard is missing or damaged, and if the cache cannot be written.
    """
    if split not in SPLITS:
        raise ValueError(f"split ({split!r}) must be one of {', '.join(SPLITS)}")
    found = read_manifest(str(manifest))
    entry = found.splits[split]
    path, shape = _place(found, split, cache)
    make_once(path, math.prod(shape), partial(_build, found, split))
    images = np.asarray(np.memmap(path, np.uint8, "r", shape=shape))  # (n, H, W, C)
    offsets = np.cumsum([0, *(info.images for info in entry.classes)], dtype=np.int64)  # (classes + 1,)
    names = tuple(info.name for info in entry.classes)
    groups = tuple(info.group for info in entry.classes)
    of_train = (found.mean, found.std)
    return ImageBank(found.name, split, images, offsets, names, groups, *of_train, found.digest, path.parent)


def fits(manifest: Manifest, split: Split, cache: str = "") -> bool:
    """Return True if the bank of a split is in the cache folder, or takes at most half of its disk's free space.

    The half is what building a bank leaves free. LGM_DIST_LARGEST_BANK, in bytes, replaces it. Raises ValueError if this is not
    a whole number.
    """
    path, shape = _place(manifest, split, cache)
    most = os.environ.get(LARGEST_BANK, "")
    if most and not most.isdecimal():
        raise ValueError(f"{LARGEST_BANK} ({most!r}) must be a whole number of bytes, such as 20000000000")
    if not most and _complete(path, math.prod(shape)):
        return True
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return math.prod(shape) <= (int(most) if most else shutil.disk_usage(folder).free // 2)


def cache_folder(cache: str = "") -> Path:
    """`cache`, else LGM_DIST_CACHE of the environment, else lgm_dist in the user's cache folder."""
    if chosen := cache or os.environ.get("LGM_DIST_CACHE", ""):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lgm_dist"


def make_once(path: Path, size: int, build: Callable[[Path], None], waiting: Callable[[], None] | None = None) -> None:
    """Make the file `path` of `size` bytes, unless it is there. It is complete or absent: `build` writes another file, which
    is then renamed, while other processes wait and call `waiting` every second.

    Raises ValueError if the folder cannot be written.
    """
    partial_file = path.with_suffix(".partial")  # the lock keeps other processes from it
    try:
        if not _complete(path, size):
            with exclusive(path.with_suffix(".lock"), waiting):
                if not _complete(path, size):  # else the process that held the lock has just built it
                    try:
                        build(partial_file)
                        partial_file.replace(path)
                    finally:
                        partial_file.unlink(missing_ok=True)
    except OSError as fault:
        raise ValueError(
            f"cache ({path.parent}) cannot be written ({fault.strerror or fault}); name another folder with --cache or "
            "LGM_DIST_CACHE"
        ) from fault


def _place(manifest: Manifest, split: Split, cache: str) -> tuple[Path, tuple[int, int, int, int]]:
    """Path and shape (n, H, W, C) of the bank of a split."""
    path = cache_folder(cache) / f"{manifest.name}-{split}-{manifest.digest[:32]}.uint8"
    return path, (manifest.splits[split].images, *manifest.shape)


def _complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _build(manifest: Manifest, split: Split, target: Path) -> None:
    """Decode a split into `target`. The caller holds the lock, so no other process uses the temporary file."""
    from lgm_dist.data.shards import read_images  # an open bank needs neither webdataset nor PIL

    notify(f"decoding {manifest.splits[split].images:,} images of {manifest.name}, split {split}")
    start = time.perf_counter()
    unsorted = target.with_suffix(".unsorted")
    try:
        rows: list[tuple[int, str]] = []
        with unsorted.open("wb") as file:
            for key, image, label in read_images(manifest, split):
                rows.append((label, key))
                file.write(image.tobytes())
        _copy_rows(unsorted, target, sorted(range(len(rows)), key=rows.__getitem__), manifest.shape)
    finally:
        unsorted.unlink(missing_ok=True)
    log.info("decoded %d images of %s in %.1f s", len(rows), split, time.perf_counter() - start)


def _copy_rows(source: Path, target: Path, order: list[int], shape: tuple[int, int, int]) -> None:
    """Write the images of `source` to `target` in the given order, and to the disk before the caller renames the file."""
    images = np.memmap(source, np.uint8, "r", shape=(len(order), *shape))  # (n, H, W, C)
    with target.open("wb") as file:
        for start in range(0, len(order), 1024):
            file.write(images[order[start : start + 1024]].tobytes())
        file.flush()
        os.fsync(file.fileno())
