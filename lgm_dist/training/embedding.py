"""Feature maps of the images of a bank: each image is embedded once, and its maps are averaged over views of it.

Shape legend: n images, F channels of feature maps, h x w their size, E length of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import Config, ModelConfig
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.views import IMAGE, MIRRORED, load_view
from lgm_dist.model import LGMNet
from lgm_dist.model.lgmnet import rotated
from lgm_dist.training.worker import Slice, Worker

IMAGES_AT_ONCE = 1000
"""Images that an evaluation embeds at once. It bounds the memory."""

Index = npt.NDArray[np.int64]
Views = tuple[int, ...]
Maps = Callable[[Index, int, bool, ModelConfig], Tensor]
"""Rows of a bank (n,), number of copies, whether to mirror, settings of rotations and blocks -> the maps (n, F, h, w) that the
head of such a network gets, averaged over the image, its mirror image and its copies."""


@torch.no_grad()
def embed_images(
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    rows: Index,
    worker: Worker,
    copies: int = 0,
    maps: Maps | None = None,
) -> tuple[Tensor, Tensor]:
    """Feature maps (n, F, h, w) and codes (n, E) of the bank's rows (n,). Each worker embeds its share of them.

    `model` is in evaluation mode. Maps are averaged over the image, its mirror image if config.episodes.eval_flips, and
    `copies` random copies of it; codes are those of the averaged maps. `maps` gives the maps if they are known.
    """
    flips = config.episodes.eval_flips
    if maps is None and not (copies or flips):
        f, c = model.embed(_load(bank, config, rows[:1], IMAGE, worker))  # gives the shapes
        features, codes = f.new_zeros(len(rows), *f.shape[1:]), c.new_zeros(len(rows), c.shape[1])
        for i, j in pieces(worker.slice_of(0, len(rows)), 1):
            features[i:j], codes[i:j] = model.embed(_load(bank, config, rows[i:j], IMAGE, worker))
        return worker.sum(features), worker.sum(codes)
    found = maps or KeptMaps(model, bank, config, rows, worker)
    features = found(rows, copies, flips, model.config)  # (n, F, h, w)
    return features, torch.cat([model.generator.encode(piece, 1) for piece in features.split(IMAGES_AT_ONCE)])


class KeptMaps:
    """Maps of some rows of a bank under one backbone; no view of an image is embedded twice.

    Args:
        model: A network in evaluation mode. Its generator and head are not used.
        bank: The images.
        config: Gives the normalisation and the seed of the copies.
        rows: All rows that will be asked for.
        worker: This process among those that ask together.
        at_once: Images that are embedded at once (default: IMAGES_AT_ONCE).
    """

    def __init__(
        self, model: LGMNet, bank: ImageBank, config: Config, rows: Index, worker: Worker, at_once: int | None = None
    ) -> None:
        self._at_once = at_once
        self._model, self._bank, self._config, self._worker = model.without_generator(), bank, config, worker
        self._rows = np.unique(rows)  # (m,)
        self._sums: dict[tuple[Views, int, int], Tensor] = {}

    def __call__(self, rows: Index, copies: int, flips: bool, network: ModelConfig) -> Tensor:
        """See `Maps`."""
        groups: list[Views] = [(IMAGE,), (MIRRORED,) * flips, tuple(range(1, copies + 1))]
        where = torch.from_numpy(np.searchsorted(self._rows, rows)).to(self._worker.device)  # (n,)

        def of_rotation(turns: int) -> Tensor:
            sums = [self._sum(views, turns, network.blocks) for views in groups if views]  # each (m, F, h, w)
            return sum(sums[1:], sums[0])[where] / sum(map(len, groups))  # (n, F, h, w)

        return torch.cat([of_rotation(turns) for turns in range(network.rotations)], 1)  # (n, R * F, h, w)

    @torch.no_grad()
    def _sum(self, views: Views, turns: int, blocks: int) -> Tensor:
        """The sum over views, rotated, of all rows (m, F, h, w)."""
        key = (views, turns, blocks)
        if key not in self._sums:
            self._sums[key] = self._worker.sum(self._own_sum(*key))
        return self._sums[key]

    def _own_sum(self, views: Views, turns: int, blocks: int) -> Tensor:
        """The same for this worker's share of the rows; zeros for the others."""
        network, total = _upright(self._model, blocks), None
        for i, j in pieces(self._worker.slice_of(0, len(self._rows)), 1, self._at_once):
            self._worker.heartbeat()
            for view in views:
                maps = self._embed(network, slice(i, j), view, turns)  # (j - i, F, h, w)
                total = self._zeros(maps) if total is None else total
                total[i:j] += maps
        return self._zeros(self._embed(network, slice(0, 1), views[0], turns)) if total is None else total

    def _zeros(self, maps: Tensor) -> Tensor:
        return maps.new_zeros(len(self._rows), *maps.shape[1:])  # (m, F, h, w)

    def _embed(self, network: LGMNet, place: slice, view: int, turns: int) -> Tensor:
        images = _load(self._bank, self._config, self._rows[place], view, self._worker)
        return network.embed(rotated(images, turns))[0]


def _upright(model: LGMNet, blocks: int) -> LGMNet:
    """The network without rotations and statistics, with the maps of so many blocks."""
    return model.with_head(
        replace(model.config, rotations=1, blocks=blocks, head="cosine", centre=False, shrinkage=1.0)
    )


def pieces(span: Slice, images: int, at_once: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut a range (start, count) of items of `images` images each into parts [first, last) of about `at_once` images, or
    IMAGES_AT_ONCE."""
    start, count = span[:2]
    size, last, first = max((at_once or IMAGES_AT_ONCE) // images, 2), start + count, start
    while first < last:
        end = first + size if last - first > size + 1 else last  # no part of one item, unless there is no more
        yield first, end
        first = end


def _load(bank: ImageBank, config: Config, rows: Index, view: int, worker: Worker) -> Tensor:
    return load_view(bank, config, torch.from_numpy(rows), view).to(worker.device)
