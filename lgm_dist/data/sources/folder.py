"""Any data set of class folders: SOURCE/train/CLASS/IMAGE, and the same under val and test."""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lgm_dist.config import SPLITS, Split
from lgm_dist.data.keys import unique_keys
from lgm_dist.data.png import encode
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource

Size = tuple[int, int]
"""Height, width."""


def folder_source(source: str, name: str, size: int | None) -> DataSource:
    """The data set `name` from the folder `source` with train/, val/ and test/, each with a folder per class.

    Images may be of any format, mode and size that PIL reads; classes may be of unequal size. The EXIF orientation is
    applied, transparency dropped, the mode converted to RGB, 16-bit grey values divided by 256, and of an animation
    the first frame taken. With `size`, images are resized to size x size with PIL's bicubic filter (which averages
    when it shrinks; the aspect ratio is not kept). A PNG that needs none of this keeps its bytes. Files whose names
    begin with a dot are left out.

    Raises ValueError that names the file for anything else there, for images of unequal shape without `size`, and for
    a class in two splits.
    """
    if size is not None and size < 1:
        raise ValueError(f"size ({size}) must be at least 1; for example 84")
    files = {split: _class_files(Path(source).expanduser() / split) for split in SPLITS}
    _check_disjoint(files)
    target = (size, size) if size else _common_size([f for c in files.values() for fs in c.values() for f in fs])
    return DataSource(name, (*target, 3), {split: _split_source(classes, target) for split, classes in files.items()})


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class of a split, both sorted by name."""
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; a source has train/, val/ and test/, each with a folder per class"
        )
    classes = {}
    for entry in _visible(folder):
        if not entry.is_dir():
            raise ValueError(f"{entry} lies beside the class folders; move it into one or away")
        classes[entry.name] = _visible(entry)
        if not classes[entry.name]:
            raise ValueError(f"class folder {entry} is empty; put images into it or remove it")
        for inner in classes[entry.name]:
            if not inner.is_file():
                raise ValueError(f"{inner} is no file; a class folder holds images only")
    if not classes:
        raise ValueError(f"{folder} has no class folders; each class is a folder of images")
    return classes


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _check_disjoint(files: dict[Split, dict[str, list[Path]]]) -> None:
    home: dict[str, Split] = {}
    for split, classes in files.items():
        for name in classes:
            if name in home:
                raise ValueError(
                    f"class {name} is in {home[name]} and in {split}; few-shot splits share no class, rename or move it"
                )
            home[name] = split


def _common_size(files: list[Path]) -> Size:
    """The one size of all images. Raises ValueError that names the first odd one."""
    first = _upright_size(files[0])
    for file in files:
        height, width = _upright_size(file)
        if (height, width) != first:
            raise ValueError(
                f"{file} is {width}x{height}, {files[0]} is {first[1]}x{first[0]}; "
                "make them equal with --size, for example --size 84"
            )
    return first


def _upright_size(file: Path) -> Size:
    with _open(file) as image:
        sideways = _orientation(image, file) in (5, 6, 7, 8)  # those that swap the sides
        return (image.width, image.height) if sideways else (image.height, image.width)


def _split_source(classes: dict[str, list[Path]], target: Size) -> SplitSource:
    files = [(label, file) for label, found in enumerate(classes.values()) for file in found]
    keys = unique_keys([file.stem for _, file in files], [file.parent.name for _, file in files])
    samples = [
        Sample(key, label, functools.partial(_read, file, target))
        for key, (label, file) in zip(keys, files, strict=True)
    ]
    return SplitSource(tuple(ClassInfo(name) for name in classes), samples)


def _read(file: Path, target: Size) -> bytes:
    """The image of a file as PNG bytes of RGB and the target size."""
    content = file.read_bytes()
    with _open(file, content) as image:
        upright = _orientation(image, file) == 1
        if image.format == "PNG" and image.mode == "RGB" and upright and (image.height, image.width) == target:
            return content
        try:
            rgb = _to_rgb(ImageOps.exif_transpose(image), file)
        except (OSError, SyntaxError) as fault:
            raise ValueError(f"{file} is damaged ({fault}); replace or remove it") from fault
    if (rgb.height, rgb.width) != target:
        rgb = rgb.resize((target[1], target[0]), Image.Resampling.BICUBIC)
    return encode(np.asarray(rgb))  # (H, W, 3)


def _orientation(image: Image.Image, file: Path) -> int:
    """EXIF's orientation, 1 (upright) to 8."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, TypeError, ValueError, struct.error) as fault:
        raise ValueError(f"{file} has damaged EXIF data ({fault}); save it anew or remove it") from fault


def _to_rgb(image: Image.Image, file: Path) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL itself would cut such values off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{file} has pixels of mode {image.mode} without a known range; save it with 8 or 16 bits a channel"
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _open(file: Path, content: bytes | None = None) -> Image.Image:
    """Open an image and read its header only. Raises ValueError where PIL cannot, or where it is too large."""
    try:
        image = Image.open(file if content is None else io.BytesIO(content))
    except Image.DecompressionBombError as fault:
        raise ValueError(f"{file} is too large to be decoded safely ({fault}); shrink or remove it") from fault
    except (OSError, SyntaxError, ValueError) as fault:
        raise ValueError(f"{file} is no image that PIL reads ({fault}); remove it") from fault
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        image.close()
        raise ValueError(
            f"{file} has {image.width}x{image.height} pixels, above PIL's limit of {limit} against decompression bombs; "
            "shrink or remove it"
        )
    return image
