"""`lgm-dist export`: write a trained learner to one small file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro
from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    """Write a learner to one file, which lgm_dist.load reads and which holds no code, no paths and no images."""

    run: Positional[str]
    """Folder of a run, whose checkpoint with the best val accuracy is taken, or one of its checkpoint folders."""
    out: Path
    """The file to write; its name usually ends with .safetensors."""
    rank: int = 64
    """Components of each whitening matrix of the head that are kept; the others are replaced by their mean."""


def main(argv: list[str]) -> None:
    """Write the file and say what it holds."""
    flags = tyro.cli(ExportFlags, args=argv)
    from lgm_dist.adapt.learner import load  # after parsing, because torch takes seconds to import

    learner = load(flags.run)
    path = learner.save(flags.out, flags.rank)
    sys.stdout.write(f"{learner}\nwritten to {path} ({path.stat().st_size / 1e6:.2f} MB)\n")
