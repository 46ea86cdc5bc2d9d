"""The labelled photos of a class as a network sees them, and how photos are embedded: as an evaluation embeds images.

Shape legend: n photos of all classes, K photos of a class, F channels of feature maps, h x w their size, D values of a vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.adapt.learner import Learner
from lgm_dist.adapt.photos import NamedPhotos, Pixels
from lgm_dist.data.bank import ImageBank
from lgm_dist.model import LGMNet
from lgm_dist.model.generators.base_directions import BaseDirections
from lgm_dist.model.generators.none import NoGenerator
from lgm_dist.model.heads.class_means import ClassMeans
from lgm_dist.model.heads.vectors import Vectors
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.embedding import KeptMaps
from lgm_dist.training.worker import Worker

ON_A_CPU = 64
"""Photos that a CPU embeds at once. Embedding 256 photos took 0.44 s so, and 0.93 s all at once: their maps leave the cache,
and the system hands out their memory anew each time (preset strong at 32 x 32, CPU time, one thread of an AMD EPYC)."""


class Embedded(NamedTuple):
    """Photos as the network sees them."""

    support: Tensor
    """(n, F, h, w): maps as labelled photos have them, averaged over random copies too."""
    query: Tensor
    """(n, F, h, w): maps as photos to classify have them."""


@dataclass(frozen=True)
class Examples:
    """The labelled photos of one class."""

    shots: int
    """K"""
    mean: Tensor | None
    """(D,): the class mean, all that the head `class_means` compares; None for networks that need more."""
    maps: Tensor | None
    """(K, F, h, w): support maps; None if a file has only kept the mean."""
    photos: NamedPhotos | None = None
    """The photos; None after loading."""
    queries: Tensor | None = None
    """(K, F, h, w): their maps as photos to classify; None after loading."""

    def joined(self, other: Examples) -> Examples:
        """The photos of both, of the same class."""
        shots = self.shots + other.shots
        mean = None
        if self.mean is not None and other.mean is not None:
            mean = (self.shots * self.mean + other.shots * other.mean) / shots  # (D,)
        photos = None
        if self.photos and other.photos:
            pixels = np.concatenate([self.photos.pixels, other.photos.pixels])  # (K, H, W, C)
            photos = NamedPhotos(self.photos.names + other.photos.names, pixels)
        maps, queries = _joined(self.maps, other.maps), _joined(self.queries, other.queries)
        return Examples(shots, mean, maps, photos, queries)


def compares_means(model: LGMNet) -> bool:
    """Return True if class means, and their numbers of images, are all that the network needs of its support images."""
    return isinstance(model.head, ClassMeans) and isinstance(model.generator, NoGenerator | BaseDirections)


def vectors_of(model: LGMNet) -> Vectors:
    """What makes the vectors whose means the network compares, see `compares_means`."""
    assert isinstance(model.head, ClassMeans)
    return model.generator.vectors if isinstance(model.generator, BaseDirections) else model.head.vectors


@torch.no_grad()
@arithmetic()
def logits_of_means(model: LGMNet, means: Tensor, shots: Sequence[int], maps: Tensor) -> Tensor:
    """Class means (N, D) of shots[c] photos each, and maps of photos to classify (n, F, h, w) -> logits (n, N)."""
    head, generator = model.head, model.generator
    assert isinstance(head, ClassMeans)
    if not isinstance(generator, BaseDirections):
        return head.similarities(means[None], maps[None])[0]  # (n, N)
    weights, centre = generator.class_weights(
        means[None], torch.tensor(shots, device=means.device)
    )  # (1, N, D), (1, D)
    return head.similarities(weights, generator.centred(maps[None], centre)[..., None, None])[0]  # (n, N)


def examples_of(learner: Learner, photos: NamedPhotos, embedded: Embedded) -> Examples:
    """The examples of one class from its photos, embedded already."""
    maps = embedded.support  # (K, F, h, w)
    return Examples(len(maps), mean_of(learner.model, maps), maps, photos, embedded.query)


@torch.no_grad()
@arithmetic()
def mean_of(model: LGMNet, maps: Tensor) -> Tensor | None:
    """Support maps of a class (K, F, h, w) -> its mean (D,), or None if the network needs more than that."""
    if not compares_means(model):
        return None
    mean: Tensor = vectors_of(model)(maps[None])[0].mean(0)  # (D,)
    return mean


def embed(learner: Learner, pixels: Pixels, *, labelled: bool) -> Embedded:
    """Pixels (n, H, W, C) as the network sees them, as an evaluation does with images of a data set.

    The random copies of a photo depend on its content, so that neither its name nor the order of the photos matters. Without
    `labelled`, the support maps are the query maps.
    """
    bank, rows, config = _bank(learner, pixels), np.arange(len(pixels)), learner.config
    worker = Worker(device=str(next(learner.model.parameters()).device))
    copies, flips = config.episodes.eval_copies if labelled else 0, config.episodes.eval_flips
    with torch.no_grad(), arithmetic():
        at_once = ON_A_CPU if worker.device == "cpu" else None
        maps = KeptMaps(learner.model, bank, config, rows, worker, at_once)  # no view is embedded twice
        query = maps(rows, 0, flips, learner.model.config)  # (n, F, h, w)
        return Embedded(maps(rows, copies, flips, learner.model.config) if copies else query, query)


def counters(pixels: Pixels) -> npt.NDArray[np.int64]:
    """A number below 2**62 from the content of each photo: (n,)."""
    digests = [hashlib.sha256(photo.tobytes()).digest() for photo in pixels]
    return np.array([int.from_bytes(digest[:8], "big") >> 2 for digest in digests], np.int64)


def _bank(learner: Learner, pixels: Pixels) -> ImageBank:
    """The photos as a bank in memory."""
    facts = learner.image_facts()
    offsets = np.array([0, len(pixels)])
    bank = ImageBank("photos", "test", pixels, offsets, ("photos",), ("",), facts.mean, facts.std)
    return ImageBank(**{**vars(bank), "counters": counters(pixels)}) if learner.config.episodes.eval_copies else bank


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.cat([one, other])  # (K, F, h, w)
