"""Evaluation on the episodes of a split, with a 95 % confidence interval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from lgm_dist.config import Config, Split
from lgm_dist.console import percent
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import draw_noise, draw_rows, sample_episodes
from lgm_dist.model import LGMNet
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.embedding import IMAGES_AT_ONCE, KeptMaps, Maps, embed_images, pieces
from lgm_dist.training.worker import Worker

METHODS = (("mean noise",), ("single draw",), ("single draw", "vote", "mean probability"))
"""How an evaluation with 0, 1 or more noise draws decides. The single draw is the last one, as in the authors' code."""


@dataclass(frozen=True)
class Score:
    """Mean accuracy over episodes with the half-width of its 95 % interval, both in 0 to 1."""

    accuracy: float
    ci95: float

    @classmethod
    def of(cls, accuracies: npt.NDArray[np.float64]) -> Score:
        """accuracies (episodes,): 1.96 * std(ddof=1) / sqrt(episodes)."""
        half_width = 1.96 * accuracies.std(ddof=1) / len(accuracies) ** 0.5
        return cls(float(accuracies.mean()), float(half_width))

    def __str__(self) -> str:
        return percent(self.accuracy, self.ci95)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on the first `episodes` episodes of a split."""

    split: Split
    protocol: str
    ways: int
    shot: int
    episodes: int
    draws: int
    """Noise draws of the generated weights; 0: noise at its mean."""
    scores: dict[str, Score]
    """By method (see METHODS), the protocol's own first."""
    accuracies: dict[str, npt.NDArray[np.float64]]
    """For each of `scores`, the accuracy of every episode (episodes,)."""

    @property
    def score(self) -> Score:
        """With the noise at its mean, or of a single draw."""
        return next(iter(self.scores.values()))


@torch.no_grad()
@arithmetic()
def evaluate(
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    split: Split,
    episodes: int,
    draws: int | None = None,
    worker: Worker | None = None,
    maps: Maps | None = None,
) -> Evaluation:
    """Evaluate `model` on the first episodes of a split.

    Features are computed once for all draws and, under protocol standard, once for all episodes. All workers call this
    together and get the same result. The mode of the model (training or evaluation) stays as it was.

    Args:
        model: The network, on the worker's device.
        bank: The images of the split.
        config: Gives the protocol and the episodes' size, `config.episode(split)`.
        split: train, val or test.
        episodes: How many episodes, at least 2.
        draws: Noise draws of the generated weights. 0 is the noise at its mean; None is the protocol's own number, 0 under
            standard and 1 under paper.
        worker: This process among those that evaluate together; None for one process.
        maps: The backbone's maps of the bank's images, if they are known already (protocol standard).
    """
    worker = worker or Worker()
    draws = protocol_draws(config) if draws is None else draws
    methods, shape = METHODS[min(draws, 2)], config.episode(split)
    hits = torch.zeros(len(methods), episodes, dtype=torch.float64, device=worker.device)
    was_training = model.training
    for first, log_p, labels in predictions(model.eval(), bank, config, split, episodes, draws, worker, maps):
        hits[:, first : first + len(labels)] = _hits(log_p, labels, draws)
    model.train(was_training)
    accuracies = dict(zip(methods, worker.sum(hits).cpu().numpy(), strict=True))
    scores = {method: Score.of(values) for method, values in accuracies.items()}
    return Evaluation(split, config.episodes.protocol, shape.ways, shape.shot, episodes, draws, scores, accuracies)


def protocol_draws(config: Config) -> int:
    """Noise draws with which the protocol evaluates: 0 (the noise at its mean) under standard, 1 under paper."""
    return 1 if config.episodes.protocol == "paper" else 0


