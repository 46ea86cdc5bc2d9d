"""`Classifier`: what a learner makes of labelled photos of new classes.

Shape legend: n photos to classify, N classes, S support photos of all classes, F, h, w as for feature maps, E length of a code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lgm_dist.adapt import classifier_file
from lgm_dist.adapt.examples import Embedded, Examples, compares_means, embed, examples_of, logits_of_means
from lgm_dist.adapt.learner import Learner
from lgm_dist.adapt.learner_file import RANK
from lgm_dist.adapt.photos import (
    MOST_CLASSES,
    NamedPhotos,
    Photo,
    Pixels,
    Problem,
    check_list,
    check_name,
    problem_of,
    read_photos,
)
from lgm_dist.adapt.report import Report, report_of
from lgm_dist.checks import did_you_mean
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.calibration import RATE, Calibration, score_of

PHOTOS_AT_ONCE = 256
"""Photos that are read and classified at once. It bounds the memory."""
Key = tuple[int, str]


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo."""

    label: str
    """The most probable class."""
    probability: float
    """Its probability."""
    probabilities: Mapping[str, float]
    """The probability of each class, by its name."""
    unknown: bool | None
    """Whether the photo shows none of the classes; None if the learner has no calibration."""


class Classifier:
    """A classifier of a few classes, made by `Learner.adapt` or read by `Classifier.load`."""

    def __init__(self, learner: Learner, examples: Mapping[str, Examples], report: Report | None = None) -> None:
        self.learner = learner
        self._examples = dict(examples)
        self._report = report
        self._support = _support_of(learner, self._examples)

    @property
    def classes(self) -> dict[str, int]:
        """The names of the classes, in their order, with the number of labelled photos of each."""
        return {name: example.shots for name, example in self._examples.items()}

    def predict(self, photos: Iterable[Photo], unknown_rate: float = RATE) -> list[Prediction]:
        """Classify photos, each by itself, in batches.

        Args:
            photos: Paths, PIL images, arrays (H, W, C) or tensors.
            unknown_rate: The share of photos of known classes that may be called unknown, above 0 and at most 0.5.

        Raises ValueError for a photo that cannot be read, and for a wrong `unknown_rate`.
        """
        found: list[Prediction] = []
        for first, batch in _batches(photos):
            found += self.answer(read_photos(batch, self.learner.shape, first=first).pixels, unknown_rate)
        return found

    def answer(self, pixels: Pixels, unknown_rate: float = RATE) -> list[Prediction]:
        """As `predict`, for pixels (n, H, W, C) of the learner's size, all at once."""
        threshold = self._threshold(unknown_rate)
        return _predictions(list(self._examples), self.logits(pixels), self._temperature, threshold)

    def logits(self, pixels: Pixels) -> Tensor:
        """Pixels (n, H, W, C) of the learner's size -> logits (n, N): before calibration and softmax."""
        maps = embed(self.learner, pixels, labelled=False).query  # (n, F, h, w)
        return self._support.logits(maps)

    def check_rate(self, unknown_rate: float) -> None:
        """Raise ValueError for a wrong `unknown_rate` of `predict`."""
        self._threshold(unknown_rate)

    def add(self, name: str, photos: Iterable[Photo]) -> None:
        """Add a class, or more photos of a class that there is.

        Raises ValueError as `Learner.adapt`; the classifier is then as before.
        """
        check_name(name)
        more = _examples_of_all(self.learner, _read(self.learner, {(0, name): photos}))[0, name]
        old = self._examples.get(name)
        self._change({**self._examples, name: old.joined(more) if old else more})

    def remove(self, name: str) -> None:
        """Remove a class. Raises ValueError for a class that there is not, and for the last but one."""
        if name not in self._examples:
            raise ValueError(f"class {name!r} is not in the classifier; {did_you_mean(name, self._examples)}")
        self._change({other: example for other, example in self._examples.items() if other != name})

    def report(self) -> Report:
        """What the labelled photos tell of the accuracy and of problems in them.

        A loaded classifier has the report of when it was saved. Raises ValueError if its classes have changed since.
        """
        if self._report is None:
            self._report = report_of(self.learner.model, self._examples)
        return self._report

    def save(self, path: str | Path, rank: int = RANK) -> Path:
        """Write the classifier to one file, which needs neither the photos nor the learner, and return its path.

        What is kept of the photos: their class means, or their feature maps in half precision if the network needs them; and
        the report. See `Learner.save` for `rank`. Raises ValueError as it does, OSError if the file cannot be written.
        """
        report = self.report() if self._report or _complete(self._examples) else None
        return classifier_file.write(Path(path), self.learner, self._examples, report, rank)

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read a classifier that `save` has written. Nothing in the file is executed.

        Raises ValueError for another file, or a damaged one.
        """
        return cls(*classifier_file.read(Path(path)))

    @property
    def _temperature(self) -> float:
        calibration = self.learner.calibration
        return calibration.temperature(len(self._examples), self._typical_shots) if calibration else 1.0

    @property
    def _typical_shots(self) -> float:
        """The harmonic mean: the noise of a class mean falls with 1 / shots."""
        return len(self._examples) / sum(1 / example.shots for example in self._examples.values())

    def _threshold(self, rate: float) -> tuple[Calibration, float] | None:
        """The calibration and its threshold, if there is one."""
        calibration = self.learner.calibration or Calibration("", ())
        found = calibration.threshold(len(self._examples), self._typical_shots, rate)
        return None if found is None else (calibration, found)

    def _change(self, examples: dict[str, Examples]) -> None:
        if not 2 <= len(examples) <= MOST_CLASSES:
            raise ValueError(f"a classifier of {len(examples)} classes is not possible; it has 2 to {MOST_CLASSES:,}")
        self._support = _support_of(self.learner, examples)  # may refuse
        self._examples, self._report = examples, None

    def __repr__(self) -> str:
        names = ", ".join(list(self.classes)[:5]) + (", …" if len(self.classes) > 5 else "")
        return f"Classifier({len(self.classes)} classes: {names}; {sum(self.classes.values())} photos; {self.learner.name})"


def adapt_many(learner: Learner, problems: Sequence[Problem]) -> list[Classifier]:
    """See `Learner.adapt_many`: the photos of all problems are embedded together."""
    given = [problem_of(problem) for problem in problems]
    keyed = {(number, name): photos for number, classes in enumerate(given) for name, photos in classes.items()}
    examples = _examples_of_all(learner, _read(learner, keyed))
    return [
        Classifier(learner, {name: examples[number, name] for name in classes}) for number, classes in enumerate(given)
    ]


def classifier_of(learner: Learner, classes: Mapping[str, NamedPhotos]) -> Classifier:
    """The classifier of photos that are read already."""
    examples = _examples_of_all(learner, {(0, name): photos for name, photos in classes.items()})
    return Classifier(learner, {name: example for (_, name), example in examples.items()})


def _read(learner: Learner, classes: Mapping[Key, Iterable[Photo]]) -> dict[Key, NamedPhotos]:
    """Read the photos of classes. Raises ValueError for a class without photos."""
    photos = {key: read_photos(given, learner.shape, f"class {key[1]!r}") for key, given in classes.items()}
    if empty := next((key for key, found in photos.items() if not found.names), None):
        raise ValueError(f"class {empty[1]!r} has no photos; give it one or leave it out")
    return photos


def _examples_of_all(learner: Learner, photos: Mapping[Key, NamedPhotos]) -> dict[Key, Examples]:
    """Embed the photos of many classes, each with the number of its problem, together."""
    pixels = np.concatenate([found.pixels for found in photos.values()])  # (n, H, W, C)
    embedded = embed(learner, pixels, labelled=True)
    sizes = [len(found.names) for found in photos.values()]
    parts = zip(photos.items(), embedded.support.split(sizes), embedded.query.split(sizes), strict=True)
    return {key: examples_of(learner, found, Embedded(*maps)) for (key, found), *maps in parts}


@dataclass(frozen=True)
class _Means:
    """Class means, which a query is compared with."""

    learner: Learner
    means: Tensor
    """(N, D)"""
    shots: tuple[int, ...]

    def logits(self, maps: Tensor) -> Tensor:
        """maps (n, F, h, w) -> (n, N)."""
        return logits_of_means(self.learner.model, self.means, self.shots, maps)


@dataclass(frozen=True)
class _Maps:
    """Support maps, from which the network makes its answer anew for each batch."""

    learner: Learner
    maps: Tensor
    """(1, S, F, h, w)"""
    codes: Tensor
    """(1, S, E)"""
    shots: tuple[int, ...]

    @torch.no_grad()
    @arithmetic()
    def logits(self, maps: Tensor) -> Tensor:
        """maps (n, F, h, w) -> (n, N)."""
        features = torch.cat([self.maps, maps[None]], 1)  # (1, S + n, F, h, w)
        return self.learner.model.logits(features, self.codes, self.shots)[0]  # (n, N)


def _support_of(learner: Learner, examples: Mapping[str, Examples]) -> _Means | _Maps:
    """What queries are compared with. Raises ValueError for unequal shots if the network needs equal ones."""
    model, shots = learner.model, tuple(example.shots for example in examples.values())
    if compares_means(model):
        return _Means(learner, torch.stack([e.mean for e in examples.values() if e.mean is not None]), shots)
    if len(set(shots)) > 1 and (part := model.needs_equal_shots()):
        raise ValueError(
            f"the classes have {min(shots)} to {max(shots)} photos, and the learner's {part} needs the same number of each "
            "class; give each class the same number of photos"
        )
    maps = torch.cat([e.maps for e in examples.values() if e.maps is not None])  # (S, F, h, w)
    with torch.no_grad():
        codes = model.generator.encode(maps, 1)  # (S, E)
    return _Maps(learner, maps[None], codes[None], shots)


def _complete(examples: Mapping[str, Examples]) -> bool:
    """Return True if the photos are at hand, so that a report can be made."""
    return all(example.photos is not None for example in examples.values())


def _batches(photos: Iterable[Photo]) -> Iterator[tuple[int, list[Photo]]]:
    """Up to PHOTOS_AT_ONCE photos at a time, with the number of the first, from 1 on."""
    check_list(photos, "photos")
    rest, first = iter(photos), 1
    while batch := list(islice(rest, PHOTOS_AT_ONCE)):
        yield first, batch
        first += len(batch)


def _predictions(
    names: Sequence[str], logits: Tensor, temperature: float, threshold: tuple[Calibration, float] | None
) -> list[Prediction]:
    """Logits (n, N) -> n predictions."""
    probabilities = (logits / temperature).softmax(-1)  # (n, N)
    unknown: list[bool | None] = [None] * len(logits)
    if threshold:
        scores = score_of(threshold[0].score, logits, temperature)  # (n,)
        unknown = (scores < threshold[1]).tolist()
    best = probabilities.argmax(-1).tolist()
    return [
        Prediction(names[b], row[b], dict(zip(names, row, strict=True)), u)
        for b, row, u in zip(best, probabilities.tolist(), unknown, strict=True)
    ]
