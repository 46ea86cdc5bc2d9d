"""Augmentations of training images, one file each. `register_augmentation` adds one from outside the package.

@register_augmentation("invert")
class Invert(Augmentation):
    purpose = 1000

    def draw(self, words):
        return bounded(words, 2)  # (..., 1): 1 in half of the images

    def apply(self, images, parameters):
        return torch.where(parameters[..., None, None] == 1, 255 - images, images)

Config.of(augmentations=("flip_shift", "invert"))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lgm_dist.config import Config, Split
from lgm_dist.data.philox import FIRST_FREE_PURPOSE, LAST_PURPOSE
from lgm_dist.registry import Registry


class Augmentation(ABC):
    """A random change of images. The same object serves CPU and GPU: `draw` and `apply` work on the device of their arguments.

    `apply` gives an image the same bits whatever else is in the batch, so that an episode does not depend on how the
    meta-batch is sliced over workers. torch.mean may not (use `exact_mean`). Both methods avoid what makes a GPU wait, such as
    `nonzero` or `tolist`.

    Args:
        shape: H, W, C of the images.
    """

    purpose: ClassVar[int]
    """Number of its stream of random words. Numbers from 1000 to 65535 are for augmentations from outside the package."""
    words: ClassVar[int] = 1
    """Random words of an image."""
    per_class: ClassVar[bool] = False
    """All images of a class of an episode share their words. This leaks the label to the query (protocol paper)."""
    variants: ClassVar[int] = 0
    """If the only parameter is a whole number below `variants`, how many there are. A GPU then keeps all variants of each
    image and never calls `apply` in a step. 0: there are other parameters."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    @abstractmethod
    def draw(self, words: Tensor) -> Tensor:
        """Random words (..., self.words), int64 in 0 to 2**32 - 1 -> parameters (..., P) of any type."""

    @abstractmethod
    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Images (n, H, W, C), uint8 or float32 on the 0 to 255 scale, and parameters (n, P) -> changed images (n, H, W, C)."""


AugmentationType = TypeVar("AugmentationType", bound=type[Augmentation])

AUGMENTATIONS: Registry[type[Augmentation]] = Registry("augmentation", "augmentations", "lgm_dist.data.augment")
_AT_ONCE = 1024
"""Images whose variants are made at a time."""
_OWNERS: dict[int, str] = {}
"""The name of the augmentation that has a purpose."""


def register_augmentation(name: str) -> Callable[[AugmentationType], AugmentationType]:
    """A decorator that registers a subclass of Augmentation as `name`.

    Raises ValueError if its name or its purpose is another one's.
    """

    def add(cls: AugmentationType) -> AugmentationType:
        inside = cls.__module__.startswith("lgm_dist.")  # those numbers are in Purpose
        if not inside and not FIRST_FREE_PURPOSE <= cls.purpose <= LAST_PURPOSE:
            raise ValueError(
                f"purpose ({cls.purpose}) of augmentation {name!r} must lie between {FIRST_FREE_PURPOSE} and {LAST_PURPOSE}"
            )
        if _OWNERS.get(cls.purpose, name) != name:
            raise ValueError(
                f"purpose ({cls.purpose}) of augmentation {name!r} is that of {_OWNERS[cls.purpose]!r}; choose another number"
            )
        AUGMENTATIONS.register(name)(cls)
        _OWNERS[cls.purpose] = name
        return cls

    return add


def augmentations_of(config: Config, split: Split) -> tuple[type[Augmentation], ...]:
    """What happens to the images of an episode of `split`, in this order.

    Raises ValueError for a name that is not registered, that stands twice or that protocol standard forbids.
    """
    episodes = config.episodes
    if episodes.protocol == "paper":
        return (AUGMENTATIONS.get("rotation"),)
    if not episodes.augment or split != "train":
        return ()
    for name in episodes.augmentations:
        if AUGMENTATIONS.get(name).per_class:
            raise ValueError(
                f"augmentations ({name!r}) changes all images of a class alike and so leaks the label, which protocol standard "
                f"forbids; leave {name!r} out"
            )
        if episodes.augmentations.count(name) > 1:
            raise ValueError(f"augmentations names {name!r} twice; name it once")
    return tuple(AUGMENTATIONS.get(name) for name in episodes.augmentations)


def exact_mean(pixels: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Mean over dimensions of pixels on the 0 to 255 scale, each rounded to 1/4096: float32.

    The bits depend on nothing but the pixels. The order in which torch.mean adds depends on the batch (threads share the sum of
    one large image, but not those of many) and on the device. The sums here are of whole numbers and stay below 2**53, so
    float64 adds without an error in any order.
    """
    total = (pixels * 4096.0).round_().sum(dim, dtype=torch.float64)
    return (total / (4096.0 * (pixels.numel() // total.numel()))).float()


def all_variants(augmentation: Augmentation, images: Tensor) -> Tensor:
    """All images (n, H, W, C) in variant 0, then in variant 1, …: (variants * n, H, W, C) float32."""
    changed = torch.empty(augmentation.variants, *images.shape)
    for variant in range(augmentation.variants):
        for piece, out in zip(images.split(_AT_ONCE), changed[variant].split(_AT_ONCE), strict=True):
            out.copy_(augmentation.apply(piece, torch.full((len(piece), 1), variant)))
    return changed.flatten(0, 1)
