"""The pictures in a run's folder: training curves, one episode with its predictions, confusion and accuracy of the classes,
and generated weights."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Patch

from lgm_dist.config import Config
from lgm_dist.console import percent
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import draw_rows, sample_episodes, to_pixels
from lgm_dist.report.analysis import read_analysis
from lgm_dist.runs import checkpoint
from lgm_dist.runs.folder import read_config
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.training.evaluation import predictions, protocol_draws
from lgm_dist.training.worker import Worker

CURVES, EPISODE, CONFUSION, WEIGHTS = "curves.png", "episode.png", "confusion.png", "weights.png"
QUERIES_SHOWN = 8
"""Largest number of query images of a class in the picture of an episode."""


def curves(run: Path) -> Path:
    """Draw loss, accuracy on training and val episodes, and speed against steps; return the picture's path."""
    rows = read_metrics(run)
    config = read_config(run)
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
        label=f"val ({config.episodes.eval_episodes} episodes, 95 % interval)",
    )
    _chance(middle, config)
    middle.set(xlabel="step", ylabel="accuracy (%)", title=_episodes(config))
    low, high = middle.get_ylim()
    middle.set_ylim(max(low, -2), min(high, 102))  # the interval of a few episodes can reach beyond 0 or 100 %
    middle.legend(fontsize=8)
    _speed(right, rows)
    figure.suptitle(f"{run.name}{_leak(config.episodes.protocol)}", fontsize=11)
    return _save(figure, run / CURVES)


