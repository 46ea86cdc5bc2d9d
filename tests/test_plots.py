"""The pictures of a small run, and the progress bar that follows its metrics."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lgm_dist import checkpoint, plots
from lgm_dist.config import Config, Protocol
from lgm_dist.data import open_bank, sample_episodes
from lgm_dist.engine import evaluate, make_optimizer, train_step
from lgm_dist.model import LGMNet
from lgm_dist.progress import Progress
from lgm_dist.tracking import Tracker


def train(config: Config, run: Path) -> Path:
    """A run of config.steps steps, evaluated every config.eval_every, without anything that surrounds it."""
    torch.manual_seed(0)
    model = LGMNet(config.model)
    optimizer = make_optimizer(model, config)
    train_bank, val_bank = open_bank(config.data, "train"), open_bank(config.data, "val")
    tracker = Tracker(run, replace(config, wandb="disabled"), 0, {})
    for step in range(config.steps):
        batch = sample_episodes(train_bank, config, "train", step * config.meta_batch, config.meta_batch)
        loss, accuracy, _ = train_step(model.train(), optimizer, batch, config, step).tolist()
        metrics = {"train/loss": loss, "train/accuracy": accuracy, "speed/episodes_per_s": 100.0 + step}
        if (step + 1) % config.eval_every == 0:
            score = evaluate(model, val_bank, config, "val", config.eval_episodes).score
            metrics |= {"val/accuracy": score.accuracy, "val/ci95": score.ci95}
            state = checkpoint.TrainState(step + 1, score.accuracy, score.ci95)
            checkpoint.save(run, state, model, optimizer, config)
        tracker.log(step + 1, metrics)
    tracker.close({})
    return run


@pytest.fixture(scope="module", params=["standard", "paper"])
def run(request: pytest.FixtureRequest, small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    protocol: Protocol = request.param
    return train(replace(small, protocol=protocol), tmp_path_factory.mktemp(protocol))


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
    config = replace(small, steps_per_epoch=1, eval_every=1)
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
    bank = open_bank(config_of(run).data, "val")
    model, config, _ = checkpoint.load_model(checkpoint.best(run))
    path = plots.episode(run, bank, index=3)
    assert path == run / "episode.png"
    image = pixels(path)
    assert all(200 < side < 2000 for side in image.shape[:2])
    batch = sample_episodes(bank, config, "val", 3, 1)
    noise = batch.noise if config.protocol == "paper" else None
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
    forward = LGMNet.forward

    def spy(self: LGMNet, support: Any, query: Any, ways: int, noise: Any = None) -> Any:
        asked.append((torch.equal(self.generators[0].w1, model.generators[0].w1), noise is not None))  # type: ignore[arg-type]
        return forward(self, support, query, ways, noise)

    monkeypatch.setattr(LGMNet, "forward", spy)
    other, bank = LGMNet(config.model), open_bank(config.data, "val")
    for step, saved, accuracy in ((20, other, 0.0), (24, model, 2.0), (28, other, 0.0)):  # best: once newest, once not
        checkpoint.save(tmp_path, checkpoint.TrainState(step, accuracy), saved, make_optimizer(saved, config), config)
        if step > 20:
            plots.episode(tmp_path, bank)
    assert asked == [(True, config.protocol == "paper")] * 2


def config_of(run: Path) -> Config:
    return checkpoint.load_model(checkpoint.best(run))[1]


def test_episode_of_many_queries_stays_readable(small: Config, tmp_path: Path) -> None:
    config = replace(small, ways=2, eval_query=20, steps_per_epoch=4)
    image = pixels(plots.episode(train(config, tmp_path), open_bank(config.data, "val")))
    assert framed(image, GREEN) + framed(image, RED) == 2 * plots.QUERIES_SHOWN


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

        tracker = Tracker(tmp_path, replace(small, wandb="disabled"), 2, {})
        write(tmp_path, 3, after, loss=1.23456)  # longer lines: the old end lies within one
        tracker.close({})
    assert progress._bar.n == max(after, 2)
    assert progress._bar.disable, "closed"


def test_a_cut_file_takes_the_bar_back(small: Config, tmp_path: Path) -> None:
    with Progress(tmp_path, small) as progress:
        write(tmp_path, 1, 8)
        progress._update()
        assert progress._bar.n == 8
        Tracker(tmp_path, replace(small, wandb="disabled"), 4, {}).close({})
        progress._update()
        assert progress._bar.n == 4
        write(tmp_path, 5, 12)
    assert progress._bar.n == 12


def test_steps_of_an_earlier_start_are_not_speed(small: Config, tmp_path: Path) -> None:
    write(tmp_path, 1, 8)
    with Progress(tmp_path, small) as progress:
        assert (progress._bar.initial, progress._bar.n) == (8, 8)
        Tracker(tmp_path, replace(small, wandb="disabled"), 4, {}).close({})
        progress._update()
        assert (progress._bar.initial, progress._bar.n) == (4, 4)
        write(tmp_path, 5, 6)
    assert (progress._bar.initial, progress._bar.n) == (4, 6)
