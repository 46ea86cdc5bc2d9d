"""Harmful files: none of them runs code, writes outside its folder or takes much more memory than its own size.

See also test_checkpoint.py (checkpoints), test_fetch.py (servers and URLs) and test_fc100.py (pickles that run code).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fc100 import declare_official, pack, write_official, write_parquet
from test_shards import edit, tiny_source

from lgm_dist.data.bank import open_bank
from lgm_dist.data.shards import write_shards
from lgm_dist.data.sources.fc100 import fc100_source
from lgm_dist.data.sources.folder import folder_source

SIDE = 60_000


def huge_png() -> bytes:
    """A header that claims 60,000 x 60,000 pixels, 10.8 GB, and the first of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(2**20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@contextmanager
def memory(most: int) -> Iterator[None]:
    """Fail if Python and numpy take more than `most` bytes at once inside, whatever is raised there."""
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
        "member 'x.png' is not a plain file",
    ),
    "hard link": (
        lambda t: member("x.png", type=tarfile.LNKTYPE, linkname=str(t / "secret")).tobuf(),
        "member 'x.png' is not a plain file",
    ),
    "device": (lambda _: member("x.png", type=tarfile.CHRTYPE).tobuf(), "member 'x.png' is not a plain file"),
    "folder": (lambda _: member("x", type=tarfile.DIRTYPE).tobuf(), "member 'x' is not a plain file"),
    "hole": (lambda _: sparse_member("x.png", 2**32), "member 'x.png' is not a plain file"),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    return write_shards(tiny_source(), tmp_path / "data" / "tiny")


def fault_of_shard(manifest: Path, content: Callable[[bytes], bytes]) -> str:
    """The error for the train shard with other bytes and their digest."""
    shard = manifest.parent / "tiny-train-000000.tar"
    shard.write_bytes(content(shard.read_bytes()))
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    edit(manifest, lambda r: r["splits"]["train"]["shards"][0].update(sha256=digest))
    before = sorted(manifest.parents[1].rglob("*"))
    with pytest.raises(ValueError, match=f"^shard {shard}") as caught, memory(2**24):
        open_bank(manifest, "train", str(manifest.parents[2] / "cache"))
    assert sorted(manifest.parents[1].rglob("*")) == before
    assert "secret" not in str(caught.value).replace(str(manifest.parents[2]), "")
    assert "prepare the shards again with `lgm-dist prepare folder" in str(caught.value)
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

PICKLES = [
    b"\x80\x02}r\xff\xff\xff\x0f.",  # a dictionary, remembered under number 268,435,455
    b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # a terabyte of bytes
    b"\x96" + struct.pack("<Q", 2**34) + b"x.",  # a bytearray of 16 GB
    b"\x80\x02cbuiltins\neval\n(S'1'\ntR.",
    b"",
]


@pytest.mark.parametrize("content", PICKLES)
def test_a_pickle_that_is_not_the_official_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    folder = write_official(tmp_path)
    declare_official(monkeypatch, folder)
    assert len(fc100_source(str(folder)).splits["val"].samples) == 60
    (folder / "test").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{folder}, file test is not the official file"), memory(2**22):
        fc100_source(str(folder))


def test_an_archive_that_is_not_the_official_one_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_official(tmp_path / "in")
    archive = pack(folder)
    declare_official(monkeypatch, folder, archive)
    assert len(fc100_source(str(archive)).splits["train"].samples) == 180
    bomb = gzip.compress(member("cifar-100-python/train", size=2**26).tobuf() + bytes(2**26))
    hole = sparse_member("cifar-100-python/train", 2**40) + bytes(1024)
    for content in (archive.read_bytes() + b"\0", bomb, hole):
        archive.write_bytes(content)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=rf"{archive} is not the official file"), memory(2**22):
            fc100_source(str(archive))
        assert sorted(tmp_path.rglob("*")) == before


def test_parquet_files_of_other_types(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    (file,) = tmp_path.glob("train*")
    table = pq.read_table(file)
    strings = pa.array([{"bytes": "text", "path": "x"}] * len(table))
    numbers = pa.array([1] * len(table))
    for column in (strings, numbers):
        pq.write_table(table.set_column(0, "img", column), file)
        with pytest.raises(ValueError, match="lacks the columns img"):
            fc100_source(str(tmp_path))
    for metadata in ("[]", "{", '{"info": 3}', '{"info": {"features": {"fine_label": []}}}'):
        write_parquet(tmp_path)
        pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": metadata}), file)
        assert len(fc100_source(str(tmp_path)).splits["val"].samples) == 60
    names = json.dumps({"info": {"features": {"fine_label": {"names": [["apple"]] * 100}}}})
    write_parquet(tmp_path)
    pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": names}), file)
    with pytest.raises(ValueError, match="the names of the fine labels are not a list of strings"):
        fc100_source(str(tmp_path))
