"""How a photo is read, whatever its format, colour mode and orientation: the same for data sets and for a user's photos."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L")
"""PIL's modes of grey images that are read."""


def open_image(file: str | Path, content: bytes | None = None) -> Image.Image:
    """Open an image and read its header only. Raises ValueError if PIL cannot, or if the image is too large.

    `content` holds the bytes of the file if they are read already.
    """
    try:
        image = Image.open(file if content is None else io.BytesIO(content))
    except Image.DecompressionBombError as fault:
        raise ValueError(f"{file} is too large to be decoded safely ({fault}); shrink or remove it") from fault
    except (OSError, SyntaxError, ValueError) as fault:
        raise ValueError(f"{file} is not an image that PIL reads ({fault}); remove it") from fault
    try:
        check_pixels(image, str(file))
    except ValueError:
        image.close()
        raise
    return image


def check_pixels(image: Image.Image, name: str) -> None:
    """Raise ValueError for more pixels than PIL's limit, from which on PIL itself only warns."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise ValueError(
            f"{name} has {image.width}x{image.height} pixels, above PIL's limit of {limit} against decompression bombs; "
            "shrink or remove it"
        )


def orientation(image: Image.Image, name: str) -> int:
    """EXIF's orientation, 1 (upright) to 8."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, TypeError, ValueError, struct.error) as fault:
        raise ValueError(f"{name} has damaged EXIF data ({fault}); save it again or remove it") from fault


def decoded(image: Image.Image, mode: str, name: str) -> Image.Image:
    """The image upright and in PIL's mode L or RGB: transparency is dropped, and 16-bit grey values are divided by 256.

    Raises ValueError that begins with `name` for a damaged image, or one whose range of values is not known.
    """
    orientation(image, name)
    try:
        return _converted(ImageOps.exif_transpose(image), mode, name)
    except (OSError, SyntaxError) as fault:
        raise ValueError(f"{name} is damaged ({fault}); replace or remove it") from fault


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image of this size by PIL's bicubic filter, which averages when it shrinks; the aspect ratio is not kept."""
    if (image.height, image.width) == (height, width):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _converted(image: Image.Image, mode: str, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL itself would cut such values off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has pixels of mode {image.mode} without a known range; save it with 8 or 16 bits a channel"
        )
    if mode == "RGB" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
