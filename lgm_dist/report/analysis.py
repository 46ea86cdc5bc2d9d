"""What a trained network confuses, and which weights it generates: analysis.json in a run's folder.

    {"split": "val", "step": 300, "protocol": "standard", "episodes": 600, "ways": 5, "shot": 1, "chance": 0.2,
     "accuracy": 0.33, "ci95": 0.004,                over episodes, the same as `evaluate` gives
     "classes": [name, …], "groups": [superclass or "", …],                                        C each
     "confusion": [[count, …], …],                   C x C: queries of class i that were predicted as class j
     "met": [[count, …], …],                         C x C: queries of class i in episodes with class j
     "per_class": [{"class", "group", "accuracy", "ci95", "queries", "episodes"}, …],              C
     "weights": {
        "tasks": [[class name, …], …],               sets of classes: W, at most TASKS
        "supports": 20,                              support sets of each set of classes: R
        "task_of": [index in tasks, …], "noise": ["mean" or "drawn", …], "xy": [[x, y], …],        2 * W * R each
        "silhouette": 0.4, "silhouette_drawn": 0.1,  of the weights (not of xy) by task, with mean noise and drawn noise
        "shuffled_mean": -0.02, "shuffled_highest": 0.01,     of `silhouette`, with the tasks shuffled SHUFFLES times
        "variation": 0.1,                            root mean square distance of the weights from their mean / its norm
        "histogram": {"layer1": {"edges": [101 numbers], "counts": [100], "drawn": [100]}, "layer2": …}}}

Accuracies lie in 0 to 1. The accuracy of a class without queries is null, and so are an interval and a silhouette of too few
values. "weights" is null if the network has no generator or its weights are not finite. Class i can be predicted as class j
only in episodes with both, so confusion / met is the rate to look at. Its chance is the same for all pairs.

The weights illustrate the paper's claim that its network maps training data to functional weights (Li et al., ICML 2019,
abstract; its experiments show that on synthetic data): support sets of the same classes should give similar weights. The
authors' code has no such figure, so this one is our own. A task is the set of classes of one of the first episodes of the
split. Its support sets share no image, so that similar weights come from the classes, not from the images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import draw_noise, draw_rows
from lgm_dist.model import LGMNet
from lgm_dist.runs import checkpoint
from lgm_dist.runs.files import read_json, write_json
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.embedding import embed_images
from lgm_dist.training.evaluation import Score, predictions, protocol_draws
from lgm_dist.training.worker import Worker

ANALYSIS = "analysis.json"
TASKS, SUPPORTS = 10, 20
"""Largest number of sets of classes, and of support sets of each, whose generated weights are compared."""
SHUFFLES, BINS = 99, 100

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


@arithmetic()
def analyse(run: Path, bank: ImageBank) -> dict[str, Any]:
    """Analyse the run's checkpoint with the best val accuracy on the split of `bank`; write and return analysis.json.

    The episodes are those of an evaluation during training: the first eval_episodes episodes of the split. Raises ValueError
    for a run without a checkpoint, or for a bank that is too small for its episodes.
    """
    model, config, state = checkpoint.load_model(checkpoint.best(run))
    ways, shot = config.episode(bank.split)[:2]
    analysis = {
        "split": bank.split,
        "step": state.step,
        "protocol": config.episodes.protocol,
        "episodes": config.episodes.eval_episodes,
        "ways": ways,
        "shot": shot,
        "chance": 1 / ways,
        **_decisions(model, bank, config),
        "weights": _weights(model, bank, config),
    }
    write_json(run / ANALYSIS, analysis, indent=None)
    return analysis


def read_analysis(run: Path) -> dict[str, Any]:
    """The run's analysis.json. Raises ValueError if there is none."""
    try:
        return read_json(run / ANALYSIS)
    except FileNotFoundError:
        raise ValueError(f"{run} has no {ANALYSIS}; lgm-dist train writes it at the end of the run") from None


def _decisions(model: LGMNet, bank: ImageBank, config: Config) -> dict[str, Any]:
    """Which classes were predicted for which, and the accuracy of each class."""
    episodes, n = config.episodes.eval_episodes, len(bank.classes)
    classes = draw_rows(bank, config, bank.split, 0, episodes).classes  # (E, N)
    confusion, met = np.zeros((n, n), np.int64), np.zeros((n, n), np.int64)
    asked, right = np.zeros((episodes, n), np.int64), np.zeros((episodes, n), np.int64)
    for first, log_p, labels in predictions(
        model, bank, config, bank.split, episodes, protocol_draws(config), Worker()
    ):
        index = np.arange(first, first + len(labels))[:, None]  # (B, 1)
        true = classes[index, labels.numpy()]  # (B, T)
        taken = classes[index, log_p[-1].argmax(-1).numpy()]  # (B, T)
        np.add.at(confusion, (true, taken), 1)
        np.add.at(met, (true[..., None], classes[index]), 1)  # (B, T, N)
        np.add.at(asked, (index, true), 1)
        np.add.at(right, (index, true), true == taken)
    score = Score.of(right.sum(1) / asked.sum(1))
    return {
        "accuracy": score.accuracy,
        "ci95": score.ci95,
        "classes": list(bank.classes),
        "groups": list(bank.groups),
        "confusion": confusion.tolist(),
        "met": met.tolist(),
        "per_class": [_class(bank, c, asked[:, c], right[:, c]) for c in range(n)],
    }


