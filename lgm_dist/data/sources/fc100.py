"""FC100: CIFAR-100 split by superclass, read from the official archive, Hugging Face parquet files or a download.

Class split: Oreshkin, Rodriguez Lopez, Lacoste, "TADAM: Task dependent adaptive metric for improved few-shot
learning", NeurIPS 2018. Images: CIFAR-100, Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
its train and test images are merged, 600 a class.
"""

from __future__ import annotations

import functools
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lgm_dist.config import SPLITS, Split
from lgm_dist.data.bank import cache_folder
from lgm_dist.data.keys import unique_keys
from lgm_dist.data.png import encode
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource
from lgm_dist.data.sources import cifar_archive

SHAPE = (32, 32, 3)
FOLDER, ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"
WAYS = (
    f"name the official {ARCHIVE} or its unpacked folder, or a folder of Hugging Face parquet files of cifar100 "
    "(train*.parquet and test*.parquet), with --source"
)


@dataclass(frozen=True)
class _Part:
    """One of CIFAR-100's own two splits; every sequence has an entry an image."""

    where: str
    names: Sequence[str]
    """File names."""
    classes: Sequence[str]
    groups: Sequence[str]
    """Superclasses."""
    read: Callable[[int], bytes]
    """PNG bytes of an image."""


def fc100_source(source: str) -> DataSource:
    """FC100 from `source`: 60 / 20 / 20 classes of 600 images, PNG bytes of parquet files as they are.

    Args:
        source: cifar-100-python.tar.gz, its unpacked folder, a folder of parquet files (columns img{bytes, path},
            fine_label, coarse_label), or "" to download the archive through torchvision.

    Raises ValueError where the source is none of these, damaged or incomplete, or cannot be downloaded.
    """
    path = Path(source).expanduser() if source else _download()
    try:
        parts = _read_parts(path)
    except cifar_archive.DamagedArchive as error:
        raise ValueError(f"{error}; download it again, or {WAYS}") from error
    return _assemble(parts, str(path))


@functools.cache
def split_table() -> dict[Split, dict[str, list[str]]]:
    """Classes by superclass by split, in the order of the labels; the file carries its citation."""
    table = json.loads(resources.files("lgm_dist.data.sources").joinpath("fc100_split.json").read_text("utf-8"))
    return {split: table[split] for split in SPLITS}


def _read_parts(path: Path) -> list[_Part]:
    if path.is_file() and path.suffix != ".parquet":
        return _official_parts(cifar_archive.unpack(path), str(path))
    for folder in (path, path / FOLDER):
        if (folder / "train").is_file() and (folder / "test").is_file():
            files = {
                name: (folder / name).read_bytes() for name in ("train", "test", "meta") if (folder / name).is_file()
            }
            return _official_parts(files, str(folder))
    if (path / ARCHIVE).is_file():
        return _read_parts(path / ARCHIVE)
    files_of = {name: sorted(path.rglob(f"{name}*.parquet")) for name in ("train", "test")}
    if all(files_of.values()):
        return [_parquet_part(file) for name in ("train", "test") for file in files_of[name]]
    raise ValueError(f"source {path} holds no CIFAR-100 (train and test); {WAYS}")


def _assemble(parts: list[_Part], where: str) -> DataSource:
    """Sort the images of all parts into FC100's splits."""
    home = {
        name: (split, group)
        for split, groups in split_table().items()
        for group, names in groups.items()
        for name in names
    }
    rows: dict[Split, list[tuple[str, str, Callable[[], bytes]]]] = {split: [] for split in SPLITS}
    for part in parts:
        for i, (file, name, group) in enumerate(zip(part.names, part.classes, part.groups, strict=True)):
            if name not in home or home[name][1] != group:
                raise ValueError(
                    f"{part.where}: image {i} is of class {name} in {group}, which CIFAR-100 has not; {WAYS}"
                )
            rows[home[name][0]].append((file, name, functools.partial(part.read, i)))
    counts = Counter(name for found in rows.values() for _, name, _ in found)
    if len({counts[name] for name in home}) != 1 or not counts:
        low, high = min(home, key=counts.__getitem__), max(home, key=counts.__getitem__)
        raise ValueError(
            f"source {where} is incomplete: {counts[low]} images of class {low}, {counts[high]} of {high}; {WAYS}"
        )
    return DataSource("fc100", SHAPE, {split: _split_source(split, rows[split]) for split in SPLITS})


