"""WebDataset shards: writes a data set, and reads it back with an error that names every fault. The only webdataset import."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import webdataset
from tqdm import tqdm
from webdataset.tariterators import group_by_keys

from lgm_dist.config import SPLITS, Split
from lgm_dist.data.fetch import fetch
from lgm_dist.data.manifest import ClassEntry, Manifest, Shard, SplitEntry, check_name, manifest_bytes, read_manifest
from lgm_dist.data.png import MODES, decode
from lgm_dist.data.source import DataSource, Sample, SplitSource
from lgm_dist.data.tar import members

__all__ = [
    "Manifest",
    "StoredSample",
    "channel_statistics",
    "decode_sample",
    "read_images",
    "read_manifest",
    "read_samples",
    "read_shard",
    "write_shards",
]

SAMPLES_PER_SHARD = 4000
"""About 26 MB of 32x32 images."""
SPOOL = 64 * 2**20
"""Largest shard that is kept in memory while it is read, in bytes; a larger one is in a temporary file."""


class StoredSample(NamedTuple):
    """A sample of a shard."""

    where: str
    """Its shard and key, for errors."""
    key: str
    png: bytes
    label: int


def write_shards(source: DataSource, out: Path, samples_per_shard: int = SAMPLES_PER_SHARD) -> Path:
    """Write `source` as NAME-SPLIT-000000.tar, … and NAME.json into the folder `out`; return the manifest's path.

    The same source gives the same bytes. Every image is decoded once, to check its shape and to compute mean and standard
    deviation of the train split. Files are written to a temporary folder and renamed at the end, the manifest last, so that an
    interrupted call leaves nothing that looks complete. Raises ValueError for a source that cannot be trained on.
    """
    _check_source(source)
    if samples_per_shard < 1:
        raise ValueError(
            f"samples_per_shard ({samples_per_shard}) must be at least 1; the default is {SAMPLES_PER_SHARD}"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}-", dir=out) as scratch:
        entries, histograms = {}, {}
        images = sum(len(split.samples) for split in source.splits.values())
        with tqdm(total=images, desc=source.name, unit="image", disable=None) as progress:
            for split in SPLITS:
                entries[split], histograms[split] = _write_split(
                    source, split, Path(scratch), samples_per_shard, progress
                )
        mean, std = channel_statistics(histograms["train"])
        if min(std) == 0:
            raise ValueError(
                f"{source.name}: a channel of the train images has the same value everywhere (std {std}); give other images"
            )
        content = manifest_bytes(source.name, source.shape, mean, std, entries)
        (Path(scratch) / f"{source.name}.json").write_bytes(content)
        _publish(Path(scratch), out, source.name)
    return out / f"{source.name}.json"


def channel_statistics(histogram: npt.NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel, from exact integer sums.

    Args:
        histogram: How often each value occurs in each channel, (C, 256).
    """
    means, stds = [], []
    for counts in histogram.tolist():
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        means.append(total / n)
        stds.append(((n * squares - total * total) / (n * n)) ** 0.5)
    return tuple(means), tuple(stds)


