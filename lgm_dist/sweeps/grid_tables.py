"""The ways × shots table as Markdown, CSV, LaTeX and JSON, from the folders of the cells' runs."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lgm_dist.config import Config
from lgm_dist.console import leak_note, percent, table
from lgm_dist.runs.files import read_json, write_json
from lgm_dist.runs.folder import FACTS, read_result
from lgm_dist.sweeps.grid_cells import cross_scores, finished, run_of
from lgm_dist.sweeps.spaces import images_per_step

MISSING = "—"
HEADER = (
    *("episodes", "test accuracy", "chance", "val accuracy", "episodes trained on", "images trained on"),
    *("time", "peak memory per worker", "protocol"),
)
LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    MISSING: "---",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
LATEX |= {mark: f"\\{mark}" for mark in "%_&#${}"}
Rows = list[dict[str, Any]]
Table = tuple[Sequence[str], list[Sequence[str]]]
"""Header and rows, as text."""


def report(cells: list[Config], cross: bool, command: str) -> None:
    """Print the table of the finished cells, and write table.md, .csv, .tex and .json, and with `cross` cross.csv.

    Args:
        cells: The configurations of all cells.
        cross: Add the table of each network on the episodes of all cells.
        command: The command line, for the record.
    """
    cells = sorted(cells, key=lambda cell: (cell.episodes.ways, cell.episodes.shot))
    folder, rows = Path(cells[0].run.storage), [row_of(cell) for cell in cells]
    caption, origin = caption_of(cells, command)
    tables: list[Table] = [(HEADER, [texts(row) for row in rows])]
    values = {"caption": caption, "origin": origin, "cells": rows}
    if cross:
        tables.append(cross_table(cells))
        values["cross"] = cross_rows(cells)
        _write_csv(folder / "cross.csv", cross_rows(cells))
    markdown = "\n".join([*(table(*parts) for parts in tables), caption, "", origin]) + "\n"
    sys.stdout.write(f"\n{markdown}")
    (folder / "table.md").write_text(markdown)
    (folder / "table.tex").write_text(f"% {origin}\n" + "\n".join(latex(*parts, caption) for parts in tables))
    _write_csv(folder / "table.csv", rows)
    write_json(folder / "table.json", values)
    sys.stdout.write(f"written to {folder}/table.md, .csv, .tex and .json\n")


def row_of(cell: Config) -> dict[str, Any]:
    """A cell as plain values, with result.json (accuracies in 0 to 1) if it is finished."""
    row: dict[str, Any] = {
        "cell": cell.run.name,
        "protocol": cell.episodes.protocol,
        "ways": cell.episodes.ways,
        "shot": cell.episodes.shot,
    }
    row |= {"chance": 1 / cell.episodes.ways, "leaks_label": cell.episodes.protocol == "paper"}
    if finished(cell):
        row |= read_result(run_of(cell)) | {"train/images": cell.episodes.steps * images_per_step(cell)}
    return row


def caption_of(cells: list[Config], command: str) -> tuple[str, str]:
    """How the figures were measured, with the leak note; and by which command, commit and machine."""
    tested = f"{cells[0].episodes.test_episodes:,} test" if cells[0].episodes.test_episodes else "no test"
    val = f"{cells[0].episodes.eval_episodes:,} val"
    mean = f"Mean ± 95 % interval over {tested} and {val} episodes, checkpoint with the best val accuracy."
    facts = [read_json(run_of(cell) / FACTS) for cell in cells if finished(cell)]
    where = {f"commit {fact['commit'] or 'unknown'}, {fact['device']} ({fact['machine']})" for fact in facts}
    origin = " ".join(f"`{command}`: {'; '.join(sorted(where)) or 'no cell is finished'}".split())
    memory = "" if cells[0].run.workers else "Memory is the peak of this process so far, earlier cells included."
    return " ".join(
        note for note in (mean, memory, *leak_note(cells[0].episodes.protocol).splitlines()) if note
    ), origin


def cross_table(cells: list[Config]) -> Table:
    """A row per network, a column per kind of test episode."""
    rows: list[Sequence[str]] = []
    for cell in cells:
        scores = cross_scores(cell)
        row = (scores.get(other.run.name) for other in cells)
        rows.append(
            [
                _named(cell.episodes.ways, cell.episodes.shot),
                *(percent(score["accuracy"], score["ci95"]) if score else MISSING for score in row),
            ]
        )
    rows.append(["chance", *(_chance(cell.episodes.ways) for cell in cells)])
    return ["trained on / evaluated on", *(_named(cell.episodes.ways, cell.episodes.shot) for cell in cells)], rows


def cross_rows(cells: list[Config]) -> Rows:
    """A row per evaluated pair of cells."""
    rows = []
    for cell in cells:
        scores = cross_scores(cell)
        for name in (other.run.name for other in cells):
            if name in scores:
                rows.append({"trained_on": cell.run.name, "evaluated_on": name, **scores[name]})
    return rows


def texts(row: dict[str, Any]) -> Sequence[str]:
    """A row of the printed table, in the order of HEADER."""
    trained = [MISSING] * 4
    if "train/images" in row:
        trained = [f"{row['train/episodes']:,}", f"{row['train/images']:,}"]
        trained += [f"{row['train/seconds'] / 60:.1f} min", f"{row['memory/peak_bytes'] / 2**30:.2f} GiB"]
    test, val = (
        percent(row[f"{split}/accuracy"], row[f"{split}/ci95"]) if f"{split}/accuracy" in row else MISSING
        for split in ("test", "val")
    )
    protocol = "paper: LEAKS THE LABEL" if row["leaks_label"] else row["protocol"]
    return (_named(row["ways"], row["shot"]), test, _chance(row["ways"]), val, *trained, protocol)


def latex(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A LaTeX table for \\usepackage{booktabs}, with the caption below it."""
    first, *lines = [" & ".join(_escaped(text) for text in row) + r" \\" for row in [header, *rows]]
    begin = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", first, r"\midrule"]
    end = [r"\bottomrule", r"\end{tabular}", rf"\par\smallskip{{\footnotesize {_escaped(caption)}\par}}"]
    return "\n".join([*begin, *lines, *end]) + "\n"


def _escaped(text: str) -> str:
    return "".join(LATEX.get(mark, mark) for mark in text)


def _write_csv(path: Path, rows: Rows) -> None:
    rows = [_numbers(row) for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a spreadsheet: shares in %, with that in the name; test/accuracy becomes test_accuracy_percent."""
    shares = ("accuracy", "ci95", "chance")
    names = {name: name.replace("/", "_") + "_percent" * name.endswith(shares) for name in row}
    return {names[name]: round(100 * row[name], 4) if name.endswith(shares) else row[name] for name in row}


def _named(ways: int, shot: int) -> str:
    return f"{ways}-way {shot}-shot"


def _chance(ways: int) -> str:
    return f"{100 / ways:.3g} %"
