"""Shards and manifest: identical bytes, readable by plain webdataset, and errors that name every fault."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from lgm_dist.config import SPLITS
from lgm_dist.data.shards import (
    channel_statistics,
    image_histogram,
    read_images,
    read_manifest,
    read_samples,
    write_shards,
)
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource

SHAPE = (4, 6, 3)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tiny_source(name: str = "tiny", images: tuple[int, ...] = (5, 3, 4)) -> DataSource:
    """Each split has its own classes, class c with images[c] random images."""
    rng = np.random.default_rng(7)
    splits = {}
    for split in SPLITS:
        classes = tuple(ClassInfo(f"{split}-c{c}", f"g{c % 2}") for c in range(len(images)))
        samples = []
        for label, count in enumerate(images):
            for i in range(count):
                content = png(rng.integers(0, 256, SHAPE, dtype=np.uint8))
                samples.append(Sample(f"c{label}_s_{i:06d}", label, functools.partial(bytes, content)))
        splits[split] = SplitSource(classes, samples)
    return DataSource(name, SHAPE, splits)


def with_samples(source: DataSource, split: str, samples: list[Sample]) -> DataSource:
    return replace(source, splits=source.splits | {split: replace(source.splits[split], samples=samples)})


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A manifest whose train split (12 samples) lies in three shards."""
    return write_shards(tiny_source(), tmp_path / "tiny", samples_per_shard=5)


def edit(manifest: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    record = json.loads(manifest.read_bytes())
    change(record)
    manifest.write_text(json.dumps(record))
    return manifest


def rewrite_shard(manifest: Path, number: int, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
    """Change the members of a train shard and give the manifest its new digest, so that no digest shows the fault."""
    path = manifest.parent / f"tiny-train-{number:06d}.tar"
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(manifest, lambda r: r["splits"]["train"]["shards"][number].update(sha256=digest))


def read_fault(manifest: Path) -> str:
    with pytest.raises(ValueError, match="prepare the shards again with") as caught:
        list(read_images(read_manifest(str(manifest)), "train"))
    text = str(caught.value)
    assert f"lgm-dist prepare folder --source PATH --name tiny --out {manifest.parent}" in text
    assert "\n" not in text
    return text


# --- writing ---


def test_png_bytes_keys_and_labels_come_back_unchanged(prepared: Path) -> None:
    manifest = read_manifest(str(prepared))
    for split, wanted in tiny_source().splits.items():
        expected = {(s.key, s.read(), s.label) for s in wanted.samples}
        found = list(read_samples(manifest, split))
        assert len(found) == 12
        assert set(found) == expected


def test_plain_webdataset_reads_the_shards_by_a_brace_pattern(prepared: Path) -> None:
    url = str(prepared.parent / "tiny-train-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    expected = {s.key: (s.label, s.read()) for s in tiny_source().splits["train"].samples}
    assert len(samples) == len(expected) == 12
    for key, pixels, label in samples:
        assert label == expected[key][0]
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(expected[key][1]))))


def test_two_preparations_give_identical_bytes_whatever_the_order_of_the_source(tmp_path: Path, prepared: Path) -> None:
    source = tiny_source()
    for split in SPLITS:
        source = with_samples(source, split, list(reversed(source.splits[split].samples)))
    again = write_shards(source, tmp_path / "again", samples_per_shard=5)
    names = sorted(path.name for path in prepared.parent.iterdir())
    assert len(names) == 10  # three shards a split and the manifest, nothing else
    assert names == sorted(path.name for path in again.parent.iterdir())
    assert all((again.parent / n).read_bytes() == (prepared.parent / n).read_bytes() for n in names)


def test_shards_mix_the_classes_and_hold_two_members_a_sample_without_times(prepared: Path) -> None:
    for number in range(2):
        with tarfile.open(prepared.parent / f"tiny-train-{number:06d}.tar") as tar:
            infos = tar.getmembers()
        assert {info.mtime for info in infos} == {0}
        assert sorted({info.name.rpartition(".")[2] for info in infos}) == ["cls", "png"]
        assert len(infos) == 10
        assert len({info.name[:2] for info in infos}) > 1


