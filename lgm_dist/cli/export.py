"""`lgm-dist export`: write a trained learner to one small file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tyro.conf import Positional

if TYPE_CHECKING:
    from lgm_dist.adapt.learner import Learner
    from lgm_dist.training.calibration import Calibration


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    """Write a learner to one file, which lgm_dist.load reads and which holds no code, no paths and no images."""

    run: Positional[str]
    """Folder of a run, whose checkpoint with the best val accuracy is taken, or one of its checkpoint folders."""
    out: Path
    """The file to write; its name usually ends with .safetensors."""
    rank: int = 48
    """Components of each whitening matrix that are kept; the others are replaced by their mean."""
    calibrate: bool = True
    """Fit the temperature of the probabilities, and the thresholds of "none of these", on val episodes of the run's data set,
    and keep them in calibration.json in the run's folder too. A run that has this file is not calibrated again."""
    episodes: int = 600
    """Val episodes of each size to calibrate on."""


def main(argv: list[str]) -> None:
    """Write the file and say what it holds."""
    flags = tyro.cli(ExportFlags, args=argv)
    if flags.episodes < 1:
        raise ValueError(f"episodes ({flags.episodes}) must be at least 1")
    from lgm_dist.adapt.learner import load  # after parsing, because torch takes seconds to import

    learner = load(flags.run)
    if flags.calibrate and learner.calibration is None and learner.config.episodes.protocol == "standard":
        learner = _calibrated(learner, flags.episodes)
    path = learner.save(flags.out, flags.rank)
    sys.stdout.write(f"{learner}\nwritten to {path} ({path.stat().st_size / 1e6:.2f} MB)\n")
    if learner.calibration:
        sys.stdout.write(_table(learner.calibration))


def _calibrated(learner: Learner, episodes: int) -> Learner:
    """The learner with a calibration, which the folder of its run gets too."""
    from lgm_dist.adapt.learner import CALIBRATION
    from lgm_dist.data import open_bank
    from lgm_dist.data.prepare import ensure_manifest
    from lgm_dist.runs.files import write_json
    from lgm_dist.training.calibration import calibrate

    data = learner.config.data
    try:
        bank = open_bank(ensure_manifest(data.name, data.root, data.source), "val", data.cache)
    except ValueError as error:
        raise ValueError(f"calibration needs the val images of the run: {error}; or give --no-calibrate") from None
    calibration = calibrate(learner.model, bank, learner.config, episodes=episodes)
    checkpoint = Path(learner.name)
    if checkpoint.is_dir():
        write_json(checkpoint.parent.parent / CALIBRATION, {"checkpoint": checkpoint.name, **calibration.to_dict()})
    return dataclasses.replace(learner, calibration=calibration)


def _table(calibration: Calibration) -> str:
    """What the calibration is for each size of episodes, on the episodes that it was fitted to."""
    from lgm_dist.console import table

    rows = [
        (
            f"{cell.ways}-way {cell.shot}-shot",
            f"{cell.temperature:.3f}",
            f"{100 * cell.error_before:.1f} → {100 * cell.error:.1f} %",
            f"{cell.auroc[calibration.score]:.3f} ({calibration.score})" if calibration.score else "—",
        )
        for cell in calibration.cells
    ]
    return table(("val episodes", "temperature", "calibration error", "AUROC of none of these"), rows)