def _speed(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Episodes/s or images/s; both if the run has stages of both."""
    keys = sorted({key for row in rows for key in row if key.startswith("speed/")})
    for number, key in enumerate(keys):
        timed = [row for row in rows if key in row]
        _line(axes, np.array([row["step"] for row in timed]), timed, key, colour=f"C{number}")
    units = " and ".join(key.removeprefix("speed/").replace("_per_", "/") for key in keys)
    axes.set(xlabel="step", ylabel=units, title="Speed", ylim=(0, 1.05 * axes.get_ylim()[1]))


def _line(
    axes: Any,
    step: npt.NDArray[np.int64],
    rows: list[dict[str, Any]],
    key: str,
    scale: float = 1,
    colour: str = "C0",
) -> None:
    """The values in a pale colour, and their running mean over a twentieth of the run."""
    values = scale * np.array([row[key] for row in rows])
    window = max(len(values) // 20, 1)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(step, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(
        step[window - 1 :], mean, color=colour, label=f"train (mean of {window} steps)" if window > 1 else "train"
    )


def _chance(axes: Any, config: Config) -> None:
    val = config.episode("val").ways
    if "pretraining" in config.run.stages:
        axes.axhline(100 / val, color="C1", linestyle=":", label="chance, val")
    elif val == config.episodes.ways:
        axes.axhline(100 / val, color="grey", linestyle=":", label="chance")
    else:
        axes.axhline(100 / config.episodes.ways, color="C0", linestyle=":", label="chance, train")
        axes.axhline(100 / val, color="C1", linestyle=":", label="chance, val")


def _episodes(config: Config) -> str:
    if "pretraining" in config.run.stages:
        ways, shot = config.episode("val")[:2]
        return f"Accuracy, train on base classes, val {ways}-way {shot}-shot"
    train, val = (f"{e.ways}-way {e.shot}-shot" for e in (config.episode("train"), config.episode("val")))
    return f"{train} accuracy" if train == val else f"Accuracy, train {train}, val {val}"


def _leak(protocol: str) -> str:
    return " (protocol paper: LEAKS the label)" if protocol == "paper" else ""


@torch.no_grad()
def episode(run: Path, bank: ImageBank, index: int = 0) -> Path:
    """Draw episode `index` of the bank's split with the predictions of the best checkpoint; return the picture's path.

    Each class has a row: its support images, then query images. A correct query has a green frame; a wrong one has a red frame
    and the predicted class above it.
    """
    model, config, _ = checkpoint.load_model(checkpoint.best(run))
    ways, shot = config.episode(bank.split)[:2]
    batch = sample_episodes(bank, config, bank.split, index, 1)
    every = predictions(model, bank, config, bank.split, index + 1, protocol_draws(config), Worker())
    guesses = list(every)[-1][1][-1, -1].argmax(-1).numpy()  # (T,)
    labels = batch.labels[0].numpy()
    names = [bank.classes[c] for c in draw_rows(bank, config, bank.split, index, 1).classes[0]]
    shown = [np.flatnonzero(labels == way)[:QUERIES_SHOWN] for way in range(ways)]
    columns = shot + max(len(queries) for queries in shown)
    figure, axes = plt.subplots(
        ways,
        columns,
        figsize=(max(1.1 * columns + 1.2, 5.2), 1.25 * ways + 0.8),  # wide enough for the title
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    support, query = to_pixels(batch.support[0], bank, config), to_pixels(batch.query[0], bank, config)
    for way in range(ways):
        for place in range(shot):
            _image(axes[way, place], support[way * shot + place], names[way] if place == 0 else "", "black")
        for column, t in enumerate(shown[way], shot):
            right = guesses[t] == way
            _image(axes[way, column], query[t], "" if right else names[guesses[t]], "tab:green" if right else "tab:red")
    accuracy = 100 * float((guesses == labels).mean())
    figure.suptitle(
        f"{run.name}{_leak(config.episodes.protocol)}\n"
        f"episode {index} of {bank.split}: {accuracy:.0f} % of {len(labels)} queries correct\n"
        f"black: support image; green: correct query; red: wrong query under its predicted class, {QUERIES_SHOWN} a class",
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


def confusion(run: Path) -> Path:
    """Draw which classes are predicted for which, and the accuracy of each, from analysis.json; return the picture's path.

    The rate in a cell is over the queries of the row's class in episodes with the column's class, so that chance is the same in
    all cells. A cell is grey if no episode has both. Classes are ordered by group.
    """
    analysis = read_analysis(run)
    order = sorted(range(len(analysis["classes"])), key=lambda c: analysis["groups"].index(analysis["groups"][c]))
    names, groups = ([analysis[key][c] for c in order] for key in ("classes", "groups"))
    taken, met = (np.array(analysis[key])[np.ix_(order, order)] for key in ("confusion", "met"))
    side = min(max(0.24 * len(order), 3.5), 16)  # inches
    size = min(max(60 * side / len(order), 2), 9)  # of the letters
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(2 * side + 2, side + 2.2), layout="constrained", width_ratios=(1.15, 1)
    )
    _rates(left, figure, 100 * np.ma.masked_array(taken, met == 0) / np.maximum(met, 1), 100 * analysis["chance"])
    _bars(right, [analysis["per_class"][c] for c in order], groups, analysis)
    left.set_xticks(range(len(order)), names, rotation=90, fontsize=size)
    for axes in (left, right):
        axes.set_yticks(range(len(order)), names, fontsize=size)
        for edge in (i - 0.5 for i in range(1, len(order)) if groups[i] != groups[i - 1]):
            axes.axhline(edge, color="black", linewidth=0.8)
            if axes is left:
                axes.axvline(edge, color="black", linewidth=0.8)
    figure.suptitle(
        f"{run.name}{_leak(analysis['protocol'])}\n{analysis['ways']}-way {analysis['shot']}-shot on {analysis['split']}: "
        f"{percent(analysis['accuracy'], analysis['ci95'])} of queries correct ({analysis['episodes']:,} episodes)",
        fontsize=11,
    )
    return _save(figure, run / CONFUSION)


def _rates(axes: Any, figure: Any, rates: Any, chance: float) -> None:
    """A heat map of percentages (C, C), white at chance."""
    image = axes.imshow(rates, cmap="RdBu_r", norm=TwoSlopeNorm(chance, 0, max(rates.max(), chance + 1)))
    axes.set_facecolor("grey")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title("Predictions, if both classes were in the episode; white: chance", fontsize=10)
    figure.colorbar(image, ax=axes, label="% of the queries of the true class", shrink=0.8)


def _bars(axes: Any, classes: list[dict[str, Any]], groups: list[str], analysis: dict[str, Any]) -> None:
    """Accuracy of each class with its interval, in one colour per group."""
    accuracy, ci95 = ([100 * (entry[key] or 0) for entry in classes] for key in ("accuracy", "ci95"))
    named = list(dict.fromkeys(groups))
    colours = [f"C{named.index(group) % 10}" for group in groups]
    axes.barh(range(len(classes)), accuracy, xerr=ci95, color=colours, ecolor="black", error_kw={"linewidth": 0.8})
    chance = axes.axvline(100 * analysis["chance"], color="black", linestyle=":", label="chance")
    patches = [Patch(color=f"C{i % 10}", label=group) for i, group in enumerate(named) if group]
    axes.legend(handles=[chance, *patches], fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    axes.set(xlabel="accuracy (%), 95 % interval over episodes", ylim=(len(classes) - 0.5, -0.5), xlim=(0, None))
    axes.set_title("Accuracy of each class", fontsize=10)


def weights(run: Path) -> Path:
    """Draw the generated weights from analysis.json, an embedding and histograms; return the picture's path."""
    analysis = read_analysis(run)
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(f"{run.name}{_leak(analysis['protocol'])}: generated weights", fontsize=11)
    if analysis["weights"] is None:
        figure.text(
            0.5, 0.5, "no generated weights: the network has no generator, or its weights are not finite", ha="center"
        )
        return _save(figure, run / WEIGHTS)
    rows = [["xy", layer] for layer in analysis["weights"]["histogram"]]
    axes = figure.subplot_mosaic(rows, width_ratios=(1.5, 1))
    _embedding(axes["xy"], analysis["weights"])
    for layer, histogram in analysis["weights"]["histogram"].items():
        edges = histogram["edges"]
        axes[layer].stairs(histogram["counts"], edges, fill=True, alpha=0.4, label="noise at its mean")
        axes[layer].stairs(histogram["drawn"], edges, color="C1", label="sampled noise")
        axes[layer].set(yscale="log", ylabel="count", xlabel="weight")
        axes[layer].set_title(f"Kernels of generated {layer[:5]} {layer[5:]}", fontsize=10)
        axes[layer].legend(fontsize=7)
    return _save(figure, run / WEIGHTS)


def _embedding(axes: Any, analysis: dict[str, Any]) -> None:
    """One point per support set, one colour per set of classes."""
    xy, task, noise = (np.array(analysis[key]) for key in ("xy", "task_of", "noise"))
    for number, names in enumerate(analysis["tasks"]):
        mean, drawn = (xy[(task == number) & (noise == kind)] for kind in ("mean", "drawn"))
        axes.scatter(*mean.T, s=28, color=f"C{number}", label=textwrap.shorten(", ".join(names), 52, placeholder=" …"))
        axes.scatter(*drawn.T, s=28, facecolors="none", edgecolors=f"C{number}", linewidths=0.7)
    axes.set(xticks=[], yticks=[])
    axes.set_title(
        f"t-SNE; one colour for each set of classes, {analysis['supports']} support sets of each\n"
        f"filled: noise at its mean; hollow: sampled noise; weights vary by {100 * analysis['variation']:.1f} % of their norm\n"
        f"silhouette by classes: {_silhouette(analysis)}",
        fontsize=9,
    )
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.01), ncols=2, frameon=False)


def _silhouette(analysis: dict[str, Any]) -> str:
    if analysis["silhouette"] is None:
        return "too few sets of classes or support sets"
    at = "{silhouette:.2f} (sampled noise {silhouette_drawn:.2f}); with shuffled classes {shuffled_mean:.2f}"
    return (at + ", at most {shuffled_highest:.2f}").format(**analysis)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