def test_the_manifest_says_what_the_files_hold(prepared: Path) -> None:
    record = json.loads(prepared.read_bytes())
    assert (record["format"], record["name"], record["shape"]) == (1, "tiny", [4, 6, 3])
    train = record["splits"]["train"]
    assert train["classes"] == [
        {"name": "train-c0", "group": "g0", "images": 5},
        {"name": "train-c1", "group": "g1", "images": 3},
        {"name": "train-c2", "group": "g0", "images": 4},
    ]
    assert [shard["samples"] for shard in train["shards"]] == [5, 5, 2]
    for shard in train["shards"]:
        assert shard["sha256"] == hashlib.sha256((prepared.parent / shard["file"]).read_bytes()).hexdigest()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(s.read()))) for s in tiny_source().splits["train"].samples])
    np.testing.assert_allclose(record["mean"], pixels.mean((0, 1, 2), np.float64), rtol=1e-12)
    np.testing.assert_allclose(record["std"], pixels.std((0, 1, 2), np.float64), rtol=1e-12)
    manifest = read_manifest(str(prepared))
    assert manifest.digest == hashlib.sha256(prepared.read_bytes()).hexdigest()


def test_channel_statistics_by_hand() -> None:
    image = np.array([[[0, 10, 255], [2, 10, 0]]], np.uint8)  # (1, 2, 3)
    assert channel_statistics(image_histogram(image)) == ((1.0, 10.0, 127.5), (1.0, 0.0, 127.5))


def test_long_and_foreign_keys_survive(tmp_path: Path) -> None:
    source = tiny_source()
    keys = ["x" * 200, "лиса", "with space"]
    samples = [replace(s, key=keys[i] if i < 3 else s.key) for i, s in enumerate(source.splits["val"].samples)]
    manifest = write_shards(with_samples(source, "val", samples), tmp_path)
    assert {k for k, _, _ in read_samples(read_manifest(str(manifest)), "val")} == {s.key for s in samples}


def test_preparing_again_replaces_everything_of_the_same_name(prepared: Path) -> None:
    other = prepared.parent / "tiny-other-000000.tar"
    other.write_bytes(b"not ours")
    write_shards(tiny_source(), prepared.parent, samples_per_shard=50)
    assert sorted(path.name for path in prepared.parent.iterdir()) == [
        "tiny-other-000000.tar",
        "tiny-test-000000.tar",
        "tiny-train-000000.tar",
        "tiny-val-000000.tar",
        "tiny.json",
    ]


def test_a_failure_while_images_are_read_leaves_no_trace(tmp_path: Path, prepared: Path) -> None:
    def broken() -> bytes:
        raise OSError("disk gone")

    source = tiny_source()
    samples = [*source.splits["test"].samples[:-1], replace(source.splits["test"].samples[-1], read=broken)]
    before = {path.name: path.read_bytes() for path in prepared.parent.iterdir()}
    for folder in (tmp_path / "fresh", prepared.parent):
        with pytest.raises(OSError, match="disk gone"):
            write_shards(with_samples(source, "test", samples), folder, samples_per_shard=5)
    assert list((tmp_path / "fresh").iterdir()) == []
    assert {path.name: path.read_bytes() for path in prepared.parent.iterdir()} == before


