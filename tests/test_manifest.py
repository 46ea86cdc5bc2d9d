"""The manifest: every wrong field is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_shards import edit, tiny_source

from lgm_dist.data.manifest import read_manifest
from lgm_dist.data.shards import write_shards


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return write_shards(tiny_source(), tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(format=2), "format 2, newer than the 1"),
        (lambda r: r.update(format=0), r"format \(0\) must be 1"),
        (lambda r: r.pop("name"), "'name' is missing"),
        (lambda r: r.update(name=3), r"name \(3\) must be of type str"),
        (lambda r: r.update(shape=[4, 6]), r"shape \[4, 6\] must be 3 numbers"),
        (lambda r: r.update(shape=[4, 6.5, 3]), "shape .* must be 3 numbers"),
        (lambda r: r.update(shape=[4, 6, 2]), "1 or 3"),
        (lambda r: r.update(mean=[1, 2]), "mean .* must be 3 numbers"),
        (lambda r: r.update(mean=[1, 2, float("nan")]), "mean .* must be 3 numbers"),
        (lambda r: r.update(mean=[1, 2, 256]), "between 0 and 255"),
        (lambda r: r.update(std=[1, 2, 0]), "std .* above 0"),
        (lambda r: r["splits"].pop("val"), r"splits \(train, test\) must be train, val, test"),
        (lambda r: r["splits"]["val"].update(classes=[]), "split val has 0 classes"),
        (lambda r: r["splits"]["val"].update(shards={}), "shards .* must be of type list"),
        (lambda r: r["splits"]["val"]["classes"][0].update(images=True), "images .* must be of type int"),
        (lambda r: r["splits"]["val"]["classes"][0].update(images=0), r"images \(0\) must be at least 1"),
        (lambda r: r["splits"]["val"]["classes"][0].update(images=6), "split val has 13 images in its classes, 12"),
        (lambda r: r["splits"]["val"]["classes"][0].update(name="train-c0"), "class train-c0 occurs twice"),
        (lambda r: r["splits"]["val"]["shards"][0].update(file="../x.tar"), "file .* does not match"),
        (lambda r: r["splits"]["val"]["shards"][0].update(file="a..tar"), "plain name"),
        (lambda r: r["splits"]["val"]["shards"][0].update(sha256="12"), "sha256 .* does not match"),
        (lambda r: r["splits"]["val"]["shards"].__setitem__(0, 1), "1 must be a record with 'file'"),
    ],
)
def test_a_wrong_field_of_a_manifest_is_named(prepared: Path, change: Callable[[Any], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"{prepared}.*{sentence}.*write it again with `lgm-dist prepare"):
        read_manifest(str(edit(prepared, change)))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format": 1e999}', b"[" * 100_000])
def test_a_manifest_that_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"manifest {path}: "):
        read_manifest(str(path))


def test_a_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the manifest .*lgm-dist prepare fc100 --source PATH --out"):
        read_manifest(str(tmp_path / "fc100.json"))
