"""The official archive of CIFAR-100: a tar of Python 2 pickles, read without running anything that is in them.

Layout: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_BYTES = 512 * 2**20
"""Of the archive's tar."""


class DamagedArchive(ValueError):
    """Not CIFAR-100's archive, or not all of it: says where and how."""


@dataclass(frozen=True)
class Images:
    """One of CIFAR-100's own two splits."""

    data: npt.NDArray[np.uint8]
    """(images, 3072): red, green and blue of 32 x 32 pixels."""
    files: list[str]
    labels: dict[str, list[Any]]
    """Of kind fine and coarse."""


def unpack(path: Path) -> dict[str, bytes]:
    """The files train, test and, if it is there, meta of the archive, by name. Raises DamagedArchive."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_decompressed(path)), mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if file and member.name.rpartition("/")[2] in ("train", "test", "meta"):
                    files[member.name.rpartition("/")[2]] = file.read()
    except Exception as fault:  # a damaged archive can raise almost anything
        raise DamagedArchive(f"source {path} is no whole tar archive ({fault})") from fault
    if not {"train", "test"} <= set(files):
        raise DamagedArchive(f"source {path} lacks the files train and test of CIFAR-100")
    return files


def images(content: bytes, where: str) -> Images:
    """What is in the file train or test. Raises DamagedArchive, which begins with `where`."""
    record = _unpickle(content, where)
    try:
        array, files = record["data"], record["filenames"]
        labels = {kind: record[f"{kind}_labels"] for kind in ("fine", "coarse")}
    except KeyError as fault:
        raise DamagedArchive(f"{where} has no {fault}") from fault
    try:
        data = array.rows()
        good = all(isinstance(found, list) and len(found) == len(data) for found in (files, *labels.values()))
    except (AttributeError, TypeError, ValueError):
        good = False
    if not good or not all(isinstance(file, str) for file in files):
        raise DamagedArchive(
            f"{where}: the data are not an array of uint8 (images, 3072) with as many names and labels"
        )
    return Images(data, files, labels)


def label_names(content: bytes, where: str) -> dict[str, Any]:
    """What the file meta gives as the names of fine and coarse labels. Raises DamagedArchive, which begins with `where`."""
    record = _unpickle(content, where)
    return {kind: record.get(f"{kind}_label_names") for kind in ("fine", "coarse")}


def _decompressed(path: Path) -> bytes:
    """The archive's tar, in memory: a header of a tar that is decompressed on the way may take any amount."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes; CIFAR-100 has 186 million")
    return content


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        record = _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as fault:  # a damaged pickle can raise almost anything
        raise DamagedArchive(f"{where} is no CIFAR-100 pickle ({fault})") from fault
    if not isinstance(record, dict):
        raise DamagedArchive(f"{where} holds no dictionary")
    return record


class _Array:
    """What a pickle says of a numpy array. numpy itself would believe a type whose fields point anywhere in memory."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """(version, shape, dtype, whether in Fortran's order, bytes)"""
        self.state = state

    def rows(self) -> npt.NDArray[np.uint8]:
        """(images, 3072). Raises ValueError or TypeError where it is no such array."""
        _, (images, values), dtype, fortran, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content  # Python 2's bytes
        if dtype.code not in ("u1", "|u1") or fortran or values != 3072:
            raise ValueError(f"{dtype.code} ({images}, {values})")
        return np.frombuffer(content, np.uint8).reshape(images, values)


class _Dtype:
    """Likewise of an array's type."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, _: object) -> None:
        """Byte order and the like, of which uint8 has none."""


class _PlainUnpickler(pickle._Unpickler):  # Python's own, since C's takes the memory that a file asks for
    """Unpickles containers, strings, numbers and what is said of arrays, and nothing that could run code."""

    ALLOWED = {  # noqa: RUF012 (a constant; ClassVar would say no more)
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    # A bytearray is made as long as it claims to be before it is read; no CIFAR-100 file has one.
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        """The few callables that an array needs. Raises UnpicklingError for every other."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-100 file needs")
        return self.ALLOWED[module, name]
