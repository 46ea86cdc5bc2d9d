"""The built-in data set: disjoint alphabets, real letters, equal bytes anywhere, and only the shape tells the class."""

import hashlib
import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lgm_dist.data.sources.glyphs import ALPHABETS, FACES, IMAGES_PER_CLASS, glyph_image, glyphs_source

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
LETTERS = "".join(ALPHABETS.values())
SCRIPTS = {"train": {"LATIN", "GREEK", "CYRILLIC"}, "val": {"GEORGIAN"}, "test": {"ARMENIAN"}}


@pytest.fixture(scope="module")
def armenian() -> NDArray[np.uint8]:
    """All images of the test split, decoded: (classes, images, H, W, 3)."""
    split = glyphs_source().splits["test"]
    images = [np.asarray(Image.open(io.BytesIO(sample.read()))) for sample in split.samples]
    return np.stack(images).reshape(len(split.classes), IMAGES_PER_CLASS, 32, 32, 3)


def test_counts_labels_and_keys() -> None:
    source = glyphs_source()
    assert (source.name, source.shape) == ("glyphs", (32, 32, 3))
    assert {name: len(split.classes) for name, split in source.splits.items()} == {"train": 60, "val": 24, "test": 24}
    for split in source.splits.values():
        labels = [sample.label for sample in split.samples]
        assert np.bincount(labels).tolist() == [80] * len(split.classes)
        keys = [sample.key for sample in split.samples]
        assert len(set(keys)) == len(keys)
        assert not any(mark in key for key in keys for mark in "./ ")
    assert source.splits["train"].classes[0].name == "latin_capital_letter_a"
    assert source.splits["test"].classes[-1].group == "armenian"
    assert source.splits["val"].samples[81].key == "georgian_letter_ban_001"


def test_splits_are_disjoint_alphabets() -> None:
    assert len(set(LETTERS)) == len(LETTERS) == 108
    for name, split in glyphs_source().splits.items():
        assert {unicodedata.name(letter).split()[0] for letter in ALPHABETS[name]} == SCRIPTS[name]
        assert {info.group.upper() for info in split.classes} == SCRIPTS[name]


def test_every_face_has_every_letter() -> None:
    assert len(set(FACES)) == 12
    for face in FACES:
        with TTFont(FONTS / f"{face}.ttf") as font:
            glyph_of = font.getBestCmap()
        assert [letter for letter in LETTERS if glyph_of.get(ord(letter), ".notdef") == ".notdef"] == []


