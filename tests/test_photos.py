"""Photos of any kind become the pixels that `prepare folder` would have written; what cannot be understood is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lgm_dist.adapt.photos import problem_of, read_photo, read_photos
from lgm_dist.data.sources.folder import folder_source

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8)
SHAPE = (8, 10, 3)
GREY = PIXELS[..., 0]
DEEP = (GREY.astype(np.uint16) << 8) + 7


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_arrays_tensors_and_images_are_the_same_photo() -> None:
    for photo in (
        PIXELS,
        np.asfortranarray(PIXELS),
        Image.fromarray(PIXELS),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        np.dstack([PIXELS, GREY]),
        PIXELS.astype(np.uint16) * 256 + 255,
        PIXELS / 255,
        torch.from_numpy(PIXELS).float() / 255,
    ):
        assert np.array_equal(read_photo(photo, SHAPE), PIXELS)
    for grey in (GREY, GREY[..., None], DEEP, torch.from_numpy(GREY), np.dstack([GREY, GREY])):
        assert np.array_equal(read_photo(grey, SHAPE), np.dstack([GREY] * 3))
        assert np.array_equal(read_photo(grey, (8, 10, 1)), GREY[..., None])
    assert np.array_equal(read_photo(GREY > 127, (8, 10, 1))[..., 0], np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("kind", ["jpg", "cmyk", "rgba", "deep", "palette", "sideways", "large", "grey"])
def test_a_photo_is_read_as_a_data_set_is_prepared(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    large = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    images: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpg": (Image.fromarray(PIXELS), "a.jpg", {}),
        "cmyk": (Image.fromarray(PIXELS).convert("CMYK"), "a.jpg", {}),
        "rgba": (Image.fromarray(np.dstack([PIXELS, GREY])), "a.png", {}),
        "deep": (Image.fromarray(DEEP), "a.png", {}),
        "palette": (Image.fromarray(PIXELS).quantize(16), "a.gif", {}),
        "sideways": (Image.fromarray(large), "a.jpg", {"exif": exif}),
        "large": (Image.fromarray(large), "a.webp", {}),
        "grey": (Image.fromarray(GREY), "a.png", {}),
    }
    image, name, options = images[kind]
    for split in ("train", "val", "test"):
        (tmp_path / split / split).mkdir(parents=True)
        path = saved(tmp_path / split / split / name, image, **options)
        saved(tmp_path / split / split / "colour.png", Image.fromarray(PIXELS))
    prepared = folder_source(str(tmp_path), "x", 9).splits["test"].samples[0].read()
    wanted = np.asarray(Image.open(io.BytesIO(prepared)))
    assert np.array_equal(read_photo(path, (9, 9, 3)), wanted)
    with Image.open(path) as opened:
        assert np.array_equal(read_photo(opened, (9, 9, 3)), wanted)
        assert opened.size == image.size  # the caller's image stays open and as it was


def test_an_exif_orientation_turns_the_photo(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be viewed turned by 90 degrees clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(np.rot90(PIXELS)), exif=exif)
    assert np.array_equal(read_photo(path, SHAPE), PIXELS)


@pytest.mark.parametrize(
    ("photo", "sentence"),
    [
        (b"\x89PNG", r"^photo 1 is bytes; open them with PIL\.Image\.open"),
        ("https://host/a.jpg", r"^https://host/a\.jpg is a URL; download it"),
        ("no/such.jpg", r"^no/such\.jpg is not an image that PIL reads \(.*No such file"),
        (3, r"^photo 1 \(int\) must be a path, a PIL image, an array or a tensor$"),
        (torch.zeros(3, 3, 3), r"^photo 1 \(3, 3, 3\) could be \(C, H, W\) or \(H, W, C\); give a numpy array"),
        (np.zeros((4, 8, 8, 3), np.uint8), r"^photo 1 has shape \(4, 8, 8, 3\); an array is \(H, W, C\)"),
        (np.zeros((3, 8, 8), np.uint8), r"^photo 1 has shape \(3, 8, 8\); an array is \(H, W, C\)"),
        (np.zeros((0, 8, 3), np.uint8), r"^photo 1 has shape \(0, 8, 3\)"),
        (np.full((8, 8), 9.0), r"^photo 1 \(float64, values from 9 to 9\) has no known range; give uint8"),
        (np.full((8, 8), -0.1), r"values from -0\.1 to -0\.1\) has no known range"),
        (np.full((8, 8), np.nan), r"values from nan to nan\) has no known range"),
        (np.full((8, 8), 9, np.int64), r"^photo 1 \(int64, values from 9 to 9\) has no known range"),
        (Image.new("F", (8, 8)), r"^photo 1 has pixels of mode F without a known range"),
    ],
)
def test_what_cannot_be_understood_is_one_sentence(photo: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        read_photo(photo, SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [70, 30])
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(PIXELS))
    image = Image.open(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # the image has 80 pixels
    for photo in (path, image):
        with pytest.raises(ValueError, match="shrink or remove it"):
            read_photo(photo, SHAPE)


def test_a_cut_photo_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "cut.jpg", Image.fromarray(RNG.integers(0, 256, (80, 80, 3), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg is damaged"):
        read_photo(path, SHAPE)
    with Image.open(path) as image, pytest.raises(ValueError, match=r"^photo 1 is damaged"):
        read_photo(image, SHAPE)


def test_names_of_many_photos(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(PIXELS))
    found = read_photos([path, PIXELS, str(path)], SHAPE, "class 'owl'", first=7)
    assert found.names == (str(path), "class 'owl', photo 8", str(path))
    assert np.array_equal(found.pixels, np.stack([PIXELS] * 3))
    assert np.array_equal(read_photos(np.stack([PIXELS] * 2), SHAPE).pixels, np.stack([PIXELS] * 2))
    for one_array in (PIXELS, GREY, torch.from_numpy(PIXELS)):
        with pytest.raises(
            ValueError, match=r"^photos has shape \(8, .*\); give a list of arrays, or one \(n, H, W, C\)$"
        ):
            read_photos(one_array, SHAPE)
    for one in (path, str(path), Image.fromarray(PIXELS), 5):
        with pytest.raises(
            ValueError, match=r"^photos \(\w+\) must be a list of photos; write \[photo\] for one photo"
        ):
            read_photos(one, SHAPE)


def test_problems(tmp_path: Path) -> None:
    for name, count in (("owl", 2), ("heron", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            saved(tmp_path / name / f"{i}.png", Image.fromarray(PIXELS))
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "owl" / ".DS_Store").write_text("x")
    found = problem_of(tmp_path)
    assert {name: [Path(str(p)).name for p in photos] for name, photos in found.items()} == {
        "heron": ["0.png"],
        "owl": ["0.png", "1.png"],
    }
    assert problem_of({"b": (PIXELS,), "a": iter([PIXELS, PIXELS])}).keys() == {"b", "a"}
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(ValueError, match=r"note\.txt lies beside the class folders"):
        problem_of(tmp_path)


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        ("no/such/folder", r"^the folder no/such/folder does not exist; name a folder with one folder of photos"),
        (["a.jpg"], r"^photos \(list\) must be a folder of class folders or \{name: \[photos\]\}$"),
        ({"a": [PIXELS]}, r"^photos has 1 classes; give 2 to 1,000$"),
        ({str(i): [PIXELS] for i in range(1001)}, r"^photos has 1001 classes; give 2 to 1,000$"),
        ({"a": [PIXELS], "b": []}, r"^class 'b' has no photos; give it one or leave it out$"),
        ({"a": [PIXELS], "b": "b.jpg"}, r"^class 'b' \(str\) must be a list of photos"),
        ({"a": [PIXELS], " ": [PIXELS]}, r"^a class is named ' '; name it with a text$"),
        ({"a": [PIXELS], 3: [PIXELS]}, r"^a class is named 3; name it with a text$"),
    ],
)
def test_a_problem_that_is_none_is_one_sentence(problem: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        problem_of(problem)
