"""What the labelled photos of a classifier tell: an estimate of its accuracy, and problems in them.

Shape legend: n labelled photos of all classes, N classes, D values of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.adapt.examples import Examples, compares_means, logits_of_means, vectors_of
from lgm_dist.adapt.photos import Pixels
from lgm_dist.console import table
from lgm_dist.model import LGMNet
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.reliability import wilson

ALIKE = 0.98
"""Correlation of the pixels from which on two photos count as nearly the same."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Share:
    """How many left-out photos were classified correctly."""

    hits: int
    count: int
    """Photos that were left out: those of classes with two or more."""

    @property
    def accuracy(self) -> float | None:
        """In 0 to 1; None without a photo that can be left out."""
        return self.hits / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson; (0, 1) without a photo that can be left out."""
        return wilson(self.hits, self.count)

    def __str__(self) -> str:
        if not self.count:
            return "not known"
        low, high = self.interval
        return f"{100 * self.hits / self.count:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


@dataclass(frozen=True)
class Report:
    """Accuracy by leaving photos out, and what is wrong with the photos."""

    classes: Mapping[str, Share]
    """By class: the photos that were left out, and how many of them were classified correctly."""
    shots: Mapping[str, int]
    """Labelled photos of each class."""
    near_duplicates: tuple[tuple[str, str], ...]
    """Pairs of photos of different classes that show nearly the same pixels."""

    @property
    def total(self) -> Share:
        """The sum over all classes."""
        return Share(sum(s.hits for s in self.classes.values()), sum(s.count for s in self.classes.values()))

    @property
    def single(self) -> tuple[str, ...]:
        """Classes with one photo, about whose accuracy nothing is known."""
        return tuple(name for name, shots in self.shots.items() if shots == 1)

    @property
    def weakest(self) -> str | None:
        """The class that gains most from more photos: that of the lowest accuracy with left-out photos, None without any."""
        known = {name: share.hits / share.count for name, share in self.classes.items() if share.count}
        return min(known, key=lambda name: known[name]) if known else None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, which `from_dict` reads, also after JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Read what `to_dict` wrote."""
        classes = {name: Share(int(share["hits"]), int(share["count"])) for name, share in values["classes"].items()}
        shots = {name: int(count) for name, count in values["shots"].items()}
        return cls(classes, shots, tuple((str(a), str(b)) for a, b in values["near_duplicates"]))

    def __str__(self) -> str:
        rows = [(name, str(shots), str(self.classes[name])) for name, shots in self.shots.items()]
        total = ("all", str(sum(self.shots.values())), str(self.total))
        text = table(("class", "photos", "accuracy with a photo left out"), [*rows, total])
        if self.single:
            text += f"One photo only, so that the accuracy is not known: {', '.join(self.single)}.\n"
        for pair in self.near_duplicates:
            text += f"Nearly the same photo in two classes: {' and '.join(pair)}.\n"
        return text


def report_of(model: LGMNet, examples: Mapping[str, Examples]) -> Report:
    """The report of labelled photos.

    Each photo of a class with two or more is left out and classified by the others: alone under the head `class_means`, else
    with one photo of each other class that has two or more, so that the classes stay of equal size.

    Raises ValueError if the photos of a class are not at hand.
    """
    for name, example in examples.items():
        if example.photos is None:
            raise ValueError(
                f"report: a classifier's file does not keep the photos (class {name!r}), which a report after a change needs; "
                "adapt again with all photos"
            )
    hits = _hits_of_means(model, examples) if compares_means(model) else _hits_of_rounds(model, examples)
    shares = {name: Share(int(h.sum()), len(h)) for name, h in zip(examples, hits, strict=True)}
    return Report(shares, {name: e.shots for name, e in examples.items()}, _near_duplicates(examples))