def _shape(face: ImageFont.FreeTypeFont, letter: str) -> NDArray[np.float64]:
    """The letter's ink fitted into 28 of 32 pixels and blurred by a stroke's width: (H, W), mean 0, norm 1."""
    canvas = Image.new("L", (140, 140))
    ImageDraw.Draw(canvas).text((30, 30), letter, 255, face)
    ink = canvas.crop(canvas.getbbox())
    ink = ink.resize([max(1, round(side * 28 / max(ink.size))) for side in ink.size])
    fitted = Image.new("L", (32, 32))
    fitted.paste(ink, ((32 - ink.width) // 2, (32 - ink.height) // 2))
    shape = np.asarray(fitted.filter(ImageFilter.GaussianBlur(1.2)), float)
    shape -= shape.mean()
    return shape / np.linalg.norm(shape)


def test_no_two_letters_look_alike() -> None:
    # The same measure gives 1.00 for Latin h and Armenian ho, 0.97 for S and s, 1.00 for b and a mirrored d.
    for face in FACES:
        font = ImageFont.truetype(FONTS / f"{face}.ttf", 60)
        shapes = np.stack([_shape(font, letter) for letter in LETTERS])  # (classes, H, W)
        alike = np.einsum("ahw,bhw->ab", shapes, shapes) - 2 * np.eye(len(LETTERS))
        assert alike.max() < 0.93, [LETTERS[i] for i in np.unravel_index(alike.argmax(), alike.shape)]
        train = shapes[: len(ALPHABETS["train"])]
        mirrored = np.einsum("ahw,bhw->ab", train, train[:, :, ::-1]) - 2 * np.eye(len(train))
        assert mirrored.max() < 0.93, [LETTERS[i] for i in np.unravel_index(mirrored.argmax(), mirrored.shape)]


def test_images_are_rgb_and_all_different(armenian: NDArray[np.uint8]) -> None:
    sample = glyphs_source().splits["test"].samples[IMAGES_PER_CLASS + 3]
    png = Image.open(io.BytesIO(sample.read()))
    assert (png.format, png.mode, png.size) == ("PNG", "RGB", (32, 32))
    np.testing.assert_array_equal(np.asarray(png), glyph_image(ALPHABETS["test"][1], 3))
    assert len(np.unique(armenian.reshape(-1, 32 * 32 * 3), axis=0)) == 24 * 80


def test_bytes_do_not_depend_on_order_or_process() -> None:
    samples = glyphs_source().splits["val"].samples
    places = range(0, 1920, 40)
    here = [hashlib.sha256(samples[place].read()).hexdigest() for place in places]
    assert [hashlib.sha256(samples[place].read()).hexdigest() for place in reversed(places)] == here[::-1]
    program = """if True:
        import hashlib
        from lgm_dist.data.sources.glyphs import glyphs_source
        samples = glyphs_source().splits["val"].samples
        for place in range(1880, -1, -40):
            print(hashlib.sha256(samples[place].read()).hexdigest())
    """
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert there.stdout.split() == here[::-1]


def _nearest(features: NDArray[np.float64]) -> float:
    """Share of the images (classes, images, D) whose nearest other image is of their class."""
    flat = features.reshape(-1, features.shape[-1])  # (N, D)
    square = (flat**2).sum(1)
    distance = square[:, None] + square - 2 * flat @ flat.T  # (N, N)
    np.fill_diagonal(distance, np.inf)
    classes = np.arange(len(flat)) // features.shape[1]
    return float((classes[distance.argmin(1)] == classes).mean())


def test_colour_does_not_tell_the_class(armenian: NDArray[np.uint8]) -> None:
    chance = 79 / 1919
    assert _nearest(armenian.mean((2, 3))) < chance + 0.03  # six standard errors


def test_raw_pixels_start_near_chance(armenian: NDArray[np.uint8]) -> None:
    """One-shot 5-way accuracy of the nearest support image over 200 episodes with 5 queries a class."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(200):
        ways = armenian[rng.choice(24, 5, replace=False)].reshape(5, 80, -1).astype(float)  # (N, images, D)
        drawn = ways[:, rng.permutation(80)[:6]]  # (N, 1 + queries, D)
        distance = ((drawn[:, 1:, None] - drawn[None, None, :, 0]) ** 2).sum(-1)  # (N, queries, N)
        hits.append((distance.argmin(-1) == np.arange(5)[:, None]).mean())
    assert 0.15 < np.mean(hits) < 0.33


def test_images_show_their_letter(armenian: NDArray[np.uint8]) -> None:
    """Distance from the border's colour shows the ink; class means of one half tell the other half's classes."""
    images = armenian.astype(float)
    edges = np.concatenate([images[:, :, 0], images[:, :, -1]], 2)  # (classes, images, 2 W, 3)
    border = edges.mean(2)[:, :, None, None]  # (classes, images, 1, 1, 3)
    ink = np.linalg.norm(images - border, axis=-1).reshape(24, 80, -1)  # (classes, images, D)
    ink = (ink - ink.mean(-1, keepdims=True)) / ink.std(-1, keepdims=True)
    score = np.einsum("cid,kd->cik", ink[:, 40:], ink[:, :40].mean(1))  # (classes, images, classes)
    assert (score.argmax(-1) == np.arange(24)[:, None]).mean() > 0.25  # six times chance


def test_missing_fonts_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"DejaVuSans.ttf, which is missing; install matplotlib"):
        glyphs_source()
