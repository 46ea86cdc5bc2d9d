"""NAME.json beside the shards: what a prepared data set holds. Standard library only, so that a cached bank opens anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgm_dist.config import SPLITS, Split
from lgm_dist.data.fetch import fetch, is_url
from lgm_dist.data.sources import prepare_command

FORMAT = 1
"""Version of the manifest's format; a newer one is refused."""
MOST_BYTES = 64 * 2**20
"""Largest manifest that is read, in bytes. A manifest of 10,000 classes in 10,000 shards has 2.5 MB."""


@dataclass(frozen=True)
class ClassEntry:
    """A class: name, group (superclass or script, "" if it has none) and number of images."""

    name: str
    group: str
    images: int


@dataclass(frozen=True)
class Shard:
    """One .tar beside the manifest: file name, sha256 of its bytes (hex) and number of samples."""

    file: str
    sha256: str
    samples: int


@dataclass(frozen=True)
class SplitEntry:
    """One split: its classes (label i is classes[i]) and its shards."""

    classes: tuple[ClassEntry, ...]
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        """Images of all classes."""
        return sum(entry.images for entry in self.classes)


@dataclass(frozen=True)
class Manifest:
    """A prepared data set."""

    name: str
    shape: tuple[int, int, int]
    """H, W, C of every image."""
    mean: tuple[float, ...]
    """Mean of each channel over all pixels of the train split, on the 0 to 255 scale."""
    std: tuple[float, ...]
    """Standard deviation of the population (divided by n), likewise."""
    splits: dict[Split, SplitEntry]
    location: str
    """Path or URL that it was read from."""
    digest: str
    """sha256 of the manifest's bytes (hex)."""

    def url(self, shard: Shard) -> str:
        """Path or URL of a shard."""
        folder, slash, _ = self.location.rpartition("/")
        return f"{folder}{slash}{shard.file}"

    @property
    def remake(self) -> str:
        """The shell command that prepares this data set again."""
        return _command(self.name, self.location, self.shape)


def read_manifest(location: str) -> Manifest:
    """The manifest at a path or URL. Raises ValueError if it is missing, damaged or too new."""
    content = io.BytesIO()
    try:
        fetch(location, content, MOST_BYTES)
    except OSError as fault:
        raise ValueError(
            f"cannot read the manifest {location} ({fault.strerror or fault}); prepare it with "
            f"`{_command(_stem(location), location)}`"
        ) from fault
    return parse_manifest(content.getvalue(), location)


def parse_manifest(content: bytes, location: str) -> Manifest:
    """The manifest in the bytes of its file; `location` is where they were read. Raises ValueError as `read_manifest`."""
    try:
        record = json.loads(content)
        version = _field(record, "format", int)
        if version > FORMAT:
            raise ValueError(f"has format {version}, newer than the {FORMAT} this version reads; update lgm_dist")
        return _manifest(record, location, hashlib.sha256(content).hexdigest())
    except (ValueError, OverflowError, RecursionError) as fault:
        command = _command(_stem(location), location)
        raise ValueError(f"manifest {location}: {fault}; write it again with `{command}`") from fault


def manifest_bytes(
    name: str,
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    splits: dict[Split, SplitEntry],
) -> bytes:
    """The file that `parse_manifest` reads; the same bytes for the same values."""
    entries = {split: dataclasses.asdict(entry) for split, entry in splits.items()}
    record = {"format": FORMAT, "name": name, "shape": shape, "mean": mean, "std": std, "splits": entries}
    return (json.dumps(record, indent=1) + "\n").encode()


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can be part of file names, URLs and brace patterns."""
    _require(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None and ".." not in name,
        f"name ({name!r}) must be letters, digits, '.', '_' or '-'; for example my-birds",
    )


def _command(name: str, location: str, shape: tuple[int, int, int] | None = None) -> str:
    """The shell command that prepares the data set whose manifest lies at `location`."""
    return prepare_command(name, "DIR" if is_url(location) else shlex.quote(str(Path(location).parent)), shape)


def _manifest(record: dict[str, Any], location: str, digest: str) -> Manifest:
    _require(record["format"] == FORMAT, f"format ({record['format']}) must be {FORMAT}")
    name = _field(record, "name", str)
    check_name(name)
    height, width, channels = shape = _numbers(record, "shape", int, 3)
    _require(min(shape) > 0 and channels in (1, 3), f"shape {list(shape)} must be [height, width, 1 or 3]")
    mean, std = (_numbers(record, key, float, channels) for key in ("mean", "std"))
    _require(all(0 <= value <= 255 for value in mean), f"mean {list(mean)} must lie between 0 and 255")
    _require(all(0 < value <= 127.5 for value in std), f"std {list(std)} must lie above 0 and up to 127.5")
    splits = _field(record, "splits", dict)
    _require(set(splits) == set(SPLITS), f"splits ({', '.join(splits)}) must be {', '.join(SPLITS)}")
    entries = {split: _split(split, splits[split]) for split in SPLITS}
    _distinct("class", [entry.name for split in SPLITS for entry in entries[split].classes])
    _distinct("shard", [shard.file for split in SPLITS for shard in entries[split].shards])
    return Manifest(name, (height, width, channels), mean, std, entries, location, digest)


def _split(split: str, record: Any) -> SplitEntry:
    classes = tuple(
        ClassEntry(_field(c, "name", str), _field(c, "group", str), _count(c, "images"))
        for c in _field(record, "classes", list)
    )
    shards = tuple(
        Shard(_file(s), _matching(s, "sha256", r"[0-9a-f]{64}"), _count(s, "samples"))
        for s in _field(record, "shards", list)
    )
    _require(bool(classes) and bool(shards), f"split {split} has {len(classes)} classes in {len(shards)} shards")
    entry = SplitEntry(classes, shards)
    samples = sum(shard.samples for shard in shards)
    _require(
        samples == entry.images, f"split {split} has {entry.images} images in its classes, {samples} in its shards"
    )
    return entry


def _file(record: Any) -> str:
    # A manifest from elsewhere must not point outside its own folder.
    name = _matching(record, "file", r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
    _require(".." not in name, f"file ({name!r}) must be the plain name of a .tar beside the manifest")
    return name


def _matching(record: Any, key: str, pattern: str) -> str:
    value: str = _field(record, key, str)
    _require(re.fullmatch(pattern, value) is not None, f"{key} ({value!r}) does not match {pattern}")
    return value


def _count(record: Any, key: str) -> int:
    value: int = _field(record, key, int)
    _require(value > 0, f"{key} ({value}) must be at least 1")
    return value


def _numbers(record: Any, key: str, kind: Callable[[Any], Any], length: int) -> tuple[Any, ...]:
    values = _field(record, key, list)
    good = len(values) == length and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and kind(v) == v for v in values
    )
    _require(good, f"{key} {values} must be {length} numbers")
    return tuple(kind(value) for value in values)


def _field(record: Any, key: str, kind: type) -> Any:
    _require(isinstance(record, dict), f"{record!r} must be a record with {key!r}")
    _require(key in record, f"{key!r} is missing")
    value = record[key]
    good = isinstance(value, kind) and not isinstance(value, bool)
    _require(good, f"{key} ({value!r}) must be of type {kind.__name__}")
    return value


def _distinct(kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    _require(not twice, f"{kind} {twice[0] if twice else ''} occurs twice")


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _stem(location: str) -> str:
    return location.rpartition("/")[2].removesuffix(".json") or "NAME"
