"""Views of the images of a bank: the image, its mirror image, random copies of it.

A copy is a pure function of (eval_seed, split, row of the image, number of the copy). A bank may have another number in the
place of the row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.augment.flip_shift import FlipShift
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.images import Normalisation
from lgm_dist.data.philox import Purpose, RandomWords

IMAGE, MIRRORED = 0, -1
"""Numbers of the image itself and of its mirror image; random copies have the numbers from 1 on."""


def load_view(bank: ImageBank, config: Config, rows: Tensor, view: int) -> Tensor:
    """View number `view` of the images of the given rows (n,), normalised: (n, C, H, W) float32, channels last in memory."""
    return Normalisation(bank, config)(bank.tensor, rows, _change(bank, config, rows, view))


def _change(bank: ImageBank, config: Config, rows: Tensor, view: int) -> Callable[[Tensor, slice], Tensor] | None:
    """What makes the view of the images (k, H, W, C) at a place among the rows."""
    if view == IMAGE:
        return None
    if view == MIRRORED:
        return lambda images, _: images.flip(2)
    augmentation = FlipShift(bank.shape)
    words = RandomWords(config.episodes.eval_seed, bank.split, {Purpose.COPIES: view * augmentation.words})
    numbers = rows if bank.counters is None else torch.from_numpy(bank.counters)[rows]  # (n,)
    parameters = augmentation.draw(words(numbers)[Purpose.COPIES][:, -augmentation.words :])  # (n, P)
    return lambda images, place: augmentation.apply(images, parameters[place])
