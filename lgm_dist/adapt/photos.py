"""A user's photos as the pixels that a learner takes, read as data sets of class folders are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lgm_dist.data.photo import check_pixels, decoded, open_image, resized
from lgm_dist.data.png import MODES
from lgm_dist.data.sources.folder import class_files

Photo = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor
"""The path of an image, a PIL image, an array (H, W, C) or (H, W), or a tensor (C, H, W), (H, W, C) or (H, W)."""
Problem = str | os.PathLike[str] | Mapping[str, Iterable[Photo]]
"""A folder of class folders, or the photos of each class by name."""
Pixels = npt.NDArray[np.uint8]
MOST_CLASSES = 1000
_CHANNELS = (1, 2, 3, 4)
"""Channels of an array: grey or RGB, each with or without transparency."""
_URLS = ("http://", "https://", "ftp://", "file://", "s3://", "gs://", "data:")


class NamedPhotos(NamedTuple):
    """Photos of one class, or photos to classify."""

    names: tuple[str, ...]
    """What messages call each of them: its path, or its number."""
    pixels: Pixels
    """(n, H, W, C), of the learner's size."""


def read_photos(photos: Iterable[Photo], shape: tuple[int, int, int], where: str = "", first: int = 1) -> NamedPhotos:
    """Photos as pixels of `shape` (H, W, C). Raises ValueError that names a photo that cannot be read.

    Photos that are not files are called by their numbers, from `first` on, after `where`.
    """
    check_list(photos, where or "photos")
    given = list(photos)
    names = tuple(name_of(photo, number, where) for number, photo in enumerate(given, start=first))
    pixels = np.empty((len(given), *shape), np.uint8)
    for place, photo, name in zip(pixels, given, names, strict=True):
        place[:] = read_photo(photo, shape, name)
    return NamedPhotos(names, pixels)


def read_photo(photo: Photo, shape: tuple[int, int, int], name: str = "") -> Pixels:
    """A photo as pixels of `shape` (H, W, C): upright, without transparency, in the learner's size and colours.

    Values of 16 bits are divided by 256, real ones in 0 to 1 multiplied by 255. Raises ValueError that begins with `name` for a
    photo that cannot be read, for an array that can be understood in two ways, and for bytes and URLs.
    """
    height, width, channels = shape
    name = name or name_of(photo, 1)
    image = _image_of(photo, name)
    with nullcontext(image) if image is photo else image:  # the caller's stays open
        upright = resized(decoded(image, MODES[channels], name), height, width)
    return np.asarray(upright).reshape(shape)  # (H, W, C)


def problem_of(given: Problem) -> dict[str, list[Photo]]:
    """The photos of each class. Raises ValueError for a wrong folder, a class without photos, or too few or many classes."""
    classes: dict[str, list[Photo]]
    if isinstance(given, (str, os.PathLike)):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"the folder {folder} does not exist; name a folder with one folder of photos for each class"
            )
        classes = {name: list(files) for name, files in class_files(folder).items()}
    elif isinstance(given, Mapping):
        classes = {name: _listed(name, photos) for name, photos in given.items()}
    else:
        raise ValueError(f"photos ({type(given).__name__}) must be a folder of class folders or {{name: [photos]}}")
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"photos has {len(classes)} classes; give 2 to {MOST_CLASSES:,}")
    return classes


def name_of(photo: Photo, number: int, where: str = "") -> str:
    """What messages call a photo: its path if it is a file, else its number."""
    if isinstance(photo, (str, os.PathLike)):
        return os.fspath(photo)
    return f"{where}{', ' if where else ''}photo {number}"


def check_list(photos: Any, where: str) -> None:
    """Raise ValueError unless `photos` is a list of photos, or something like it; one photo alone is not.

    An array or a tensor is one of several photos if it has four dimensions.
    """
    if isinstance(photos, (np.ndarray, Tensor)) and photos.ndim != 4:
        raise ValueError(f"{where} has shape {tuple(photos.shape)}; give a list of arrays, or one (n, H, W, C)")
    if isinstance(photos, (str, bytes, os.PathLike, Image.Image)) or not isinstance(photos, Iterable):
        raise ValueError(f"{where} ({type(photos).__name__}) must be a list of photos; write [photo] for one photo")


def check_name(name: Any) -> None:
    """Raise ValueError unless `name` can name a class."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"a class is named {name!r}; name it with a text")


def _listed(name: Any, photos: Any) -> list[Photo]:
    """The photos of a class."""
    check_name(name)
    check_list(photos, f"class {name!r}")
    found = list(photos)
    if not found:
        raise ValueError(f"class {name!r} has no photos; give it one or leave it out")
    return found


def _image_of(photo: Any, name: str) -> Image.Image:
    if isinstance(photo, (bytes, bytearray, memoryview)):
        raise ValueError(f"{name} is bytes; open them with PIL.Image.open(io.BytesIO(content)) and give the image")
    if isinstance(photo, str) and photo.lower().startswith(_URLS):
        raise ValueError(f"{photo[:80]} is a URL; download it and give the path of the file")
    if isinstance(photo, (str, os.PathLike)):
        return open_image(Path(photo).expanduser())
    if isinstance(photo, Image.Image):
        check_pixels(photo, name)
        return photo
    if isinstance(photo, Tensor):
        return _image_of_array(_channels_last(photo.detach().cpu(), name), name)
    if isinstance(photo, np.ndarray):
        return _image_of_array(photo, name)
    raise ValueError(f"{name} ({type(photo).__name__}) must be a path, a PIL image, an array or a tensor")


def _channels_last(tensor: Tensor, name: str) -> npt.NDArray[Any]:
    """(C, H, W), (H, W, C) or (H, W) -> (H, W, C) or (H, W)."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    if tensor.dim() == 3:
        first, last = tensor.shape[0] in _CHANNELS, tensor.shape[2] in _CHANNELS
        if first and last:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} could be (C, H, W) or (H, W, C); give a numpy array (H, W, C)"
            )
        tensor = tensor.permute(1, 2, 0) if first else tensor  # (H, W, C)
    found: npt.NDArray[Any] = tensor.numpy()
    return found


def _image_of_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    """(H, W, C) or (H, W) -> an image of mode L, LA, RGB or RGBA."""
    if array.ndim == 2:
        array = array[..., None]  # (H, W, 1)
    if array.ndim != 3 or array.shape[2] not in _CHANNELS or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; an array is (H, W, C) or (H, W), with 1 to 4 channels")
    pixels = _bytes_of(array, name)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def _bytes_of(array: npt.NDArray[Any], name: str) -> Pixels:
    """The values as 0 to 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:  # false for NaN
        return (array * 255).round().astype(np.uint8)
    values = f"values from {array.min():g} to {array.max():g}" if array.dtype.kind in "iuf" else "such values"
    raise ValueError(
        f"{name} ({array.dtype}, {values}) has no known range; give uint8, uint16, or real numbers in 0 to 1 before any "
        "normalisation"
    )
