"""Files made to do harm: nothing of them runs, leaves its folder or takes more memory than the file is large.

Checkpoints are in test_checkpoint.py, servers and URLs in test_fetch.py, pickles that run code in test_fc100.py too.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fc100 import pack, python2_pickle, write_official, write_parquet
from test_shards import edit, tiny_source

from lgm_dist.data.bank import open_bank
from lgm_dist.data.shards import write_shards
from lgm_dist.data.sources import cifar_archive
from lgm_dist.data.sources.fc100 import fc100_source
from lgm_dist.data.sources.folder import folder_source

SIDE = 60_000


def huge_png() -> bytes:
    """A head that promises 60,000 x 60,000 pixels, 10.8 GB, and the first of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(2**20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@contextmanager
def memory(most: int) -> Iterator[None]:
    """Fails where Python and numpy take more than `most` bytes at once inside, whatever is raised there."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most


def member(name: str, **values: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def with_member(path: Path, info: tarfile.TarInfo, content: bytes = b"") -> None:
    """Puts another member before those of a tar."""
    with tarfile.open(path) as old:
        members = [(m, old.extractfile(m).read()) for m in old if m.isfile()]
    info.size = len(content)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as new:
        for m, data in [(info, content), *members]:
            new.addfile(m, io.BytesIO(data))


def sparse_member(name: str, claimed: int) -> bytes:
    """The header of an old GNU sparse file of no data and `claimed` bytes of hole."""
    head = bytearray(member(name, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    head[386 : 386 + 24] = b"%011o\0" % 0 + b"%011o\0" % 0
    head[483:495] = b"%011o\0" % claimed
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


# --- shards of somebody else, whose digests are right ---

MEMBERS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "parent": (lambda _: member("../../evil.png").tobuf(), "'../../evil.png' would lie outside of its folder"),
    "absolute": (lambda t: member(f"{t}/evil.png").tobuf(), "would lie outside of its folder"),
    "link": (
        lambda t: member("x.png", type=tarfile.SYMTYPE, linkname=str(t / "secret")).tobuf(),
        "member 'x.png' is no plain file",
    ),
    "hard link": (
        lambda t: member("x.png", type=tarfile.LNKTYPE, linkname=str(t / "secret")).tobuf(),
        "member 'x.png' is no plain file",
    ),
    "device": (lambda _: member("x.png", type=tarfile.CHRTYPE).tobuf(), "member 'x.png' is no plain file"),
    "folder": (lambda _: member("x", type=tarfile.DIRTYPE).tobuf(), "member 'x' is no plain file"),
    "hole": (lambda _: sparse_member("x.png", 2**32), "member 'x.png' is no plain file"),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    return write_shards(tiny_source(), tmp_path / "data" / "tiny")


def fault_of_shard(manifest: Path, content: Callable[[bytes], bytes]) -> str:
    """What is said of the train shard with other bytes and their digest."""
    shard = manifest.parent / "tiny-train-000000.tar"
    shard.write_bytes(content(shard.read_bytes()))
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    edit(manifest, lambda r: r["splits"]["train"]["shards"][0].update(sha256=digest))
    before = sorted(manifest.parents[1].rglob("*"))
    with pytest.raises(ValueError, match=f"^shard {shard}") as caught, memory(2**24):
        open_bank(manifest, "train", str(manifest.parents[2] / "cache"))
    assert sorted(manifest.parents[1].rglob("*")) == before
    assert "secret" not in str(caught.value).replace(str(manifest.parents[2]), "")
    assert "make the shards anew with `python scripts/prepare.py" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_a_shard_that_is_no_plain_file_is_named(shards: Path, tmp_path: Path, name: str) -> None:
    head, sentence = MEMBERS[name]
    assert sentence in fault_of_shard(shards, lambda whole: head(tmp_path) + whole)


def test_a_huge_image_in_a_shard_is_refused_by_its_head(shards: Path) -> None:
    png = huge_png()
    head = member("huge.png")
    head.size = len(png)
    padded = png + bytes(-len(png) % 512)
    cls = member("huge.cls")
    cls.size = 1
    text = fault_of_shard(shards, lambda whole: head.tobuf() + padded + cls.tobuf() + b"0".ljust(512, b"\0") + whole)
    assert "sample huge: does not decode as PNG (Image size (3600000000 pixels) exceeds limit" in text


def test_a_huge_image_in_a_folder_is_refused_by_its_head(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split / split).mkdir(parents=True)
        (tmp_path / split / split / "a.png").write_bytes(huge_png())
    for size in (None, 84):
        with pytest.raises(ValueError, match=r"a\.png is too large to be decoded safely"), memory(2**24):
            write_shards(folder_source(str(tmp_path), "x", size), tmp_path / "out")


def test_a_huge_image_in_a_parquet_file_is_refused_by_its_head(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in", change=lambda c: c["img"][0].update(bytes=huge_png()))
    with pytest.raises(ValueError, match="does not decode as PNG"):
        write_shards(fc100_source(str(source)), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("file", ["../x.tar", "/etc/passwd", "a/b.tar", "..tar", "x.tar/../../y.tar", "http://h/x.tar"])
def test_a_manifest_leads_to_no_file_outside_its_folder(shards: Path, file: str) -> None:
    edit(shards, lambda r: r["splits"]["train"]["shards"][0].update(file=file))
    with pytest.raises(ValueError, match=r"file \("):
        open_bank(shards, "train", str(shards.parent / "cache"))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "", ".x", "a..b", "x\n", "x\0"])
def test_a_manifests_name_makes_no_file_outside_the_cache(shards: Path, name: str) -> None:
    edit(shards, lambda r: r.update(name=name))
    with pytest.raises(ValueError, match=r"name \("):
        open_bank(shards, "train", str(shards.parent / "cache"))
    assert not (shards.parent / "cache").exists()


# --- CIFAR-100 of somebody else ---


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return pack(write_official(tmp_path / "in"))


def test_an_archive_is_read_in_memory_and_leads_nowhere(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    for info in (
        member("../../../evil"),
        member(str(tmp_path / "evil")),
        member("cifar-100-python/meta", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret")),
        member("cifar-100-python/train", type=tarfile.LNKTYPE, linkname=str(tmp_path / "secret")),
    ):
        with_member(archive, info)
        before = sorted(tmp_path.rglob("*"))
        assert len(fc100_source(str(archive)).splits["train"].samples) == 180
        assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_explodes_is_refused(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar_archive, "MOST_BYTES", 2**22)
    with gzip.open(archive, "wb") as file:  # 64 kilobytes; the real limit is 512 MiB
        file.write(member("cifar-100-python/train", size=2**26).tobuf() + bytes(2**26))
    with pytest.raises(ValueError, match=r"is no whole tar archive \(it has more than 4,194,304 bytes"), memory(2**24):
        fc100_source(str(archive))
    archive.write_bytes(sparse_member("cifar-100-python/train", 2**40) + bytes(1024))
    with pytest.raises(ValueError, match="lacks the files train and test"), memory(2**24):
        fc100_source(str(archive))


class Lie:
    """Pickled as numpy's reconstruction of an array of this type, shape and bytes."""

    def __init__(self, code: str, shape: tuple[int, ...], content: bytes, state: tuple[Any, ...] | None = None) -> None:
        self.code, self.shape, self.content, self.state = code, shape, content, state

    def __reduce__(self) -> tuple[Any, ...]:
        make = np.empty(0).__reduce__()[0]
        dtype = np.dtype(self.code)
        return make, (np.ndarray, (0,), b"b"), (1, self.shape, self.state or dtype, False, self.content)


HARM: dict[str, Callable[[dict[str, Any]], object]] = {
    "array of nothing": lambda r: r.update(data=Lie("u1", (2**50, 3072), b"")),
    "array of another length": lambda r: r.update(data=Lie("u1", (300, 3072), b"abc")),
    "array of objects": lambda r: r.update(data=np.array([[None] * 3072] * 2, object)),
    "array of pointers": lambda r: r.update(data=Lie("V8", (2, 3072), b"\x41" * 49152)),
    "array of a list": lambda r: r.update(data=[[0] * 3072] * 2),
    "names that are numbers": lambda r: r.update(filenames=list(range(len(r["filenames"])))),
    "names that are an array": lambda r: r.update(filenames=np.array([b"a"] * len(r["filenames"]))),
    "labels that are an array": lambda r: r.update(fine_labels=np.zeros(len(r["filenames"]), np.int64)),
    "labels that are text": lambda r: r.update(fine_labels="a" * len(r["filenames"])),
    "one label": lambda r: r.update(coarse_labels=3),
}


@pytest.mark.parametrize("name", HARM)
def test_a_pickle_whose_values_are_not_what_they_should_be(tmp_path: Path, name: str) -> None:
    folder = write_official(tmp_path)
    record = pickle.loads((folder / "test").read_bytes(), encoding="latin1")
    (folder / "test").write_bytes(python2_pickle(record))
    assert len(fc100_source(str(folder)).splits["val"].samples) == 60
    HARM[name](record)
    (folder / "test").write_bytes(python2_pickle(record))
    with pytest.raises(ValueError, match=rf"{folder}, file test: the data are not an array"), memory(2**26):
        fc100_source(str(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x0f.",  # a dictionary, remembered under number 268,435,455
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # a terabyte of bytes
        b"\x96" + struct.pack("<Q", 2**34) + b"x.",  # a bytearray of 16 GB, as atheris found
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",  # a frame of a terabyte
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"cnumpy\ndtype.__class__\n.",
        b"\x80\x02P1\n.",
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    ],
)
def test_a_pickle_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = write_official(tmp_path)
    (folder / "test").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{folder}, file test "), memory(2**26):
        fc100_source(str(folder))


def test_label_names_that_are_none(tmp_path: Path) -> None:
    folder = write_official(tmp_path)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [["apple"]] * 100}, 2))
    with pytest.raises(ValueError, match="the names of the fine labels are no list of names"):
        fc100_source(str(folder))


def test_parquet_files_of_other_types(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    (file,) = tmp_path.glob("train*")
    table = pq.read_table(file)
    strings = pa.array([{"bytes": "text", "path": "x"}] * len(table))
    numbers = pa.array([1] * len(table))
    for column in (strings, numbers):
        pq.write_table(table.set_column(0, "img", column), file)
        with pytest.raises(ValueError, match="has not the columns img"):
            fc100_source(str(tmp_path))
    for metadata in ("[]", "{", '{"info": 3}', '{"info": {"features": {"fine_label": []}}}'):
        write_parquet(tmp_path)
        pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": metadata}), file)
        assert len(fc100_source(str(tmp_path)).splits["val"].samples) == 60