def test_an_end_between_two_renames_leaves_no_manifest(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = os.replace, []

    def replace_once(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tiny_source(), prepared.parent, samples_per_shard=5)
    assert len(done) == 1
    assert not prepared.exists()


def refused(change: str) -> DataSource:
    source = tiny_source()
    train = source.splits["train"]
    first, *rest = train.samples
    black = png(np.zeros(SHAPE, np.uint8))
    return {
        "name": lambda: replace(source, name="../x"),
        "split": lambda: replace(source, splits={k: v for k, v in source.splits.items() if k != "val"}),
        "class": lambda: with_samples(source, "train", [s for s in train.samples if s.label != 1]),
        "label": lambda: with_samples(source, "train", [replace(first, label=3), *rest]),
        "twice": lambda: replace(source, splits=source.splits | {"val": train}),
        "key": lambda: with_samples(source, "train", [replace(first, key=rest[0].key), *rest]),
        "dot": lambda: with_samples(source, "train", [replace(first, key="a.b"), *rest]),
        "shape": lambda: with_samples(
            source, "train", [replace(first, read=lambda: png(np.zeros((4, 5, 3), np.uint8)))]
        ),
        "mode": lambda: with_samples(
            source, "val", [replace(first, read=lambda: png(np.zeros((4, 6), np.uint8))), *rest]
        ),
        "jpeg": lambda: with_samples(source, "val", [replace(first, read=lambda: b"\xff\xd8\xff"), *rest]),
        "black": lambda: with_samples(source, "train", [replace(s, read=lambda: black) for s in train.samples]),
    }[change]()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("name", r"name \('\.\./x'\) must be letters"),
        ("split", "split val is empty"),
        ("class", "class train-c1 has no images"),
        ("label", "label 3 must lie between 0 and 2"),
        ("twice", "class train-c0 is in train and again in val"),
        ("key", "key 'c0_s_000001' must be unique"),
        ("dot", r"key 'a\.b' must be unique, not empty, without dots"),
        ("mode", "image c0_s_000000 is a 6x4 L image and should be a 6x4 RGB image"),
        ("jpeg", "image c0_s_000000 does not decode as PNG"),
        ("black", "the same value everywhere"),
    ],
)
def test_a_source_that_cannot_be_trained_on_is_refused(tmp_path: Path, change: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        write_shards(refused(change), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- reading: each error names the shard, the member if it is known, and the command ---


@pytest.mark.parametrize("extra", [-200, 100, 600])
def test_a_truncated_shard_is_named_with_its_last_member(prepared: Path, extra: int) -> None:
    shard = prepared.parent / "tiny-train-000001.tar"
    with tarfile.open(shard) as tar:
        infos = tar.getmembers()
    with shard.open("r+b") as file:  # in the padding or data before member 5, in its header, in its data
        file.truncate(infos[5].offset + extra)
    text = read_fault(prepared)
    assert f"shard {shard}: its sha256 is" in text
    assert f"(the tar breaks off after member {infos[4].name})" in text


def test_a_flipped_byte_is_found_and_its_sample_named(prepared: Path) -> None:
    shard = prepared.parent / "tiny-train-000002.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        info = next(info for info in tar if info.name.endswith(".png"))
    content[info.offset_data + 45] ^= 0xFF  # inside the compressed pixels
    shard.write_bytes(content)
    text = read_fault(prepared)
    assert f"shard {shard}: its sha256 is {hashlib.sha256(content).hexdigest()}" in text
    assert f"(member {info.name} does not decode" in text


def test_no_byte_can_be_cut_off_or_flipped_unseen(prepared: Path) -> None:
    """A shard that can still be read holds what was written, whether its digest fits or not."""
    shard = prepared.parent / "tiny-train-000002.tar"
    whole, expected = shard.read_bytes(), list(read_samples(read_manifest(str(prepared)), "train"))
    with tarfile.open(shard) as tar:
        ends = [end for info in tar for end in (info.offset, info.offset_data, info.offset_data + info.size)]
    places = sorted({*range(0, len(whole), 331), *(e + i for e in ends for i in (-1, 0, 1) if e + i >= 0)})
    for place in places:
        flipped = whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :]
        for content in (whole[:place], flipped):
            shard.write_bytes(content)
            assert f"shard {shard}: its sha256 is {hashlib.sha256(content).hexdigest()}" in read_fault(prepared)
    whole_ones = 0
    for place in places:  # now with the digest of the changed file
        shard.write_bytes(whole[:place])
        digest = hashlib.sha256(whole[:place]).hexdigest()
        edit(prepared, lambda r, digest=digest: r["splits"]["train"]["shards"][2].update(sha256=digest))
        try:
            found: list[object] | str = list(read_samples(read_manifest(str(prepared)), "train"))
        except ValueError as fault:
            found = str(fault)
        assert found == expected or (f"shard {shard}" in found and "prepare the shards again" in found)
        whole_ones += found == expected
    assert 0 < whole_ones < len(places)  # those that are cut in the zeros at the end


def test_a_missing_shard_and_a_wrong_digest_are_named(prepared: Path) -> None:
    edit(prepared, lambda r: r["splits"]["train"]["shards"][0].update(sha256="0" * 64))
    assert f"{prepared.parent}/tiny-train-000000.tar: its sha256 is" in read_fault(prepared)
    (prepared.parent / "tiny-train-000000.tar").unlink()
    assert f"{prepared.parent}/tiny-train-000000.tar: No such file or directory" in read_fault(prepared)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x89PNG\r\n\x1a\n", "does not decode as PNG"),
        (b"", "does not decode as PNG"),
        (png(np.arange(72, dtype=np.uint8).reshape(SHAPE))[:-40], "does not decode as PNG"),
        (png(np.zeros((5, 6, 3), np.uint8)), "is a 6x5 RGB image and should be a 6x4 RGB image"),
        (png(np.zeros((4, 6), np.uint8)), "is a 6x4 L image and should be a 6x4 RGB image"),
        (png(np.zeros((4, 6, 4), np.uint8)), "is a 6x4 RGBA image and should be a 6x4 RGB image"),
    ],
    ids=["head", "empty", "cut", "size", "grey", "rgba"],
)
def test_an_image_that_cannot_be_used_is_named_although_its_digest_fits(
    prepared: Path, content: bytes, sentence: str
) -> None:
    rewrite_shard(prepared, 1, lambda members: members.__setitem__(3, (members[3][0], content)))
    with tarfile.open(prepared.parent / "tiny-train-000001.tar") as tar:
        key = tar.getnames()[3].removesuffix(".png")
    assert f"shard {prepared.parent}/tiny-train-000001.tar, sample {key}: {sentence}" in read_fault(prepared)


