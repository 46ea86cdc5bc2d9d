"""The pictures in a run's folder: curves of the training and a contact sheet of one episode with predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from lgm_dist import checkpoint
from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import sample_episodes, to_pixels
from lgm_dist.tracking import read_metrics

CURVES, EPISODE = "curves.png", "episode.png"
QUERIES_SHOWN = 8
"""Query images of a class on the contact sheet."""


def curves(run: Path) -> Path:
    """Draws loss, accuracy on training and val episodes, and speed against steps; returns the picture's path."""
    rows = read_metrics(run)
    config = checkpoint.load_model(checkpoint.best(run))[1]
    step = np.array([row["step"] for row in rows])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _line(left, step, rows, "train/loss")
    left.set(xlabel="step", ylabel="loss (-log probability)", title="Training loss")
    _line(middle, step, rows, "train/accuracy", 100)
    evaluated = [row for row in rows if "val/accuracy" in row]
    middle.errorbar(
        [row["step"] for row in evaluated],
        [100 * row["val/accuracy"] for row in evaluated],
        [100 * row["val/ci95"] for row in evaluated],
        fmt="o-",
        color="C1",
        capsize=3,
        label=f"val ({config.eval_episodes} episodes, 95 % interval)",
    )
    middle.axhline(100 / config.ways, color="grey", linestyle=":", label="chance")
    middle.set(xlabel="step", ylabel="accuracy (%)", title=f"{config.ways}-way {config.shot}-shot accuracy")
    low, high = middle.get_ylim()
    middle.set_ylim(max(low, -2), min(high, 102))  # the interval of a few episodes can reach beyond 0 or 100 %
    middle.legend(fontsize=8)
    _line(right, step, rows, "speed/episodes_per_s")
    right.set(xlabel="step", ylabel="episodes/s", title="Speed", ylim=(0, 1.05 * right.get_ylim()[1]))
    figure.suptitle(f"{run.name}{_leak(config)}", fontsize=11)
    return _save(figure, run / CURVES)


def _line(axes: Any, step: npt.NDArray[np.int64], rows: list[dict[str, Any]], key: str, scale: float = 1) -> None:
    """The values, pale, and their running mean over a twentieth of the run."""
    values = scale * np.array([row[key] for row in rows])
    window = max(len(values) // 20, 1)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(step, values, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(step[window - 1 :], mean, color="C0", label=f"train (mean of {window} steps)" if window > 1 else "train")


def _leak(config: Config) -> str:
    return " (protocol paper: LEAKS the label)" if config.protocol == "paper" else ""


@torch.no_grad()
def episode(run: Path, bank: ImageBank, index: int = 0) -> Path:
    """Draws episode `index` of the bank's split as the best checkpoint sees it; returns the picture's path.

    A row a class: its support images, then query images framed green where the class is right, red with the class that
    was taken for it where not.
    """
    model, config, _ = checkpoint.load_model(checkpoint.best(run))
    batch = sample_episodes(bank, config, bank.split, index, 1)
    noise = batch.noise if config.protocol == "paper" else None
    guesses = model(batch.support, batch.query, config.ways, noise)[0].argmax(-1).numpy()  # (T,)
    labels, rows = batch.labels[0].numpy(), batch.rows
    names = [bank.classes[c] for c in rows.classes[0]]
    shown = [np.flatnonzero(labels == way)[:QUERIES_SHOWN] for way in range(config.ways)]
    columns = config.shot + max(len(queries) for queries in shown)
    figure, axes = plt.subplots(
        config.ways,
        columns,
        figsize=(max(1.1 * columns + 1.2, 5.2), 1.25 * config.ways + 0.8),  # wide enough for the title
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    support, query = to_pixels(batch.support[0], bank, config), to_pixels(batch.query[0], bank, config)
    for way in range(config.ways):
        for shot in range(config.shot):
            _image(axes[way, shot], support[way * config.shot + shot], names[way] if shot == 0 else "", "black")
        for column, t in enumerate(shown[way], config.shot):
            right = guesses[t] == way
            _image(axes[way, column], query[t], "" if right else names[guesses[t]], "tab:green" if right else "tab:red")
    accuracy = 100 * float((guesses == labels).mean())
    figure.suptitle(
        f"{run.name}{_leak(config)}\nepisode {index} of {bank.split}, {accuracy:.0f} % of {len(labels)} queries right\n"
        f"black: support; of the queries {QUERIES_SHOWN} a class at most, green: right, red: taken for the class above it",
        fontsize=9,
    )
    return _save(figure, run / EPISODE)


def _image(axes: Any, pixels: npt.NDArray[np.float32], title: str, colour: str) -> None:
    axes.set_axis_on()
    axes.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=7, color=colour, pad=2)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
