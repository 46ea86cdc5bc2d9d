"""`lgm-dist predict`: classify photos with a classifier that `lgm-dist adapt` has written."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tyro.conf import Positional

from lgm_dist.console import table

if TYPE_CHECKING:
    from lgm_dist.adapt.files import FileAnswer


@dataclasses.dataclass(frozen=True)
class PredictFlags:
    """Classify photos, and print the class and its probability for each.

    A photo that cannot be read is named, the others are classified, and the exit status is 1.
    """

    classifier: Positional[Path]
    """The file that lgm-dist adapt has written."""
    photos: Positional[tuple[Path, ...]]
    """Files, and folders whose files are taken with those of the folders in them."""
    csv: Path | None = None
    """CSV file to write: a row for each photo, with the probability of every class."""
    json: Path | None = None
    """JSON file to write, with the same."""
    sheet: Path | None = None
    """HTML file to write: all photos with their classes, to look through and to sort."""
    unknown_rate: float = 0.05
    """Share of photos of known classes that may be called "none of these", above 0 and at most 0.5. It needs a learner with a
    calibration."""


def main(argv: list[str]) -> None:
    """Classify the photos, and print and write the answers."""
    flags = tyro.cli(PredictFlags, args=argv)
    from lgm_dist.adapt.classifier import Classifier  # after parsing, because torch takes seconds to import
    from lgm_dist.adapt.files import files_of, predict_files
    from lgm_dist.errors import RunFailed
    from lgm_dist.report.sheet import sheet
    from lgm_dist.runs.files import write_bytes, write_json

    classifier = Classifier.load(flags.classifier)
    files = files_of(flags.photos)
    classifier.check_rate(flags.unknown_rate)
    answers = list(predict_files(classifier, files, flags.unknown_rate))
    sys.stdout.write(_table(answers))
    written = []
    if flags.csv:
        write_bytes(flags.csv, _csv(answers, list(classifier.classes)).encode())
        written.append(flags.csv)
    if flags.json:
        record = {"classes": classifier.classes, "unknown_rate": flags.unknown_rate}
        write_json(flags.json, {**record, "photos": [answer.to_dict() for answer in answers]})
        written.append(flags.json)
    if flags.sheet:
        write_bytes(flags.sheet, sheet(answers, str(flags.classifier)).encode())
        written.append(flags.sheet)
    sys.stdout.write("".join(f"written to {path}\n" for path in written))
    if bad := sum(answer.prediction is None for answer in answers):
        raise RunFailed(f"{bad} of {len(answers)} photos could not be read")


def _table(answers: Sequence[FileAnswer]) -> str:
    rows = []
    for answer in answers:
        if p := answer.prediction:
            rows.append(
                (str(answer.path), p.label, f"{100 * p.probability:.0f} %", "none of these" if p.unknown else "")
            )
        else:
            rows.append((str(answer.path), "", "", "could not be read"))
    return table(("photo", "class", "probability", "note"), rows)


def _csv(answers: Sequence[FileAnswer], classes: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["photo", "label", "probability", "unknown", "problem", *(f"p({name})" for name in classes)])
    for answer in answers:
        if p := answer.prediction:
            unknown = "" if p.unknown is None else str(p.unknown).lower()
            each = [f"{p.probabilities[name]:.6f}" for name in classes]
            writer.writerow([answer.path, p.label, f"{p.probability:.6f}", unknown, "", *each])
        else:
            writer.writerow([answer.path, "", "", "", answer.problem, *("" for _ in classes)])
    return text.getvalue()
