"""The pictures of a sweep, from fabricated sweeps: what is drawn, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from helpers.swept import NOISE, add, begin, same, winner_and_second
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from lgm_dist.config import Config
from lgm_dist.runs.sweep_folder import read_sweep
from lgm_dist.sweeps import pictures


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folder of the sweep `swept`, still without trials."""
    return begin(tmp_path / "swept")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """What is drawn, by file name."""
    drawn: dict[str, Figure] = {}
    save = pictures._save

    def keep(figure: Figure, path: Path) -> Path:
        drawn[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(pictures, "_save", keep)
    return drawn


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_pictures_are_files_that_say_when_they_leak(
    tmp_path: Path, figures: dict[str, Figure], protocol: Literal["standard", "paper"]
) -> None:
    begin(tmp_path, Config.of(protocol=protocol))
    winner_and_second(tmp_path)
    paths = pictures.draw(read_sweep(tmp_path))
    assert paths == [tmp_path / name for name in ("parallel.png", "importance.png", "time.png")]
    for path in paths:
        title = figures[path.name].get_suptitle() + figures[path.name].axes[0].get_title()
        assert ("LEAKS the label" in title) == (protocol == "paper")
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert all(300 < side < 3000 for side in image.size)


@pytest.mark.parametrize(("evaluated", "failed"), [(0, 0), (0, 1), (1, 0), (2, 1)])
def test_only_pictures_for_which_there_are_trials_are_drawn(tmp_path: Path, evaluated: int, failed: int) -> None:
    """How training went needs one evaluated trial, what compares trials needs two."""
    begin(tmp_path)
    for accuracy in (0.5, 0.25)[:evaluated]:
        add(tmp_path, {"lr": 1e-3, "model.norm": "group"}, same(accuracy))
    for _ in range(failed):
        add(tmp_path, {"lr": 1e-3, "model.norm": "group"}, status="failed", error="it broke")
    needed = {"parallel.png": 2, "importance.png": 2, "time.png": 1}
    paths = pictures.draw(read_sweep(tmp_path))
    assert paths == [tmp_path / name for name, trials in needed.items() if evaluated >= trials]
    assert all(path.exists() for path in paths)


def test_parallel_coordinates(sweep: Path, figures: dict[str, Figure]) -> None:
    """lr 1e-3 is halfway up its logarithmic axis; the best line is drawn last, from the top of the last axis."""
    add(sweep, {"lr": 1e-4, "model.norm": "group"}, same(0.3))
    add(sweep, {"lr": 1e-3, "model.norm": "batch", "model.norm_scope": "global"}, same(0.5))
    add(sweep, {"lr": 1e-2, "model.norm": "group"}, same(0.35), status="stopped")
    pictures.parallel(read_sweep(sweep))
    lines = figures["parallel.png"].axes[0].lines[:3]
    at_axes = [[float(y) for y in np.asarray(line.get_ydata())[::40]] for line in lines]
    assert [y[0] for y in at_axes] == pytest.approx([0, 1, 0.5])
    assert [y[3] for y in at_axes] == pytest.approx([0, 0.25, 1])
    assert [y[1] > 0.5 for y in at_axes] == [True, True, False], "group above batch"
    assert [y[2] < 0 for y in at_axes] == [True, True, False], "below the axis: not used"
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-"]
    done, stopped, winner = (line.get_linewidth() for line in lines)
    assert stopped < done < winner
    assert len({to_rgba(line.get_color()) for line in lines}) == 3
    texts = {text.get_text() for text in figures["parallel.png"].axes[0].texts}
    assert {"lr", "0.0001", "0.001", "0.01", "batch", "group", "not used", "30.00", "50.00"} <= texts


def test_trials_of_equal_accuracy_have_their_pictures(sweep: Path, figures: dict[str, Figure]) -> None:
    for _ in range(2):
        add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.5))
    assert len(pictures.draw(read_sweep(sweep))) == 3
    assert [float(np.asarray(line.get_ydata())[-1]) for line in figures["parallel.png"].axes[0].lines[:2]] == [0.5, 0.5]


@pytest.mark.parametrize(("trials", "hint"), [(9, True), (10, False)])
def test_importance_of_few_trials_is_called_a_hint(
    tmp_path: Path, figures: dict[str, Figure], trials: int, hint: bool
) -> None:
    begin(tmp_path, noise=NOISE)
    for i in range(trials):
        add(tmp_path, {"noise": ("sample", "mean")[i % 2]}, same(0.3 + 0.01 * i))
    pictures.importance(read_sweep(tmp_path))
    left, right = figures["importance.png"].axes
    assert f"from {trials} trials" in left.get_title()
    assert ("too few" in left.get_title()) == hint
    assert (left.patches[0].get_facecolor() != to_rgba("C0")) == hint, "pale"
    assert [label.get_text() for label in left.get_yticklabels()] == [f"noise (n = {trials})"]
    means = [line for line in right.lines if line.get_marker() == "D"]  # of 30, 32, … and 31, 33, …
    assert [float(np.asarray(line.get_xdata())[0]) for line in means] == pytest.approx([34, 34 + (trials == 10)])


def test_time(sweep: Path, figures: dict[str, Figure]) -> None:
    winner_and_second(sweep)
    add(sweep, {"lr": 1e-2, "model.norm": "group"}, same(0.3), status="failed", error="it broke")
    pictures.time(read_sweep(sweep))
    axes = figures["time.png"].axes[0]
    failed, stopped, winner, chance = axes.lines
    assert (list(failed.get_xdata()), list(failed.get_ydata())) == ([30], [30])
    assert (list(stopped.get_xdata()), list(stopped.get_ydata())) == ([30, 60], [31.25, 25])
    assert (list(winner.get_xdata()), list(winner.get_ydata())) == ([30, 60], [40, 50])
    assert set(np.asarray(chance.get_ydata())) == {20}
    assert winner.get_linewidth() > stopped.get_linewidth()
    legend = axes.get_legend()
    assert legend is not None
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["failed", "stopped", "winner: trial 0, 95 % interval", "chance"]
    assert axes.get_xlabel() == "training time (s)"


def test_long_times_are_in_minutes(sweep: Path, figures: dict[str, Figure]) -> None:
    add(sweep, {"lr": 1e-2, "model.norm": "group"}, *[same(0.3)] * 12)
    pictures.time(read_sweep(sweep))
    axes = figures["time.png"].axes[0]
    assert axes.get_xlabel() == "training time (min)"
    assert np.asarray(axes.lines[0].get_xdata())[-1] == 6