def image_histogram(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each value occurs in each channel of an image (H, W, C): (C, 256)."""
    channels = image.shape[2]
    flat = (image + 256 * np.arange(channels)).ravel()  # (H * W * C)
    return np.bincount(flat, minlength=256 * channels).reshape(channels, 256)  # (C, 256)


def read_samples(manifest: Manifest, split: Split) -> Iterator[tuple[str, bytes, int]]:
    """Yield (key, PNG bytes, label) of every sample of a split, in the order of the shards, through webdataset.

    Each shard is fetched once, and its sha256 is checked before its first sample is yielded. Raises ValueError that names the
    shard, the member if it is known, and the command that prepares the shards again.
    """
    for sample in _checked_samples(manifest, split):
        yield sample.key, sample.png, sample.label


def read_images(manifest: Manifest, split: Split) -> Iterator[tuple[str, npt.NDArray[np.uint8], int]]:
    """As `read_samples`, with decoded images (H, W, C): (key, image, label)."""
    for sample in _checked_samples(manifest, split):
        yield sample.key, decode_sample(manifest, sample), sample.label


def decode_sample(manifest: Manifest, sample: StoredSample) -> npt.NDArray[np.uint8]:
    """The pixels of a sample, (H, W, C). Raises ValueError that names the shard and the sample."""
    with _blaming(manifest, sample.where):
        return decode(sample.png, manifest.shape)


def read_shard(manifest: Manifest, split: Split, shard: Shard) -> Iterator[StoredSample]:
    """Yield the samples of one shard in their order. It is fetched and checked as by `read_samples`, with the same errors."""
    url, found = manifest.url(shard), 0
    with _blaming(manifest, f"shard {url}"), _verified(url, shard, manifest) as stream:
        for sample in group_by_keys(members(stream)):
            where = f"shard {url}, sample {sample['__key__']}"
            with _blaming(manifest, where):
                label = _label(sample, len(manifest.splits[split].classes))
            found += 1
            yield StoredSample(where, sample["__key__"], sample["png"], label)
        if found != shard.samples:
            raise ValueError(f"holds {found} samples, the manifest says {shard.samples}")


def _check_source(source: DataSource) -> None:
    check_name(source.name)
    if min(source.shape) < 1 or source.shape[2] not in MODES:
        raise ValueError(f"{source.name}: shape {source.shape} must be (height, width, 1 or 3)")
    home: dict[str, str] = {}
    for split in SPLITS:
        if split not in source.splits or not source.splits[split].samples:
            raise ValueError(f"{source.name}: split {split} is empty; give it at least one class with images")
        for info in source.splits[split].classes:
            if info.name in home:
                raise ValueError(f"{source.name}: class {info.name} is in {home[info.name]} and again in {split}")
            home[info.name] = split
        _check_samples(f"{source.name}: split {split}", source.splits[split])


def _check_samples(where: str, split: SplitSource) -> None:
    counts = Counter(sample.label for sample in split.samples)
    for label, info in enumerate(split.classes):
        if not counts.pop(label, 0):
            raise ValueError(f"{where}: class {info.name} has no images; add some or remove the class")
    if counts:
        raise ValueError(f"{where}: label {min(counts)} must lie between 0 and {len(split.classes) - 1}")
    seen = set()
    for sample in split.samples:
        if not sample.key or re.search(r"[./]", sample.key) or sample.key in seen:
            raise ValueError(f"{where}: key {sample.key!r} must be unique, not empty, without dots or slashes")
        seen.add(sample.key)


def _write_split(
    source: DataSource, split: Split, folder: Path, samples_per_shard: int, progress: Any
) -> tuple[SplitEntry, npt.NDArray[np.int64]]:
    def mixed(sample: Sample) -> bytes:  # this order depends on the keys alone and mixes the classes
        return hashlib.sha256(f"{split}/{sample.key}".encode(errors="surrogateescape")).digest()

    samples = sorted(source.splits[split].samples, key=mixed)
    histogram = np.zeros((source.shape[2], 256), np.int64)  # (C, 256)
    shards = []
    for number, start in enumerate(range(0, len(samples), samples_per_shard)):
        path = folder / f"{source.name}-{split}-{number:06d}.tar"
        shards.append(_write_shard(path, samples[start : start + samples_per_shard], source.shape, histogram, progress))
    counts = Counter(sample.label for sample in samples)
    infos = source.splits[split].classes
    classes = tuple(ClassEntry(info.name, info.group, counts[label]) for label, info in enumerate(infos))
    return SplitEntry(classes, tuple(shards)), histogram


def _write_shard(
    path: Path,
    samples: Sequence[Sample],
    shape: tuple[int, int, int],
    histogram: npt.NDArray[np.int64],
    progress: Any,
) -> Shard:
    """Write one shard; add its pixels to `histogram` (C, 256)."""
    with path.open("w+b") as file:
        # mtime=0 for equal bytes; pax headers appear only if a key is too long or not ASCII.
        with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
            for sample in samples:
                png = sample.read()
                try:
                    histogram += image_histogram(decode(png, shape))
                except ValueError as fault:
                    raise ValueError(f"image {sample.key} {fault}") from fault
                tar.write({"__key__": sample.key, "png": png, "cls": str(sample.label).encode()})
                progress.update()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, digest, len(samples))


def _publish(scratch: Path, out: Path, name: str) -> None:
    """Move the shards and then the manifest from `scratch` to `out`, after removing those of an earlier call."""
    (out / f"{name}.json").unlink(missing_ok=True)
    ours = re.compile(rf"{re.escape(name)}-({'|'.join(SPLITS)})-\d{{6}}\.tar")
    for stale in out.iterdir():
        if ours.fullmatch(stale.name):
            stale.unlink()
    for shard in sorted(scratch.glob("*.tar")):
        os.replace(shard, out / shard.name)
    os.replace(scratch / f"{name}.json", out / f"{name}.json")


def _checked_samples(manifest: Manifest, split: Split) -> Iterator[StoredSample]:
    """Yield every sample of a split."""
    entry = manifest.splits[split]
    counts: Counter[int] = Counter()
    seen: set[str] = set()
    for shard in entry.shards:
        for sample in read_shard(manifest, split, shard):
            with _blaming(manifest, sample.where):
                if sample.key in seen:
                    raise ValueError("occurs twice in its split")
            seen.add(sample.key)
            counts[sample.label] += 1
            yield sample
    with _blaming(manifest, f"split {split} of {manifest.location}"):
        for label, info in enumerate(entry.classes):
            if counts[label] != info.images:
                raise ValueError(f"has {counts[label]} images of class {info.name}, the manifest says {info.images}")


class _ShardError(ValueError):
    """An error whose text names the shard already."""


@contextmanager
def _blaming(manifest: Manifest, where: str) -> Iterator[None]:
    """Turn an error inside into one that says where it is and what to do."""
    try:
        yield
    except _ShardError:
        raise
    except (OSError, ValueError, tarfile.TarError) as fault:
        text = (isinstance(fault, OSError) and fault.strerror) or (fault.args[0] if fault.args else fault)
        raise _ShardError(f"{where}: {text}; prepare the shards again with `{manifest.remake}`") from fault


@contextmanager
def _verified(url: str, shard: Shard, manifest: Manifest) -> Iterator[IO[bytes]]:
    """The bytes of a shard, fetched once and checked against its sha256."""
    with tempfile.SpooledTemporaryFile(max_size=SPOOL) as copy:
        fetch(url, copy)
        copy.seek(0)
        digest = hashlib.sha256()
        while block := copy.read(2**20):
            digest.update(block)
        copy.seek(0)
        if digest.hexdigest() != shard.sha256:
            fault = _first_fault(copy, shard, manifest.shape)
            raise ValueError(f"its sha256 is {digest.hexdigest()}, not {shard.sha256} as in the manifest{fault}")
        yield copy


def _label(sample: dict[str, Any], classes: int) -> int:
    for member in ("png", "cls"):
        if member not in sample:
            raise ValueError(f"has no .{member}")
    text = sample["cls"]
    if not re.fullmatch(rb"[0-9]{1,9}", text) or int(text) >= classes:
        raise ValueError(f"its label {text.decode(errors='replace')!r} must lie between 0 and {classes - 1}")
    return int(text)


def _first_fault(stream: IO[bytes], shard: Shard, shape: tuple[int, int, int]) -> str:
    """Which member of a shard with a wrong digest is visibly damaged, in words; "" if none is."""
    last, images = "its start", 0
    with suppress(OSError, ValueError, tarfile.TarError):  # the number of images shows what is cut off
        for member in filter(None, members(stream)):
            last = f"member {member['fname']}"
            if last.endswith(".png"):
                images += 1
                try:
                    decode(member["data"], shape)
                except ValueError as fault:
                    return f" ({last} {fault})"
    return f" (the tar breaks off after {last})" if images < shard.samples else ""
