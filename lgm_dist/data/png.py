"""PNG bytes to pixels and back."""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
from PIL import Image

MODES = {1: "L", 3: "RGB"}
"""PIL's mode of an image with so many channels."""


def decode(png: bytes, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """The pixels of a PNG, (H, W, C), read-only. Raises ValueError if it is damaged or not of `shape` (H, W, C)."""
    height, width, channels = shape
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            found = (image.height, image.width, image.mode)
            pixels = image.tobytes() if found == (height, width, MODES[channels]) else b""
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as fault:
        raise ValueError(f"does not decode as PNG ({fault})") from fault
    if found != (height, width, MODES[channels]):
        raise ValueError(
            f"is a {found[1]}x{found[0]} {found[2]} image and should be a {width}x{height} {MODES[channels]} image"
        )
    return np.frombuffer(pixels, np.uint8).reshape(height, width, channels)  # (H, W, C)


def encode(pixels: npt.NDArray[np.uint8]) -> bytes:
    """PNG bytes of an image (H, W, 3), or (H, W) if it is grey; the same bytes for the same pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