def _class(bank: ImageBank, c: int, asked: Counts, right: Counts) -> dict[str, Any]:
    """Accuracy of class c with its 95 % interval, from its queries and its correct queries in each episode (E,).

    Both are over the episodes with the class, not over queries: the queries of an episode share its support images and its
    other classes, so they are correlated, and an interval over queries would be too narrow.
    """
    held = asked > 0
    accuracies = right[held] / asked[held]
    score = Score.of(accuracies) if len(accuracies) > 1 else None
    return {
        "class": bank.classes[c],
        "group": bank.groups[c],
        "accuracy": float(accuracies.mean()) if len(accuracies) else None,
        "ci95": score.ci95 if score else None,
        "queries": int(asked.sum()),
        "episodes": len(accuracies),
    }


@torch.no_grad()
def _weights(model: LGMNet, bank: ImageBank, config: Config) -> dict[str, Any] | None:
    """The generated weights by task, with the noise at its mean and with one draw. The images are not augmented."""
    classes, rows = _tasks(bank, config)  # (W, N), (W, R, S)
    tasks, supports, _ = rows.shape
    unique, positions = np.unique(rows, return_inverse=True)  # (n,)
    codes = embed_images(model, bank, config, unique, Worker())[1]  # (n, E)
    codes = codes[torch.from_numpy(positions.reshape(tasks * supports, -1))]  # (W * R, S, E)
    noise = draw_noise(config, bank.split, 0, tasks * supports, 1)[0]  # (W * R, 2, Z)
    mean, drawn = (model.generator.generate(codes, config.episode(bank.split).ways, n) for n in (None, noise))
    if not mean:
        return None  # generator none
    flat = [torch.cat([part.flatten(1) for layer in w for part in layer], 1).numpy() for w in (mean, drawn)]
    if not all(np.isfinite(w).all() for w in flat):
        return None
    task = np.arange(tasks).repeat(supports)  # (W * R,)
    kernels = {f"layer{i + 1}": (mean[i][0].numpy(), drawn[i][0].numpy()) for i in range(len(mean))}
    centre = flat[0].mean(0)
    return {
        "tasks": [[bank.classes[c] for c in chosen] for chosen in classes],
        "supports": supports,
        "task_of": np.tile(task, 2).tolist(),
        "noise": ["mean"] * len(task) + ["drawn"] * len(task),
        "xy": _in_two_dimensions(np.concatenate(flat)).tolist(),
        **_silhouettes(flat[0], flat[1], task),
        "variation": float(np.sqrt(np.square(flat[0] - centre).sum(1).mean()) / np.linalg.norm(centre)),
        "histogram": {layer: _histogram(*kernel) for layer, kernel in kernels.items()},
    }


def _tasks(bank: ImageBank, config: Config) -> tuple[Counts, Counts]:
    """Different sets of classes (W, N) of the first episodes, and rows of R support sets that share no image (W, R, S)."""
    ways, shot = config.episode(bank.split)[:2]
    supports = min(SUPPORTS, (int(bank.counts.min()) - 1) // shot)  # an episode needs at least one query, too
    wide = config.replace(protocol="standard", shot=supports * shot, query=1, eval_shot=supports * shot, eval_query=1)
    drawn = draw_rows(bank, wide, bank.split, 0, 4 * TASKS)
    _, first = np.unique(np.sort(drawn.classes), axis=0, return_index=True)
    chosen = np.sort(first)[:TASKS]  # (W,)
    rows = drawn.support[chosen].reshape(len(chosen), ways, supports, shot)  # (W, N, R, K)
    return drawn.classes[chosen], rows.swapaxes(1, 2).reshape(len(chosen), supports, -1)


def _in_two_dimensions(weights: Floats) -> Floats:
    """weights (P, D) -> (P, 2): t-SNE of their first 50 principal components."""
    from sklearn.decomposition import PCA  # here, because it takes seconds to import and workers do not need it
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    points = len(weights)
    # The threads wait for each other in t-SNE's many small steps, which take ten times as long on a busy machine.
    with threadpool_limits(1):
        components = min(50, *weights.shape)
        reduced = PCA(components, svd_solver="randomized", random_state=0).fit_transform(weights)  # (P, 50)
        xy: Floats = TSNE(perplexity=min(30, (points - 1) / 3), init="pca", random_state=0).fit_transform(reduced)
    return xy


def _silhouettes(mean: Floats, drawn: Floats, task: Counts) -> dict[str, float | None]:
    """Silhouette scores, at most 1, of how well weights (P, D) cluster by task (P,), and by shuffled tasks, which is chance."""
    from sklearn.metrics import pairwise_distances, silhouette_score

    if not 2 <= len(np.unique(task)) < len(task):
        return dict.fromkeys(("silhouette", "silhouette_drawn", "shuffled_mean", "shuffled_highest"))
    distances = [pairwise_distances(w) for w in (mean, drawn)]  # (P, P)
    for d in distances:
        np.fill_diagonal(d, 0)  # it is 0 except for rounding
    random = np.random.default_rng(0)
    shuffled = [silhouette_score(distances[0], random.permutation(task), metric="precomputed") for _ in range(SHUFFLES)]
    return {
        "silhouette": float(silhouette_score(distances[0], task, metric="precomputed")),
        "silhouette_drawn": float(silhouette_score(distances[1], task, metric="precomputed")),
        "shuffled_mean": float(np.mean(shuffled)),
        "shuffled_highest": float(max(shuffled)),
    }


def _histogram(mean: Floats, drawn: Floats) -> dict[str, list[float]]:
    """Histograms of one layer's kernels over all tasks, with the same bins. Biases have another scale and are left out."""
    edges = np.linspace(min(mean.min(), drawn.min()), max(mean.max(), drawn.max()), BINS + 1)
    counts, drawn_counts = (np.histogram(w, edges)[0].tolist() for w in (mean, drawn))
    return {"edges": edges.tolist(), "counts": counts, "drawn": drawn_counts}