def test_a_label_that_is_no_class_names_the_member(prepared: Path) -> None:
    rewrite_shard(prepared, 1, lambda members: members.__setitem__(2, (members[2][0], b"3")))
    with tarfile.open(prepared.parent / "tiny-train-000001.tar") as tar:
        key = tar.getnames()[2].removesuffix(".cls")
    assert f"tiny-train-000001.tar, sample {key}: its label '3' must lie between 0 and 2" in read_fault(prepared)


def test_a_label_of_another_class_shows_in_the_counts(prepared: Path) -> None:
    def relabel(members: list[tuple[str, bytes]]) -> None:
        at = next(i for i, (name, content) in enumerate(members) if name.endswith(".cls") and content == b"0")
        members[at] = (members[at][0], b"1")

    rewrite_shard(prepared, 0, relabel)
    assert "has 4 images of class train-c0, the manifest says 5" in read_fault(prepared)


def test_a_duplicate_key_names_its_second_member(prepared: Path) -> None:
    with tarfile.open(prepared.parent / "tiny-train-000000.tar") as tar:
        key = tar.getnames()[0].partition(".")[0]

    def rename(members: list[tuple[str, bytes]]) -> None:
        members[:2] = [(f"{key}.{name.rpartition('.')[2]}", content) for name, content in members[:2]]

    rewrite_shard(prepared, 2, rename)
    assert f"tiny-train-000002.tar, sample {key}: occurs twice" in read_fault(prepared)


def test_a_missing_member_and_a_missing_sample_are_named(prepared: Path) -> None:
    rewrite_shard(prepared, 0, lambda members: members.pop(0))
    assert "has no .cls" in read_fault(prepared)
    rewrite_shard(prepared, 0, lambda members: members.pop(0))
    assert "tiny-train-000000.tar: holds 4 samples, the manifest says 5" in read_fault(prepared)
