"""Any data set of class folders: SOURCE/train/CLASS/IMAGE, and the same under val and test."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from lgm_dist.config import SPLITS, Split
from lgm_dist.data.keys import unique_keys
from lgm_dist.data.photo import GREY, decoded, open_image, orientation, resized
from lgm_dist.data.png import MODES, encode
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource
from lgm_dist.data.sources import register_source


@register_source("folder")
def folder_source(source: str, name: str, size: int | None = None) -> DataSource:
    """Any data set of class folders.

    Images may be of any format, colour mode and size that PIL reads. If all are grey, the data set has one channel, else three.
    The EXIF orientation is applied, transparency is dropped, 16-bit grey values are divided by 256, and of an animation the
    first frame is used. Classes may be of unequal size. Files whose names begin with a dot are left out.

    Args:
        source: Folder with train/, val/ and test/, each with a folder of images per class.
        name: Name of the data set.
        size: Resize every image to size x size pixels with PIL's bicubic filter, which averages when it shrinks; the aspect
            ratio is not kept. Without it, all images must have the same size, and a PNG that needs no change keeps its bytes.

    Raises:
        ValueError: Something else lies in the folders, images are of unequal shape without `size`, or a class is in two splits.
            The message names the file.
    """
    if size is not None and size < 1:
        raise ValueError(f"size ({size}) must be at least 1; for example 84")
    root = Path(source).expanduser()
    for split in SPLITS:
        if not (root / split).is_dir():
            raise ValueError(
                f"the folder {root / split} does not exist; a source has train/, val/ and test/, each with one folder per class"
            )
    files = {split: class_files(root / split) for split in SPLITS}
    _check_disjoint(files)
    images = [file for classes in files.values() for found in classes.values() for file in found]
    height, width = (size, size) if size else _common_size(images)
    shape = (height, width, 1 if all(map(_is_grey, images)) else 3)
    return DataSource(name, shape, {split: _split_source(classes, shape) for split, classes in files.items()})


def class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder in `folder`, both sorted by name; names that begin with a dot are left out.

    Raises ValueError for an empty folder, a file beside the class folders and a folder inside one.
    """
    classes = {}
    for entry in _visible(folder):
        if not entry.is_dir():
            raise ValueError(f"{entry} lies beside the class folders; move it into one of them or away")
        classes[entry.name] = _visible(entry)
        if not classes[entry.name]:
            raise ValueError(f"class folder {entry} is empty; put images into it or remove it")
        for inner in classes[entry.name]:
            if not inner.is_file():
                raise ValueError(f"{inner} is not a file; a class folder holds images only")
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


def _common_size(files: list[Path]) -> tuple[int, int]:
    """Height and width of all images. Raises ValueError that names the first image of another size."""
    first = _upright_size(files[0])
    for file in files:
        height, width = _upright_size(file)
        if (height, width) != first:
            raise ValueError(
                f"{file} is {width}x{height}, {files[0]} is {first[1]}x{first[0]}; "
                "make them equal with --size, for example --size 84"
            )
    return first


def _upright_size(file: Path) -> tuple[int, int]:
    with open_image(file) as image:
        sideways = orientation(image, str(file)) in (5, 6, 7, 8)  # these swap the sides
        return (image.width, image.height) if sideways else (image.height, image.width)


def _is_grey(file: Path) -> bool:
    with open_image(file) as image:
        return image.mode in GREY


def _split_source(classes: dict[str, list[Path]], shape: tuple[int, int, int]) -> SplitSource:
    files = [(label, file) for label, found in enumerate(classes.values()) for file in found]
    keys = unique_keys([file.stem for _, file in files], [file.parent.name for _, file in files])
    samples = [
        Sample(key, label, functools.partial(_read, file, shape))
        for key, (label, file) in zip(keys, files, strict=True)
    ]
    return SplitSource(tuple(ClassInfo(name) for name in classes), samples)


def _read(file: Path, shape: tuple[int, int, int]) -> bytes:
    """The image of a file as PNG bytes of an image of `shape` (H, W, C)."""
    (height, width, channels), content = shape, file.read_bytes()
    mode = MODES[channels]
    with open_image(file, content) as image:
        upright = orientation(image, str(file)) == 1
        fits = image.format == "PNG" and image.mode == mode
        if fits and upright and (image.height, image.width) == (height, width):
            return content
        converted = resized(decoded(image, mode, str(file)), height, width)
    return encode(np.asarray(converted))  # (H, W, 3) or (H, W)
