"""Many photo files: a bad one is named and counted, and the others go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lgm_dist.adapt.classifier import PHOTOS_AT_ONCE, Classifier, Prediction
from lgm_dist.adapt.photos import NamedPhotos, Pixels, read_photo
from lgm_dist.console import STANDARD_ERROR, notify

Shape = tuple[int, int, int]
_MANY = 50
"""Files from which on there is a progress bar, on a terminal."""


@dataclass(frozen=True)
class FileAnswer:
    """What came out for one file."""

    path: Path
    prediction: Prediction | None
    """None for a file that could not be read."""
    problem: str = ""
    """Why it could not."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        if self.prediction is None:
            return {"photo": str(self.path), "problem": self.problem}
        p = self.prediction
        values = {"label": p.label, "probability": p.probability, "unknown": p.unknown}
        return {"photo": str(self.path), **values, "probabilities": dict(p.probabilities)}


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and all files in the folders among them and below, sorted; names that begin with a dot are left
    out. Raises ValueError if there are none."""
    found = [file for path in paths for file in (_below(path) if path.is_dir() else [path])]
    if not found:
        raise ValueError(
            f"there are no photos in {', '.join(map(str, paths)) or 'the arguments'}; name files or folders"
        )
    return found


def read_classes(classes: dict[str, list[Path]], shape: Shape) -> tuple[dict[str, NamedPhotos], int]:
    """The photos of each class that can be read, and the number of those that cannot, each named on standard error.

    Raises ValueError for a class of which no photo can be read.
    """
    files = [(name, path) for name, paths in classes.items() for path in paths]
    read: dict[str, list[tuple[str, Pixels]]] = {name: [] for name in classes}
    for (name, _), (path, pixels, _) in zip(files, _read([path for _, path in files], shape), strict=True):
        if pixels is not None:
            read[name].append((str(path), pixels))
    if empty := next((name for name, photos in read.items() if not photos), None):
        raise ValueError(f"class {empty!r} has no photo that can be read; add one or remove its folder")
    bad = len(files) - sum(map(len, read.values()))
    return {n: NamedPhotos(tuple(a for a, _ in p), np.stack([b for _, b in p])) for n, p in read.items()}, bad


def predict_files(classifier: Classifier, paths: Sequence[Path], unknown_rate: float) -> Iterator[FileAnswer]:
    """The answer for each file, in their order; a bad one is named on standard error. A few hundred are in memory at once."""
    waiting: list[tuple[Path, Pixels | None, str]] = []
    for item in _read(paths, classifier.learner.shape):
        waiting.append(item)
        if len(waiting) == PHOTOS_AT_ONCE:
            yield from _answers(classifier, waiting, unknown_rate)
            waiting = []
    yield from _answers(classifier, waiting, unknown_rate)


def _answers(
    classifier: Classifier, read: Sequence[tuple[Path, Pixels | None, str]], unknown_rate: float
) -> Iterator[FileAnswer]:
    good = [pixels for _, pixels, _ in read if pixels is not None]
    found = iter(classifier.answer(np.stack(good), unknown_rate) if good else [])
    for path, pixels, problem in read:
        yield FileAnswer(path, None if pixels is None else next(found), problem)


def _read(paths: Sequence[Path], shape: Shape) -> Iterator[tuple[Path, Pixels | None, str]]:
    """Each file with its pixels, or with what is wrong with it."""
    quiet = len(paths) < _MANY or not sys.stderr.isatty()
    for path in tqdm(paths, unit="photo", disable=quiet, file=STANDARD_ERROR, dynamic_ncols=True):
        try:
            yield path, read_photo(path, shape), ""
        except (ValueError, OSError) as error:
            sentence = str(error).replace("\n", " ")
            notify(f"left out: {sentence}")
            yield path, None, sentence


def _below(folder: Path) -> list[Path]:
    def seen(path: Path) -> bool:
        return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(path for path in folder.rglob("*") if seen(path))
