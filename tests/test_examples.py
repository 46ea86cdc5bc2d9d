"""The notebooks in examples/ run from the first cell to the last, and learn something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(notebook: Path) -> dict[str, Any]:
    """The names that a notebook defines, after its code cells have run in order."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    return names


def test_the_first_run_learns_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scores = run(EXAMPLES / "first-run.ipynb")["scores"]
    assert scores[5, 1].accuracy - scores[5, 1].ci95 > 0.2, "chance at 5 ways"
    assert scores[20, 1].accuracy - scores[20, 1].ci95 > 0.05, "chance at 20 ways"


def test_notebooks_are_in_the_notebook_format() -> None:
    for path in EXAMPLES.glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids)
        assert all(cell["cell_type"] == "markdown" or "outputs" in cell for cell in notebook["cells"])