@torch.no_grad()
def predictions(
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    split: Split,
    episodes: int,
    draws: int,
    worker: Worker,
    maps: Maps | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The predictions of `model`, which is in evaluation mode, for this worker's slice of the first episodes of a split.

    Yields, for consecutive episodes, the number of the first, the log-probabilities (M, B, T, N) of M = max(draws, 1) noise
    draws, and the labels (B, T).
    """
    standard = config.episodes.protocol == "standard"
    embed = partial(embed_each_image_once, maps=maps) if standard else _embed_episodes
    network = model if not standard else on_vectors(model)
    ways = config.episode(split).ways
    for first, features, codes, labels in embed(model, bank, config, split, episodes, worker):
        noise = draw_noise(config, split, first, len(labels), draws).to(worker.device) if draws else [None]
        log_p = [network.classify(features, codes, ways, n) for n in noise]
        yield first, torch.stack(log_p), labels


def _hits(log_p: Tensor, labels: Tensor, draws: int) -> Tensor:
    """log_p (M, B, T, N), labels (B, T) -> accuracy of each episode by each method (methods, B), in float64."""
    guesses = log_p.argmax(-1)  # (M, B, T)
    if draws < 2:
        return (guesses == labels).double().mean(-1)  # (1, B)
    # as in the authors' code, a tie goes to the smallest label
    votes = F.one_hot(guesses, log_p.shape[-1]).sum(0).argmax(-1)  # (B, T)
    mean = log_p.exp().mean(0).argmax(-1)  # (B, T)
    return (torch.stack([guesses[-1], votes, mean]) == labels).double().mean(-1)  # (3, B)


Embedded = Iterator[tuple[int, Tensor, Tensor, Tensor]]
"""First episode, feature maps (B, S + T, F, h, w), codes of the support images (B, S, E) and labels (B, T) of consecutive
episodes."""


def on_vectors(model: LGMNet) -> LGMNet:
    """The network that takes what `embed_each_image_once` yields: `model`, or the part of it after its vectors."""
    split_off = model.on_vectors()
    return model if split_off is None else split_off[1]


def embed_each_image_once(
    model: LGMNet, bank: ImageBank, config: Config, split: Split, episodes: int, worker: Worker, maps: Maps | None
) -> Embedded:
    """Embed each image once, by one of the workers: it is the same in all episodes.

    With copies, an image that is a support image here and a query there has two embeddings. The feature maps and codes are
    those of `on_vectors(model)`.
    """
    copies, images = config.episodes.eval_copies, len(bank.images)
    everything = draw_rows(bank, config, split, 0, episodes)
    keys = np.concatenate([everything.support + (images if copies else 0), everything.query], axis=1)  # (E, S + T)
    unique, positions = np.unique(keys, return_inverse=True)  # (n,), (E, S + T)
    plain = int(np.searchsorted(unique, images))
    if copies and maps is None:  # the views that both embeddings of an image have are embedded once
        maps = KeptMaps(model, bank, config, unique % images, worker)
    found = embed_images(model, bank, config, unique[:plain], worker, 0, maps)
    if copies:
        copied = embed_images(model, bank, config, unique[plain:] - images, worker, copies, maps)
        found = torch.cat([found[0], copied[0]]), torch.cat([found[1], copied[1]])
    features, codes = found  # (n, F, h, w), (n, E)
    if (split_off := model.on_vectors()) is not None:
        vectors, network = split_off
        parts = [vectors(part[None])[0][..., None, None] for part in features.split(IMAGES_AT_ONCE)]
        features, codes = torch.cat(parts), torch.cat([network.generator.encode(part, 1) for part in parts])
    labels, where = torch.from_numpy(everything.labels), torch.from_numpy(positions.reshape(keys.shape))
    for first, last in pieces(worker.slice_of(0, episodes), keys.shape[1]):
        index = where[first:last].to(worker.device)  # (B, S + T)
        support = codes[index[:, : everything.support.shape[1]]]  # (B, S, E)
        yield first, features[index], support, labels[first:last].to(worker.device)


def _embed_episodes(
    model: LGMNet, bank: ImageBank, config: Config, split: Split, episodes: int, worker: Worker
) -> Embedded:
    """Embed the images of each episode anew: protocol paper rotates them."""
    ways, shot = config.episode(split)[:2]
    images = ways * shot + 1
    for first, last in pieces(worker.slice_of(0, episodes), images):
        batch = sample_episodes(bank, config, split, first, last - first).to(worker.device)
        both = torch.cat([batch.support, batch.query], dim=1)  # (B, S + T, C, H, W)
        features, codes = (x.unflatten(0, (last - first, images)) for x in model.embed(both.flatten(0, 1)))
        yield first, features, codes[:, : images - 1], batch.labels  # (B, S + T, F, h, w), (B, S, E), (B, T)
