"""The built-in data set `glyphs`: coloured letters of 32 x 32 pixels, drawn without a download from matplotlib's fonts.

Train has Latin, Greek and Cyrillic letters, val Georgian ones, test Armenian ones. Every letter is drawn in each of the twelve
DejaVu faces, so that neither face nor colour tells the class. Letters that resemble another one are left out: the capitals that
Greek and Cyrillic share with Latin, the Armenian h, n, o, u, pairs of cases that differ in size only, and in train mirror
images, which a flip would confuse. An image is a pure function of (code point, index), to the byte for the same versions of
numpy, Pillow and matplotlib.
"""

from __future__ import annotations

import io
import math
import unicodedata
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lgm_dist.config import Split
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource
from lgm_dist.data.sources import register_source

ALPHABETS: dict[Split, str] = {
    "train": "ABDFGHKMNPQSTUVWYZaefghkmrtxæʒƕ" + "ΔΞΣΩΨαβδεζθλξω" + "БДЖЛФЦЧЪЫЭЮЯЂЉЊ",
    "val": "აბგდვთილოჟრტუფქღყშჩცჭხჯჰ",
    "test": "գդթժիլխկճմշպվփԸՀՇՉՋՔՖՁԵՆ",
}
"""The classes of each split, one letter each."""
IMAGES_PER_CLASS = 80
FACES = tuple(
    f"DejaVu{family}{weight}{slant}".removesuffix("-")
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for weight in ("-", "-Bold")
    for slant in ("", slanted)
)
"""Font files in which every letter is drawn, without their ending."""
SIZE = 32
"""Height and width of an image in pixels."""

_FINE = 2 * SIZE  # letters and strokes are drawn on a canvas of twice the size, for smooth edges
_EM = 40  # pixels of the em square of an upright letter; the widest letter still fits the canvas
_WHITE = 255
_ACROSS = np.linspace(-1, 1, SIZE, dtype=np.float32)
_Floats = NDArray[np.float32]


@register_source("glyphs")
def glyphs_source() -> DataSource:
    """The built-in data set of letters: 60 / 24 / 24 classes of 80 images, drawn without a download.

    Raises:
        ValueError: The installed matplotlib lacks a font.
    """
    for face in FACES:
        if not _font_path(face).is_file():
            raise ValueError(f"glyphs needs the font {_font_path(face)}, which is missing; install matplotlib with pip")
    return DataSource("glyphs", (SIZE, SIZE, 3), {split: _split_source(ALPHABETS[split]) for split in ALPHABETS})


def glyph_image(letter: str, index: int) -> NDArray[np.uint8]:
    """Image `index` of the class `letter`: (SIZE, SIZE, 3) RGB, whatever was drawn before it."""
    rng = np.random.Generator(np.random.Philox(key=np.array([ord(letter), index], np.uint64)))
    paper, contrast = _colours(rng)
    image = paper + (_strokes(rng) + _letter(rng, letter)).clip(max=1) * contrast  # (H, W, 3)
    image += rng.uniform(10, 60) * (rng.random(image.shape, np.float32) - np.float32(0.5))
    return image.clip(0, _WHITE).astype(np.uint8)


def _split_source(letters: str) -> SplitSource:
    samples = [
        Sample(f"{_name(letter)}_{index:03d}", label, partial(_png, letter, index))
        for label, letter in enumerate(letters)
        for index in range(IMAGES_PER_CLASS)
    ]
    return SplitSource(tuple(ClassInfo(_name(c), _name(c).split("_")[0]) for c in letters), samples)


def _name(letter: str) -> str:
    """The Unicode name, as in greek_small_letter_xi."""
    return unicodedata.name(letter).lower().replace(" ", "_")


def _png(letter: str, index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(glyph_image(letter, index)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _colours(rng: np.random.Generator) -> tuple[_Floats, _Floats]:
    """Paper (H, W, 3) with a slanting gradient, and what full ink adds to it (3,). Paper or ink may be darker."""
    dark, bright = rng.uniform(0, 110, 3), rng.uniform(145, _WHITE, 3)
    paper, ink = (dark, bright) if rng.random() < 0.5 else (bright, dark)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = math.cos(angle) * _ACROSS + math.sin(angle) * _ACROSS[:, None]  # (H, W)
    gradient = ramp[:, :, None] * rng.uniform(-40, 40, 3).astype(np.float32)  # (H, W, 3)
    return gradient + paper.astype(np.float32), (ink - paper).astype(np.float32)


def _strokes(rng: np.random.Generator) -> _Floats:
    """One to three straight strokes that distract from the letter: their share of ink, (H, W, 1) in [0, 0.5]."""
    canvas = Image.new("L", (_FINE, _FINE))
    draw = ImageDraw.Draw(canvas)
    shade = int(rng.uniform(0.25, 0.5) * _WHITE)
    for _ in range(int(rng.integers(1, 4))):
        draw.line(rng.uniform(0, _FINE, 4).tolist(), fill=shade, width=int(rng.integers(2, 6)))
    return _share(canvas.reduce(2))


def _letter(rng: np.random.Generator, letter: str) -> _Floats:
    """The letter rotated, slanted, stretched, moved and blurred: its share of ink, (H, W, 1) in [0, 1]."""
    canvas, extent = _upright(FACES[int(rng.integers(len(FACES)))], letter)
    shrink = extent / rng.uniform(17, 25)  # the longer side takes about 17 to 25 pixels of the image
    stretch = math.exp(rng.uniform(-0.15, 0.15))
    turn, slant = math.radians(rng.uniform(-20, 20)), rng.uniform(-0.2, 0.2)
    across, down = shrink * stretch, shrink / stretch
    cos, sin = math.cos(turn), math.sin(turn)
    # PIL wants the inverse: pixel (x, y) of the image shows (a x + b y + c, d x + e y + f) of the canvas.
    a, b = across * (cos - slant * sin), across * (sin + slant * cos)
    d, e = -down * sin, down * cos
    x, y = SIZE / 2 + rng.uniform(-3, 3, 2)
    back = (a, b, _FINE / 2 - a * x - b * y, d, e, _FINE / 2 - d * x - e * y)
    moved = canvas.transform((SIZE, SIZE), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    return _share(moved.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.75))))


def _share(grey: Image.Image) -> _Floats:
    return np.asarray(grey)[:, :, None] * np.float32(1 / _WHITE)  # (H, W, 1)


@cache
def _upright(face: str, letter: str) -> tuple[Image.Image, int]:
    """The letter in white on black in the middle of a fine canvas, and the longer side of its ink in pixels."""
    font = ImageFont.truetype(_font_path(face), _EM, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(letter)
    canvas = Image.new("L", (_FINE, _FINE))
    assert max(right - left, bottom - top) <= _FINE, f"{letter} of {face} does not fit"
    corner = ((_FINE - right - left) / 2, (_FINE - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(corner, letter, fill=_WHITE, font=font)
    return canvas, int(max(right - left, bottom - top))


def _font_path(face: str) -> Path:
    import matplotlib  # takes a while to import, and other sources do not need it

    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
