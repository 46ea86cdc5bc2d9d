"""Labelled images of the base classes, in an order that is a pure function of the seed: what pretraining learns from.

Image i of the stream is a pure function of (seed, i) and the settings: epoch i // n shows each of the n images once.
Any worker can make any part of the stream, a resumed run starts at any image, and slices of a range give the same images as the
whole range.

Shapes: m images of the stream, R rotations (1 or 4), C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.augment import AUGMENTATIONS
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.holdout import held_out_classes
from lgm_dist.data.images import Normalisation, Pixels
from lgm_dist.data.philox import Purpose, RandomWords
from lgm_dist.data.streamed import BaseImages, StreamedSplit


class LabelledImages(NamedTuple):
    """m images of the stream, each in all rotations: rotation r of image i is row i * R + r."""

    images: Tensor
    """(m * R, C, H, W) float32, normalised; in memory channels come last."""
    labels: Tensor
    """(m * R,) int64: class * R + rotation, where rotation r is r * 90 degrees counter-clockwise."""


class ImageSampler:
    """Makes labelled images of the train split on a device: `ImageSampler(base, config)(start, count)`.

    Only their pixels and their order depend on where they are: in a bank, or in shards (`lgm_dist.data.stream`).

    Raises ValueError for an unknown augmentation, and for four rotations of images that are not square.
    """

    def __init__(self, base: BaseImages, config: Config, device: torch.device | str = "cpu") -> None:
        p, self.device = config.pretraining, torch.device(device)
        check_labelled(base, config)
        self.rotations = p.rotations
        self._augmentations = tuple(AUGMENTATIONS.get(name)(base.shape) for name in p.augmentations)
        self._words = RandomWords(
            config.run.seed, "train", {a.purpose: a.words for a in self._augmentations}, self.device
        )
        self._normalise = Normalisation(base, config, self.device)
        self._read = _reader(base, config, self.device)

    def __call__(self, start: int, count: int) -> LabelledImages:
        """Images start to start + count - 1 of the stream."""
        pixels, rows, classes = (part.to(self.device) for part in self._read(start, count))
        words = self._words(torch.arange(start, start + count, device=self.device)) if self._augmentations else {}
        parameters = [a.draw(words[a.purpose]) for a in self._augmentations]  # (m, P) each

        def augment(images: Tensor, place: slice) -> Tensor:
            for augmentation, drawn in zip(self._augmentations, parameters, strict=True):
                images = augmentation.apply(images, drawn[place])
            return images

        images = self._normalise(pixels, rows, augment)  # (m, C, H, W)
        labels = classes[:, None] * self.rotations + torch.arange(self.rotations, device=self.device)  # (m, R)
        return LabelledImages(_rotated(images, self.rotations), labels.flatten())


def check_labelled(base: BaseImages, config: Config) -> None:
    """Check that the images can be rotated, augmented and left out as `config.pretraining` asks. Raises ValueError."""
    p, shape = config.pretraining, base.shape
    classes_learned(config, len(base.classes))
    if p.holdout and isinstance(base, StreamedSplit):
        raise ValueError(f"pretraining.holdout ({p.holdout}) needs the image bank; use --stream never")
    if p.rotations == 4 and shape[0] != shape[1]:
        raise ValueError(
            f"pretraining.rotations (4) needs square images, and these are {shape[1]} x {shape[0]}; use "
            "--pretraining.rotations 1"
        )
    for name in p.augmentations:
        if AUGMENTATIONS.get(name).per_class:
            raise ValueError(f"pretraining.augmentations ({name!r}) is for episodes alone; leave {name!r} out")
        if p.augmentations.count(name) > 1:
            raise ValueError(f"pretraining.augmentations names {name!r} twice; name it once")


def _reader(base: BaseImages, config: Config, device: torch.device) -> Callable[[int, int], Pixels]:
    """Gives the images start to start + count - 1 of the stream."""
    if not isinstance(base, StreamedSplit):
        return _FromBank(base, config, device)
    from lgm_dist.data.stream import ImageStream  # a bank needs neither webdataset nor PIL

    return ImageStream(base, config)


def classes_learned(config: Config, classes: int) -> npt.NDArray[np.int64]:
    """Numbers of the base classes, of `classes`, that pretraining does not leave out, in ascending order. Their place in it is
    their number as a label. Raises ValueError as `held_out_classes`."""
    return np.setdiff1d(np.arange(classes), held_out_classes(config, classes))


class _FromBank:
    """The images of a bank. On the CPU it reads the bank's mapped file; another device keeps all images, as uint8."""

    def __init__(self, bank: ImageBank, config: Config, device: torch.device) -> None:
        learned = classes_learned(config, len(bank.classes))  # (classes,)
        rows = [np.arange(bank.offsets[c], bank.offsets[c + 1]) for c in learned]
        self._rows = torch.from_numpy(np.concatenate(rows)).to(device)  # (n,)
        numbers = torch.arange(len(learned))
        self._classes = numbers.repeat_interleave(torch.from_numpy(bank.counts[learned])).to(device)  # (n,)
        self._order = _Order(config.run.seed, len(self._rows))
        self._pixels = bank.tensor if device.type == "cpu" else bank.tensor.to(device)

    def __call__(self, start: int, count: int) -> Pixels:
        """Images start to start + count - 1 of the stream."""
        chosen = torch.from_numpy(self._order.rows(start, count)).to(self._rows.device)  # (m,)
        return Pixels(self._pixels, self._rows[chosen], self._classes[chosen])


class _Order:
    """The rows of the stream: a permutation of all n rows for each epoch, sorted by the random words of the epoch."""

    def __init__(self, seed: int, n: int) -> None:
        self._n = n
        self._words = RandomWords(seed, "train", {Purpose.ORDER: n})
        self._of_epoch = lru_cache(maxsize=2)(self._permutation)

    def rows(self, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Rows of images start to start + count - 1: (count,)."""
        epochs = range(start // self._n, (start + count - 1) // self._n + 1)
        both = np.concatenate([self._of_epoch(epoch) for epoch in epochs])
        first = start - epochs[0] * self._n
        return both[first : first + count]

    def _permutation(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        words = self._words(torch.tensor([epoch]))[Purpose.ORDER][0]  # (n,)
        return np.argsort(words.numpy(), kind="stable")


def _rotated(images: Tensor, rotations: int) -> Tensor:
    """images (m, C, H, W) -> (m * R, C, H, W), channels last in memory."""
    if rotations == 1:
        return images
    pixels = images.permute(0, 2, 3, 1)  # (m, H, W, C)
    out = pixels.new_empty(len(pixels), rotations, *pixels.shape[1:])  # (m, R, H, W, C)
    for r in range(rotations):
        out[:, r] = pixels.rot90(r, (1, 2))
    return out.flatten(0, 1).permute(0, 3, 1, 2)  # (m * R, C, H, W)
