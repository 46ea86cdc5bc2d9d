"""Members of a tar: the same as tarfile reads, in any of its formats, and whole."""

from __future__ import annotations

import io
import tarfile

import pytest

from lgm_dist.data.tar import members

NAMES = ["a.png", "a.cls", "folder/b.png", "ü.png", "c" * 99, "d" * 100, "e" * 180, "f/" * 60 + "f.png", "last.png"]


def make(form: int, names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 511 * i
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    return file.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("turn", range(len(NAMES)))
def test_names_and_contents_are_those_of_tarfile(form: int, turn: int) -> None:
    """In each order in which plain and other headers follow each other; ustar cannot hold the two longest names."""
    names = [name for name in NAMES[turn:] + NAMES[:turn] if form != tarfile.USTAR_FORMAT or len(name) < 101]
    content = make(form, names)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    *found, end = members(io.BytesIO(content))
    assert [(member["fname"], member["data"]) for member in found] == expected
    assert [name for name, _ in expected] == names
    assert end == {}


@pytest.mark.parametrize("length", [0, 100, 512, 700, 1022])
def test_a_tar_that_breaks_off_is_an_error(length: int) -> None:
    content = make(tarfile.PAX_FORMAT, ["a.png", "b.png"])[512:]  # the first has none
    with pytest.raises((ValueError, tarfile.TarError)):
        list(members(io.BytesIO(content[:length])))
