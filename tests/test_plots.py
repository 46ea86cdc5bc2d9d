"""The pictures of a small run, and the progress bar that follows its metrics."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from helpers.steps import train_step
from PIL import Image

from lgm_dist.config import Config, Protocol
from lgm_dist.console import notify
from lgm_dist.data import open_bank, sample_episodes
from lgm_dist.model import LGMNet
from lgm_dist.report import plots
from lgm_dist.runs import checkpoint
from lgm_dist.runs.metrics import MetricsLog
from lgm_dist.runs.progress import Progress
from lgm_dist.training.evaluation import evaluate
from lgm_dist.training.schedule import make_optimizer


def train(config: Config, run: Path) -> Path:
    """A run of config.episodes.steps steps, evaluated every config.episodes.eval_every, without anything that surrounds it."""
    torch.manual_seed(0)
    model = LGMNet(config.model)
    optimizer = make_optimizer(model, config)
    train_bank, val_bank = open_bank(config.data.name, "train"), open_bank(config.data.name, "val")
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    log = MetricsLog(run, 0)
    for step in range(config.episodes.steps):
        batch = sample_episodes(
            train_bank, config, "train", step * config.episodes.meta_batch, config.episodes.meta_batch
        )
        loss, accuracy, _ = train_step(model.train(), optimizer, batch, config, step).tolist()
        metrics = {"train/loss": loss, "train/accuracy": accuracy, "speed/episodes_per_s": 100.0 + step}
        if (step + 1) % config.episodes.eval_every == 0:
            score = evaluate(model, val_bank, config, "val", config.episodes.eval_episodes).score
            metrics |= {"val/accuracy": score.accuracy, "val/ci95": score.ci95}
            state = checkpoint.TrainState(step + 1, score.accuracy, score.ci95)
            checkpoint.save(run, state, model, optimizer, config)
        log.write(step + 1, metrics)
    log.close()
    return run


@pytest.fixture(scope="module", params=["standard", "paper"])
def run(request: pytest.FixtureRequest, small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    protocol: Protocol = request.param
    return train(small.replace(protocol=protocol), tmp_path_factory.mktemp(protocol))


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3); fails for a file that is no PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has(image: np.ndarray[Any, Any], colour: str) -> int:
    """How many pixels have just this colour, #rrggbb."""
    return int((image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


BLUE, ORANGE, GREEN, RED = "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"  # matplotlib's own


def test_curves(run: Path) -> None:
    path = plots.curves(run)
    assert path == run / "curves.png"
    image = pixels(path)
    height, width, _ = image.shape
    assert 300 < height < 1000
    assert 1000 < width < 2500
    thirds = np.array_split(image, 3, axis=1)
    assert all(has(third, BLUE) > 50 for third in thirds), "training in all three"
    assert [has(third, ORANGE) > 50 for third in thirds] == [False, True, False], "val where the accuracy is"


def test_curves_of_one_step(small: Config, tmp_path: Path) -> None:
    config = small.replace(steps_per_epoch=1, eval_every=1)
    assert pixels(plots.curves(train(config, tmp_path))).size > 0


def framed(image: np.ndarray[Any, Any], colour: str) -> int:
    """How many squares of this colour: a row of pixels through the middle of a frame crosses its two sides."""
    mask = (image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
    uprights = [_runs(mask[:, x]) for x in range(mask.shape[1])]
    columns = np.array([sum(1 for length in lengths if length > 50) for lengths in uprights])
    starts = np.flatnonzero((columns[1:] > 0) & (columns[:-1] == 0)) + 1
    return int(sum(columns[start : start + 3].max() for start in starts)) // 2


def _runs(mask: np.ndarray[Any, Any]) -> list[int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(edges[1::2] - edges[::2])


def test_episode(run: Path) -> None:
    """Every query that is shown is framed green or red as the best checkpoint has decided it."""
    bank = open_bank(config_of(run).data.name, "val")
    model, config, _ = checkpoint.load_model(checkpoint.best(run))
    path = plots.episode(run, bank, index=3)
    assert path == run / "episode.png"
    image = pixels(path)
    assert all(200 < side < 2000 for side in image.shape[:2])
    batch = sample_episodes(bank, config, "val", 3, 1)
    noise = batch.noise if config.episodes.protocol == "paper" else None
    with torch.no_grad():
        right = (model(batch.support, batch.query, 3, noise).argmax(-1) == batch.labels).sum().item()
    assert (framed(image, GREEN), framed(image, RED)) == (right, batch.labels.numel() - right)
    assert framed(image, "#000000") == 6, "3 ways of 2 shots"


def test_episode_asks_the_best_checkpoint_with_the_protocols_noise(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best = checkpoint.best(run)
    model, config, _ = checkpoint.load_model(best)
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    asked: list[tuple[bool, bool]] = []
    classify = LGMNet.classify

    def spy(self: LGMNet, features: Any, codes: Any, ways: int, noise: Any = None) -> Any:
        asked.append((torch.equal(self.generator.layers[0].w1, model.generator.layers[0].w1), noise is not None))  # type: ignore[arg-type]
        return classify(self, features, codes, ways, noise)

    monkeypatch.setattr(LGMNet, "classify", spy)
    other, bank = LGMNet(config.model), open_bank(config.data.name, "val")
    for step, saved, accuracy in ((20, other, 0.0), (24, model, 2.0), (28, other, 0.0)):  # best: once newest, once not
        checkpoint.save(tmp_path, checkpoint.TrainState(step, accuracy), saved, make_optimizer(saved, config), config)
        if step > 20:
            plots.episode(tmp_path, bank)
    assert asked == [(True, config.episodes.protocol == "paper")] * 2


def test_val_of_other_ways_and_shots_than_training(small: Config, tmp_path: Path) -> None:
    """Trained on 3 ways of 2 shots, evaluated on 5 of 1: two lines of chance, and a contact sheet of 5 rows."""
    config = small.replace(steps_per_epoch=4, eval_ways=5, eval_shot=1)
    run = train(config, tmp_path)
    middle = np.array_split(pixels(plots.curves(run)), 3, axis=1)[1]
    lines = [np.flatnonzero((middle == rgb).all(-1).sum(1) > 60) for rgb in ((31, 119, 180), (255, 127, 14))]
    assert all(0 < len(rows) <= 4 for rows in lines), "dotted across the picture, in the colours of train and val"
    assert lines[0].max() < lines[1].min(), "33 % lies above 20 %"
    image = pixels(plots.episode(run, open_bank(config.data.name, "val")))
    assert framed(image, "#000000") == 5
    assert framed(image, GREEN) + framed(image, RED) == 15


def config_of(run: Path) -> Config:
    return checkpoint.load_model(checkpoint.best(run))[1]


def test_episode_of_many_queries_stays_readable(small: Config, tmp_path: Path) -> None:
    config = small.replace(ways=2, eval_query=20, steps_per_epoch=4)
    image = pixels(plots.episode(train(config, tmp_path), open_bank(config.data.name, "val")))
    assert framed(image, GREEN) + framed(image, RED) == 2 * plots.QUERIES_SHOWN


# Analysis


def analysis(run: Path, **changes: Any) -> Path:
    """An analysis.json of three classes, written by hand."""
    found: dict[str, Any] = {
        "split": "val",
        "step": 1,
        "protocol": "standard",
        "episodes": 600,
        "ways": 2,
        "shot": 1,
        "chance": 0.25,
        "accuracy": 0.5,
        "ci95": 0.01,
        "classes": ["ant", "bus", "cat"],
        "groups": ["animal", "thing", "animal"],
        "confusion": [[60, 0, 5], [0, 40, 6], [20, 3, 30]],
        "met": [[100, 50, 50], [0, 100, 60], [80, 60, 100]],
        "per_class": [
            {"class": "ant", "group": "animal", "accuracy": 0.8, "ci95": 0.0, "queries": 15, "episodes": 2},
            {"class": "bus", "group": "thing", "accuracy": 0.4, "ci95": 0.0, "queries": 15, "episodes": 2},
            {"class": "cat", "group": "animal", "accuracy": None, "ci95": None, "queries": 0, "episodes": 0},
        ],
        "weights": {
            "tasks": [["ant", "bus"], ["bus", "cat"]],
            "supports": 2,
            "variation": 0.125,
            "task_of": [0, 0, 1, 1] * 2,
            "noise": ["mean"] * 4 + ["drawn"] * 4,
            "xy": [[0, 0], [1, 0], [8, 5], [9, 5], [0, 3], [1, 3], [8, 2], [9, 2]],
            **dict.fromkeys(("silhouette", "silhouette_drawn", "shuffled_mean", "shuffled_highest"), 0.5),
            "histogram": {
                layer: {"edges": [-1, 0, 1], "counts": [10, 1000], "drawn": [10, 10]} for layer in ("layer1", "layer2")
            },
        },
    }
    (run / "analysis.json").write_text(json.dumps(found | changes))
    return run


def middle_of(image: np.ndarray[Any, Any], colour: tuple[int, ...]) -> tuple[float, float]:
    """Of the pixels of this colour (y, x)."""
    rows, columns = np.nonzero((np.abs(image.astype(int) - colour) <= 1).all(-1))
    assert len(rows) > 100, colour
    return float(np.median(rows)), float(np.median(columns))


def test_confusion_has_its_rates_where_they_belong(tmp_path: Path) -> None:
    """Ordered by group: ant, cat, bus. Rates of the pairs that met, in %, from the matrices by hand."""
    path = plots.confusion(analysis(tmp_path))
    assert path == tmp_path / "confusion.png"
    left = np.array_split(pixels(path), 2, axis=1)[0]
    rates = [[60, 10, 0], [25, 30, 5], [None, 10, 40]]
    expected = {}
    for y, x in np.ndindex(3, 3):
        rate = rates[y][x]
        if rate not in (10, 25):  # twice there; white as the paper
            share = None if rate is None else (rate / 25 / 2 if rate < 25 else 0.5 + (rate - 25) / 35 / 2)
            colour = (0.5, 0.5, 0.5) if share is None else matplotlib.colormaps["RdBu_r"](share)[:3]
            expected[y, x] = middle_of(left, tuple(round(255 * c) for c in colour))
    assert len(expected) == 6
    (top, first), (bottom, last) = expected[0, 0], expected[2, 2]
    assert bottom - top == pytest.approx(last - first, abs=3)
    for (y, x), found in expected.items():
        assert found == pytest.approx((top + (bottom - top) * y / 2, first + (last - first) * x / 2), abs=4), (y, x)


def test_bars_are_as_long_as_the_accuracies(tmp_path: Path) -> None:
    image = pixels(plots.confusion(analysis(tmp_path)))
    right = np.array_split(image, 2, axis=1)[1]
    widths = {c: (right == rgb).all(-1).sum(1) for c, rgb in {"ant": (31, 119, 180), "bus": (255, 127, 14)}.items()}
    bars = {name: np.flatnonzero(width > 0.9 * width.max()) for name, width in widths.items()}
    assert widths["ant"].max() == pytest.approx(2 * widths["bus"].max(), abs=8), (
        "80 % and 40 %, less the line of chance"
    )
    assert len(bars["ant"]) == pytest.approx(len(bars["bus"]), abs=2), "one bar each; that of 0 queries has no length"
    assert bars["bus"].min() > bars["ant"].max() + 1.2 * len(bars["ant"]), "the bar of cat, of nothing, lies between"


def test_weights_have_a_point_for_each_support_set(tmp_path: Path) -> None:
    path = plots.weights(analysis(tmp_path))
    assert path == tmp_path / "weights.png"
    image = pixels(path)[95:660, 10:880].astype(int)  # between the embedding's axes
    for redness, columns, filled in ((-1, slice(0, 435), 1), (1, slice(435, 870), 0)):  # task 0 blue, task 1 orange
        points = redness * (image[..., 0] - image[..., 2]) > 60
        assert len(_runs(points[:, columns].any(0))) == 2, "two x"
        assert len(_runs(points[:, columns].any(1))) == 2, "two y"
        assert points[:, columns].sum() == points.sum(), "and none elsewhere"
        halves = [half.sum() for half in np.array_split(points[points.any(1)], 2)]
        assert halves[filled] > 1.5 * halves[1 - filled], "noise at its mean below for task 0, above for task 1"


def test_weights_that_are_not_finite_or_of_one_set_of_classes_say_so(tmp_path: Path) -> None:
    whole = json.loads((analysis(tmp_path) / "analysis.json").read_text())["weights"]
    pictures = []
    for found in (whole, whole | {"silhouette": None}, None):
        pictures.append(pixels(plots.weights(analysis(tmp_path, weights=found))))
    assert pictures[0].shape == pictures[1].shape == pictures[2].shape
    assert (pictures[0] != pictures[1]).any()
    assert has(pictures[2], BLUE) == 0
    assert (pictures[2] < 128).any(-1).sum() > 500, "words"


def test_the_pictures_of_an_analysis_need_one(tmp_path: Path) -> None:
    for picture in (plots.confusion, plots.weights):
        with pytest.raises(ValueError, match=r"has no analysis\.json; lgm-dist train writes it at the end of the run"):
            picture(tmp_path)


# Progress


def write(run: Path, start: int, stop: int, tail: str = "", loss: float = 1.5) -> None:
    """Appends the rows of the steps start .. stop."""
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(start, stop + 1):
            row = {"step": step, "train/loss": loss, "train/accuracy": 0.25, "speed/episodes_per_s": 99.6}
            file.write(json.dumps(row | ({"val/accuracy": step / 10} if step % 4 == 0 else {})) + "\n")
        file.write(tail)


@pytest.mark.parametrize("after", [12, 4, 3, 1])
def test_the_bar_follows_the_metrics(small: Config, tmp_path: Path, after: int) -> None:
    """A resumed run cuts the file to the rows of its checkpoint and may have added to it before the bar looks again."""
    with Progress(tmp_path, small) as progress:
        assert (progress._bar.n, progress._bar.total) == (0, 12)
        write(tmp_path, 1, 3)
        progress._update()
        assert progress._bar.n == 3
        write(tmp_path, 4, 5, tail='{"step": 6, "train/lo')
        progress._update()
        assert progress._bar.n == 5
        assert "loss=1.500, acc=25.0%, episodes/s=100, val=40.0%" in str(progress._bar)

        log = MetricsLog(tmp_path, 2)
        write(tmp_path, 3, after, loss=1.23456)  # longer lines: the old end lies within one
        log.close()
    assert progress._bar.n == max(after, 2)
    assert progress._bar.disable, "closed"


def test_a_cut_file_takes_the_bar_back(small: Config, tmp_path: Path) -> None:
    with Progress(tmp_path, small) as progress:
        write(tmp_path, 1, 8)
        progress._update()
        assert progress._bar.n == 8
        MetricsLog(tmp_path, 4).close()
        progress._update()
        assert progress._bar.n == 4
        write(tmp_path, 5, 12)
    assert progress._bar.n == 12


def test_steps_of_an_earlier_start_are_not_speed(small: Config, tmp_path: Path) -> None:
    write(tmp_path, 1, 8)
    with Progress(tmp_path, small) as progress:
        assert (progress._bar.initial, progress._bar.n) == (8, 8)
        MetricsLog(tmp_path, 4).close()
        progress._update()
        assert (progress._bar.initial, progress._bar.n) == (4, 4)
        write(tmp_path, 5, 6)
    assert (progress._bar.initial, progress._bar.n) == (4, 6)


def test_a_sentence_stands_above_the_bar_on_a_line_of_its_own(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(tmp_path, small) as progress:
        write(tmp_path, 1, 6)
        progress._update()
        progress._bar.refresh()
        notify("something has happened")
    lines = capsys.readouterr().err.splitlines()
    assert "something has happened" in lines
    assert any(" 6/12 " in line for line in lines[lines.index("something has happened") :])


def test_a_bar_that_nobody_reads_any_more_ends_no_run(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tqdm keeps its lock when a pipe's reader has gone, and a run that had trained to its end waited for it for good."""
    reader, writer = os.pipe()
    os.close(reader)

    def follow() -> None:
        with Progress(tmp_path, small) as progress:
            write(tmp_path, 1, 12)
            progress._bar.mininterval = 0
        ended.append(progress._bar.n)

    ended: list[int] = []
    with os.fdopen(writer, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        with pytest.raises(BrokenPipeError):
            sys.stderr.write("nobody\n")
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        thread.join(10)
        notify("a sentence that nobody reads")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            broken.close()
    assert ended == [12]