def _split_source(split: Split, rows: list[tuple[str, str, Callable[[], bytes]]]) -> SplitSource:
    infos = tuple(ClassInfo(name, group) for group, names in split_table()[split].items() for name in names)
    label = {info.name: i for i, info in enumerate(infos)}
    keys = unique_keys([file.removesuffix(".png") for file, _, _ in rows], [name for _, name, _ in rows])
    samples = [Sample(key, label[name], read) for key, (_, name, read) in zip(keys, rows, strict=True)]
    return SplitSource(infos, samples)


def _names(labels: Sequence[int], names: Sequence[str] | None, kind: str, where: str) -> list[str]:
    """The name of each label; `names` None stands for CIFAR-100's own list, which is alphabetical."""
    groups = [item for table in split_table().values() for item in table.items()]
    standard = {"fine": [name for _, members in groups for name in members], "coarse": [group for group, _ in groups]}
    names = sorted(standard[kind]) if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: the names of the {kind} labels are no list of names; {WAYS}")
    if not all(isinstance(label, int) and 0 <= label < len(names) for label in labels):
        raise ValueError(f"{where}: a {kind} label is none of 0 to {len(names) - 1}; {WAYS}")
    return [names[label] for label in labels]


# --- the official archive ---


def _official_parts(files: dict[str, bytes], where: str) -> list[_Part]:
    lists = cifar_archive.label_names(files["meta"], f"{where}, file meta") if "meta" in files else {}
    return [_official_part(files[name], lists, f"{where}, file {name}") for name in ("train", "test")]


def _official_part(content: bytes, lists: dict[str, Any], where: str) -> _Part:
    images = cifar_archive.images(content, where)
    classes, groups = (_names(images.labels[kind], lists.get(kind), kind, where) for kind in ("fine", "coarse"))
    return _Part(where, images.files, classes, groups, functools.partial(_encode_row, images.data))


def _encode_row(data: npt.NDArray[np.uint8], row: int) -> bytes:
    return encode(np.ascontiguousarray(data[row].reshape(3, 32, 32).transpose(1, 2, 0)))  # (32, 32, 3)


def _download() -> Path:
    """The official archive in the user's cache folder, downloaded where it is not there yet."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import download_url

    folder = cache_folder()
    try:
        with _socket_timeout(30.0):
            download_url(CIFAR100.url, folder, CIFAR100.filename, CIFAR100.tgz_md5)
    except (OSError, RuntimeError) as fault:
        raise ValueError(
            f"cannot download CIFAR-100 from {CIFAR100.url} ({fault}); get it some other way and {WAYS}"
        ) from fault
    return Path(folder, CIFAR100.filename)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Without it, a network that drops packets would keep us waiting for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- Hugging Face parquet files ---


def _parquet_part(path: Path) -> _Part:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read(columns=["img", "fine_label", "coarse_label"])
        img = pa.concat_arrays(table.column("img").chunks)
        png, labels = (
            img.field("bytes"),
            {kind: table.column(f"{kind}_label").to_pylist() for kind in ("fine", "coarse")},
        )
        if not (pa.types.is_binary(png.type) or pa.types.is_large_binary(png.type)):
            raise TypeError(f"img.bytes is {png.type}")
    except (pa.ArrowException, AttributeError, KeyError, TypeError, OSError) as fault:
        raise ValueError(
            f"{path} has not the columns img{{bytes,path}}, fine_label, coarse_label ({fault}); {WAYS}"
        ) from fault
    if png.null_count:
        raise ValueError(f"{path}: {png.null_count} images have no bytes; {WAYS}")
    has_path = img.type.get_field_index("path") >= 0
    files = img.field("path").to_pylist() if has_path else [None] * len(png)
    names = [str(file).rpartition("/")[2] if file else f"{path.stem}_{row:05d}" for row, file in enumerate(files)]
    lists = _label_names(table.schema.metadata or {})
    classes, groups = (_names(labels[kind], lists.get(kind), kind, str(path)) for kind in ("fine", "coarse"))
    return _Part(str(path), names, classes, groups, lambda row: png[row].as_py())


def _label_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names that Hugging Face's schema metadata gives the labels, as far as it does."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        lists = {kind: features.get(f"{kind}_label", {}).get("names") for kind in ("fine", "coarse")}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {kind: names for kind, names in lists.items() if names}
