"""`lgm-dist adapt`: make a classifier of photos in class folders."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro
from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class AdaptFlags:
    """Make a classifier of new classes from labelled photos, and print what they tell of its accuracy.

    A photo that cannot be read is named and left out, and the exit status is 1.
    """

    photos: Positional[Path]
    """Folder of class folders. Each holds the photos of one class, any number of them."""
    learner: str
    """Name of a learner of the package, a learner's file, or a run's folder."""
    out: Path
    """The file of the classifier to write; its name usually ends with .lgm."""


def main(argv: list[str]) -> None:
    """Read the photos, write the classifier and print its report."""
    flags = tyro.cli(AdaptFlags, args=argv)
    from lgm_dist.adapt.classifier import classifier_of  # after parsing, because torch takes seconds to import
    from lgm_dist.adapt.files import read_classes
    from lgm_dist.adapt.learner import load
    from lgm_dist.adapt.photos import problem_of
    from lgm_dist.errors import RunFailed

    files = {name: [Path(str(photo)) for photo in photos] for name, photos in problem_of(flags.photos).items()}
    learner = load(flags.learner)
    classes, bad = read_classes(files, learner.shape)
    classifier = classifier_of(learner, classes)
    path = classifier.save(flags.out)
    sys.stdout.write(f"{classifier}\n{classifier.report()}written to {path} ({path.stat().st_size / 1e6:.2f} MB)\n")
    if bad:
        raise RunFailed(f"{bad} of {bad + sum(classifier.classes.values())} photos could not be read and are left out")
