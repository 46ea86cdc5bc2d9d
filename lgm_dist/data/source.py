"""What a source of images gives to the shard writer: classes and PNG images by split. Nothing is decoded yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lgm_dist.config import Split


@dataclass(frozen=True)
class ClassInfo:
    """One class: its name and the group it belongs to (a superclass of FC100, the script of a glyph; "" if there is none)."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Sample:
    """One image. `read()` returns its PNG bytes, so that a large data set is never in memory as a whole."""

    key: str
    """Name of the image file without its ending. Unique within the split, without dots and slashes."""
    label: int
    """Index into the split's classes."""
    read: Callable[[], bytes]


@dataclass(frozen=True)
class SplitSource:
    """One split of a data set."""

    classes: tuple[ClassInfo, ...]
    samples: Sequence[Sample]


@dataclass(frozen=True)
class DataSource:
    """A whole data set, ready to be written as shards."""

    name: str
    shape: tuple[int, int, int]
    """H, W, C of every image; C is 1 (grey) or 3 (RGB)."""
    splits: dict[Split, SplitSource]
