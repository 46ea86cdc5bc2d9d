"""FC100: CIFAR-100 split by superclass, read from the official archive, Hugging Face parquet files or a download.

Class split: Oreshkin, Rodriguez Lopez, Lacoste, "TADAM: Task dependent adaptive metric for improved few-shot learning",
NeurIPS 2018. Images: CIFAR-100, Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; its train and test
images are merged, 600 a class.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lgm_dist.config import SPLITS, Split
from lgm_dist.data.keys import unique_keys
from lgm_dist.data.png import encode
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource
from lgm_dist.data.sources import register_source
from lgm_dist.data.sources.cifar_archive import ARCHIVE, FOLDER, download, read_archive

SHAPE = (32, 32, 3)
USE = (
    f"use --source with the official {ARCHIVE}, its unpacked folder, or a folder of Hugging Face parquet files of cifar100 "
    "(train*.parquet and test*.parquet)"
)


@dataclass(frozen=True)
class _Part:
    """Some of the images; every sequence has one entry for each."""

    where: str
    """File that they come from, for messages."""
    names: Sequence[str]
    """File names."""
    classes: Sequence[str]
    groups: Sequence[str]
    """Superclasses."""
    read: Callable[[int], bytes]
    """Returns the PNG bytes of an image."""


@register_source("fc100")
def fc100_source(source: str = "") -> DataSource:
    """FC100: CIFAR-100 split by superclass (TADAM, NeurIPS 2018), 60 / 20 / 20 classes of 600 images.

    The bytes of images in parquet files are kept.

    Args:
        source: cifar-100-python.tar.gz, its unpacked folder, or a folder of Hugging Face parquet files of cifar100 (columns
            img{bytes, path}, fine_label, coarse_label). Without it, the archive is downloaded.

    Raises:
        ValueError: The source is none of these, damaged or incomplete, or cannot be downloaded.
    """
    path = Path(source).expanduser() if source else _download()
    return _assemble(_read_parts(path), str(path))


@functools.cache
def split_table() -> dict[Split, dict[str, list[str]]]:
    """Names of classes by superclass by split, in the order of the labels. The file contains its citation."""
    table = json.loads(resources.files("lgm_dist.data.sources").joinpath("fc100_split.json").read_text("utf-8"))
    return {split: table[split] for split in SPLITS}


def _download() -> Path:
    try:
        return download()
    except ValueError as fault:
        raise ValueError(f"{fault}; get it some other way and {USE}") from fault


def _read_parts(path: Path) -> list[_Part]:
    if path.is_file() and path.suffix != ".parquet":
        return _official_parts(path)
    for folder in (path, path / FOLDER):
        if (folder / "train").is_file() and (folder / "test").is_file():
            return _official_parts(folder)
    if (path / ARCHIVE).is_file():
        return _official_parts(path / ARCHIVE)
    files_of = {name: sorted(path.rglob(f"{name}*.parquet")) for name in ("train", "test")}
    if all(files_of.values()):
        return [_parquet_part(file) for name in ("train", "test") for file in files_of[name]]
    raise ValueError(f"source {path} holds no CIFAR-100 (train and test); {USE}")


def _assemble(parts: list[_Part], where: str) -> DataSource:
    """Sort the images of all parts into the splits of FC100."""
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
                raise ValueError(f"{part.where}: image {i} is of class {name} in {group}, which CIFAR-100 lacks; {USE}")
            rows[home[name][0]].append((file, name, functools.partial(part.read, i)))
    counts = Counter(name for found in rows.values() for _, name, _ in found)
    if len({counts[name] for name in home}) != 1 or not counts:
        low, high = min(home, key=counts.__getitem__), max(home, key=counts.__getitem__)
        raise ValueError(
            f"source {where} is incomplete: {counts[low]} images of class {low}, {counts[high]} of {high}; {USE}"
        )
    return DataSource("fc100", SHAPE, {split: _split_source(split, rows[split]) for split in SPLITS})


def _split_source(split: Split, rows: list[tuple[str, str, Callable[[], bytes]]]) -> SplitSource:
    infos = tuple(ClassInfo(name, group) for group, names in split_table()[split].items() for name in names)
    label = {info.name: i for i, info in enumerate(infos)}
    keys = unique_keys([file.removesuffix(".png") for file, _, _ in rows], [name for _, name, _ in rows])
    samples = [Sample(key, label[name], read) for key, (_, name, read) in zip(keys, rows, strict=True)]
    return SplitSource(infos, samples)


def _names(labels: Sequence[int], kind: str, where: str, names: Sequence[str] | None = None) -> list[str]:
    """The name of each label. Without `names`, label i is entry i of CIFAR-100's own list, which is alphabetical."""
    groups = [item for table in split_table().values() for item in table.items()]
    standard = {"fine": [name for _, members in groups for name in members], "coarse": [group for group, _ in groups]}
    names = sorted(standard[kind]) if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: the names of the {kind} labels are not a list of strings; {USE}")
    if not all(isinstance(label, int) and 0 <= label < len(names) for label in labels):
        raise ValueError(f"{where}: a {kind} label does not lie between 0 and {len(names) - 1}; {USE}")
    return [names[label] for label in labels]


def _official_parts(path: Path) -> list[_Part]:
    """The parts of the official archive, or of the folder that it unpacks to."""
    try:
        records = read_archive(path)
    except ValueError as fault:
        raise ValueError(f"{fault}; download it again, or {USE}") from fault
    parts = []
    for name, record in records.items():
        where = f"{path}, file {name}"
        classes, groups = (_names(record[f"{kind}_labels"], kind, where) for kind in ("fine", "coarse"))
        parts.append(_Part(where, record["filenames"], classes, groups, functools.partial(_encode, record["data"])))
    return parts


def _encode(data: npt.NDArray[np.uint8], row: int) -> bytes:
    return encode(np.ascontiguousarray(data[row].reshape(3, 32, 32).transpose(1, 2, 0)))  # (32, 32, 3)


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
            f"{path} lacks the columns img{{bytes,path}}, fine_label, coarse_label ({fault}); {USE}"
        ) from fault
    if png.null_count:
        raise ValueError(f"{path}: {png.null_count} images have no bytes; {USE}")
    has_path = img.type.get_field_index("path") >= 0
    files = img.field("path").to_pylist() if has_path else [None] * len(png)
    names = [str(file).rpartition("/")[2] if file else f"{path.stem}_{row:05d}" for row, file in enumerate(files)]
    lists = _label_names(table.schema.metadata or {})
    classes, groups = (_names(labels[kind], kind, str(path), lists.get(kind)) for kind in ("fine", "coarse"))
    return _Part(str(path), names, classes, groups, lambda row: png[row].as_py())


def _label_names(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """The names that the schema metadata of Hugging Face gives to the labels, if it does."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        lists = {kind: features.get(f"{kind}_label", {}).get("names") for kind in ("fine", "coarse")}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {kind: names for kind, names in lists.items() if names}
