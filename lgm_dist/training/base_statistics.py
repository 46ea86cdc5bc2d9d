"""Statistics of the base classes, which some heads and generators need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.model import LGMNet
from lgm_dist.model.parts import Fitted
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.embedding import Index, KeptMaps, Maps
from lgm_dist.training.worker import Worker

IMAGES_PER_CLASS = 200


@torch.no_grad()
@arithmetic()
def fit_head(
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    worker: Worker | None = None,
    images_per_class: int = IMAGES_PER_CLASS,
    maps: Maps | None = None,
) -> None:
    """Give head and generator the statistics of the base classes that they need; nothing happens if they need none.

    They are taken over the first images of each class of `bank`, the train split, and mirror images if
    config.episodes.eval_flips. All workers call this together and get the same. The mode of the model stays as it was.

    Args:
        model: The network, on the worker's device. Its statistics are buffers of head and generator.
        bank: The images of the base classes.
        config: Gives the normalisation of images and `eval_flips`.
        worker: This process among those that fit together; None for one process.
        images_per_class: Images of each class, if it has as many.
        maps: The backbone's maps of the bank's images, if they are known already.

    Raises ValueError if a generator changes the size of the maps, because statistics are those of the backbone's maps.
    """
    if not (modules := _modules(model)):
        return
    worker = worker or Worker()
    rows, labels = base_images(bank, images_per_class)
    was_training = model.training
    model.eval()
    maps = maps or KeptMaps(model, bank, config, rows, worker)
    found = maps(rows, 0, config.episodes.eval_flips, model.config)  # (n, F, h, w)
    if not isinstance(model.generator, Fitted):
        _check(model, found)
    for module in modules:
        module.fit(found, torch.from_numpy(labels).to(found.device))
    model.train(was_training)


def needs_statistics(model: LGMNet) -> bool:
    """Return True if `fit_head` has something to do."""
    return bool(_modules(model))


def _modules(model: LGMNet) -> list[Fitted]:
    """The parts of the network that take statistics: the generator, and parts of the head."""
    assert isinstance(model.head, torch.nn.Module)
    parts = [model.generator, *model.head.modules()]
    return [module for module in parts if isinstance(module, Fitted) and module.needs_statistics]


def base_images(bank: ImageBank, images_per_class: int = IMAGES_PER_CLASS) -> tuple[Index, Index]:
    """Rows (n,) of the first images of each class, and their classes (n,)."""
    counts = np.minimum(bank.counts, images_per_class)  # (classes,)
    rows = [np.arange(first, first + count) for first, count in zip(bank.offsets[:-1], counts, strict=True)]
    return np.concatenate(rows), np.repeat(np.arange(len(counts)), counts)


def _check(model: LGMNet, maps: Tensor) -> None:
    codes = model.generator.encode(maps[:1], 1)[None]  # (1, 1, E)
    transformed = model.generator.transform(maps[None, :1], model.generator.generate(codes, 1, None))
    if transformed.shape[2:] != maps.shape[1:]:
        raise ValueError(
            f"model.generator ({model.config.generator!r}) changes the size of the maps from {tuple(maps.shape[1:])} to "
            f"{tuple(transformed.shape[2:])}, so statistics of the base classes (model.centre, model.shrinkage) do not fit; "
            "use model.generator none"
        )