@torch.no_grad()
@arithmetic()
def _hits_of_means(model: LGMNet, examples: Mapping[str, Examples]) -> list[npt.NDArray[np.bool_]]:
    """Whether each photo is right if it is left out of its class mean; empty for a class of one photo."""
    vectors, shots = vectors_of(model), [example.shots for example in examples.values()]
    means = torch.stack([e.mean for e in examples.values() if e.mean is not None])  # (N, D)
    found = []
    for label, example in enumerate(examples.values()):
        hits, whole = np.zeros(example.shots if example.shots > 1 else 0, np.bool_), means[label].clone()  # (D,)
        for k in range(len(hits)):
            assert example.maps is not None
            assert example.queries is not None
            own = vectors(example.maps[k : k + 1][None])[0, 0]  # (D,)
            means[label] = (example.shots * whole - own) / (example.shots - 1)
            left = [count - (c == label) for c, count in enumerate(shots)]
            hits[k] = int(logits_of_means(model, means, left, example.queries[k : k + 1]).argmax()) == label
        means[label] = whole
        found.append(hits)
    return found


@torch.no_grad()
@arithmetic()
def _hits_of_rounds(model: LGMNet, examples: Mapping[str, Examples]) -> list[npt.NDArray[np.bool_]]:
    """The same for any network: round j leaves out photo j of each class that has it and another one."""
    hits: list[list[bool]] = [[] for _ in examples]
    for j in range(max(example.shots for example in examples.values())):
        left = [i for i, example in enumerate(examples.values()) if example.shots > max(j, 1)]
        if not left:
            break
        kept, queries = [], []
        for i, example in enumerate(examples.values()):
            assert example.maps is not None
            assert example.queries is not None
            rest = [k for k in range(example.shots) if k != j or i not in left]
            kept.append(example.maps[rest])
            queries.append(example.queries[j : j + 1] if i in left else example.queries[:0])
        guesses = _guesses(model, kept, torch.cat(queries))
        for i, guess in zip(left, guesses, strict=True):
            hits[i].append(guess == i)
    return [np.array(h, np.bool_) for h in hits]


def _guesses(model: LGMNet, kept: list[Tensor], queries: Tensor) -> list[int]:
    """Support maps of each class (K, F, h, w) and queries (n, F, h, w) -> the class of each query."""
    shots, maps = [len(k) for k in kept], torch.cat(kept)  # (S, F, h, w)
    codes = model.generator.encode(maps, 1)[None]  # (1, S, E)
    found: list[int] = model.logits(torch.cat([maps, queries])[None], codes, shots)[0].argmax(-1).tolist()
    return found


def _near_duplicates(examples: Mapping[str, Examples]) -> tuple[tuple[str, str], ...]:
    """Pairs of photos of different classes whose pixels, or those of a mirror image, are equal or correlate by ALIKE."""
    photos = [example.photos for example in examples.values() if example.photos]
    names = [name for found in photos for name in found.names]
    labels = np.repeat(np.arange(len(photos)), [len(found.names) for found in photos])  # (n,)
    pixels = np.concatenate([found.pixels for found in photos])  # (n, H, W, C)
    ours, mirrored = _standard(pixels), _standard(pixels[:, :, ::-1])  # (n, H * W * C) each
    pairs = []
    for first in range(0, len(ours), _ROWS_AT_ONCE):
        rows = ours[first : first + _ROWS_AT_ONCE]
        alike = np.maximum(rows @ ours.T, rows @ mirrored.T) >= ALIKE  # (rows, n)
        alike &= labels[first : first + len(rows), None] < labels
        pairs += [(names[first + i], names[j]) for i, j in np.argwhere(alike)]
    return tuple(pairs)


def _standard(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Pixels (n, H, W, C) -> values of mean 0 and length 1 (n, H * W * C), whose products are correlations.

    Photos of a single value have no correlation; they are told apart by that value.
    """
    x = pixels.reshape(len(pixels), -1).astype(np.float32)  # (n, H * W * C)
    x -= x.mean(1, keepdims=True)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)  # (n, 1)
    found: npt.NDArray[np.float32] = x / np.maximum(lengths, 1e-6)
    return found
