"""Probabilities that mean something: a temperature, and a threshold of "none of these", fitted on val episodes.

An episode of calibration has N classes with K support images each, queries of these classes, and queries of other classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.model import LGMNet
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.comparison import shared_maps
from lgm_dist.training.embedding import Maps
from lgm_dist.training.evaluation import embed_each_image_once, on_vectors
from lgm_dist.training.reliability import Reliability, auroc, reliability
from lgm_dist.training.worker import Worker

Size = tuple[int, int]
"""Ways and shots of episodes."""
EPISODES = 600
SHOTS = (1, 5)
RATE = 0.05
"""The share of photos of known classes that may be called "none of these"."""
RATES = tuple(step / 100 for step in range(51))
"""The shares whose thresholds are kept."""
SCORES = ("probability", "similarity", "margin", "energy")
"""Scores of how well a query fits the classes. probability: the largest one. similarity: the largest logit, which is a cosine
times a constant under the head class_means. margin: the largest logit minus the second. energy: logsumexp of the logits."""
_BETAS = (1e-3, 1e3)
"""Bounds of 1 / temperature."""


@dataclass(frozen=True)
class Cell:
    """What was fitted to episodes of one size."""

    ways: int
    shot: int
    episodes: int
    temperature: float
    """Logits are divided by it."""
    error: float
    """Expected calibration error of the queries that it was fitted to, with the temperature."""
    error_before: float
    """The same without it."""
    thresholds: tuple[float, ...]
    """Scores below which the shares RATES of queries of the episode's classes lie; empty if there were no other classes."""
    auroc: Mapping[str, float]
    """Of each of SCORES: how well it tells queries of the episode's classes from those of other classes."""


@dataclass(frozen=True)
class Calibration:
    """Temperatures and thresholds for episodes of several sizes, and the score that the thresholds are of."""

    score: str
    """The one of SCORES with the largest mean AUROC; empty if there were no other classes."""
    cells: tuple[Cell, ...]

    def temperature(self, ways: int, shot: float) -> float:
        """The temperature for so many classes and images a class, between those of the cells (see `_between`)."""
        return math.exp(self._between(ways, shot, [math.log(cell.temperature) for cell in self.cells]))

    def threshold(self, ways: int, shot: float, rate: float = RATE) -> float | None:
        """The score below which a photo is "none of these", for a false-alarm rate; None if it is not known.

        Raises ValueError for a rate that is not above 0 and at most 0.5.
        """
        if not RATES[0] < rate <= RATES[-1]:
            raise ValueError(f"unknown_rate ({rate}) must be above 0 and at most {RATES[-1]:g}; 0.05 is usual")
        if not self.score:
            return None
        return self._between(ways, shot, [float(np.interp(rate, RATES, cell.thresholds)) for cell in self.cells])

    def _between(self, ways: int, shot: float, values: Sequence[float]) -> float:
        """The value at this size: of the cells with the nearest ways, linear in log(shot), constant outside of them."""
        nearest = min((cell.ways for cell in self.cells), key=lambda n: abs(math.log(n / ways)))
        known = sorted((math.log(c.shot), v) for c, v in zip(self.cells, values, strict=True) if c.ways == nearest)
        return float(np.interp(math.log(shot), [place for place, _ in known], [value for _, value in known]))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, which `from_dict` reads, also after JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """Read what `to_dict` wrote. Raises ValueError, TypeError or LookupError for anything else."""
        cells = tuple(Cell(**{**cell, "thresholds": tuple(cell["thresholds"])}) for cell in values["cells"])
        numbers = [x for c in cells for x in (c.temperature, c.ways, c.shot, *c.thresholds)]
        sizes = {len(c.thresholds) for c in cells}
        score = values["score"]
        if (
            not cells
            or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
            or min(min(c.temperature, c.ways, c.shot) for c in cells) <= 0
            or score not in ("", *SCORES)
            or (score and sizes != {len(RATES)})
        ):
            raise ValueError("the calibration has values out of range")
        return cls(score, cells)


@torch.no_grad()
@arithmetic()
def calibrate(
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    shots: Sequence[int] = SHOTS,
    ways: Sequence[int] = (),
    episodes: int = EPISODES,
    device: str = "cpu",
) -> Calibration:
    """Fit temperatures and thresholds on the first episodes of a bank, usually that of the val split.

    Args:
        model: The network, in evaluation mode, on `device`.
        bank: The images.
        config: Gives the episodes' queries and seed, and the views of images.
        shots: Images a class. Those that some class has too few images for are left out.
        ways: Classes of the episodes (default: those of the config's own episodes).
        episodes: How many episodes of each size.
        device: Where to compute.

    Raises ValueError for protocol paper, and if the bank is too small for the episodes.
    """
    answers = _all_answers(model, bank, config, shots, ways, episodes, Worker(device=device))
    return _fitted(answers, episodes)


@dataclass(frozen=True)
class Measured:
    """How good a calibration is on episodes of one size."""

    ways: int
    shot: int
    reliability: Reliability
    """With the calibration's temperature."""
    error_before: float
    """Expected calibration error without it."""
    auroc: Mapping[str, float]
    """Of each of SCORES; empty if there were no other classes."""
    false_alarms: float | None
    """Share of queries of the episode's classes that are called unknown; None without thresholds."""
    found: float | None
    """Share of queries of other classes that are called unknown."""


@torch.no_grad()
@arithmetic()
def measure(
    calibration: Calibration,
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    shots: Sequence[int] = SHOTS,
    ways: Sequence[int] = (),
    episodes: int = EPISODES,
    device: str = "cpu",
    rate: float = RATE,
) -> list[Measured]:
    """Measure a calibration on episodes of another bank, such as the test split; see `calibrate` for the arguments."""
    answers = _all_answers(model, bank, config, shots, ways, episodes, Worker(device=device))
    return [_measured(calibration, size, a, rate) for size, a in answers.items()]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the negative log-likelihood of logits (n, N), divided by it, for labels (n,).

    The likelihood is concave in 1 / temperature, so its slope is 0 at one place, which is found by bisection.
    """
    z = logits.double()
    right = z.gather(1, labels[:, None])[:, 0]  # (n,)
    low, high = (math.log(beta) for beta in _BETAS)
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * z).softmax(-1) * z).sum(-1)  # (n,)
        low, high = (low, middle) if float((expected - right).mean()) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def score_of(name: str, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """One of SCORES for each of the logits (n, N) -> (n,)."""
    if name == "probability":
        return (logits / temperature).softmax(-1).amax(-1)  # (n,)
    if name == "similarity":
        return logits.amax(-1)  # (n,)
    if name == "margin":
        first, second = logits.topk(2, dim=-1).values.unbind(-1)  # (n,) each
        return first - second
    assert name == "energy", name
    return temperature * (logits / temperature).logsumexp(-1)  # (n,)


class _Answers(NamedTuple):
    """Logits of the queries of all episodes of one size."""

    inside: Tensor
    """(n, N): of queries of the episode's classes."""
    labels: Tensor
    """(n,)"""
    outside: Tensor
    """(m, N): of queries of other classes."""


def _all_answers(
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    shots: Sequence[int],
    ways: Sequence[int],
    episodes: int,
    worker: Worker,
) -> dict[Size, _Answers]:
    """The answers of each size of episodes, by (ways, shot). Raises ValueError for protocol paper."""
    if config.episodes.protocol == "paper":
        raise ValueError(
            "calibration needs protocol standard: paper leaks the label, and its probabilities with it; leave it out"
        )
    own = config.episode(bank.split)
    fitting = [k for k in sorted(set(shots)) if k + own.query <= bank.counts.min()] or [own.shot]
    wider = {(n, k): _wider(config, bank, n, k) for n in ways or (own.ways,) for k in fitting}
    maps = shared_maps(model, bank, list(wider.values()), episodes, worker)
    return {size: _answers(model, bank, w, size, episodes, worker, maps) for size, w in wider.items()}


def _wider(config: Config, bank: ImageBank, ways: int, shot: int) -> Config:
    """Episodes with up to as many classes again: the first `ways` are those of the episode, the others are outside of it."""
    return config.replace(eval_ways=max(min(2 * ways, len(bank.classes)), ways), eval_shot=shot)


def _answers(
    model: LGMNet, bank: ImageBank, wider: Config, size: Size, episodes: int, worker: Worker, maps: Maps
) -> _Answers:
    ways, shot = size
    images = ways * shot
    inside, outside, labels, network = [], [], [], on_vectors(model)
    for _, features, codes, label in embed_each_image_once(model, bank, wider, bank.split, episodes, worker, maps):
        queries = features[:, codes.shape[1] :]  # (B, T, F, h, w)
        both = torch.cat([features[:, :images], queries], 1)  # (B, N * K + T, F, h, w)
        logits = network.logits(both, codes[:, :images], [shot] * ways).cpu()  # (B, T, N)
        known = (label < ways).cpu()  # (B, T)
        inside.append(logits[known])
        outside.append(logits[~known])
        labels.append(label.cpu()[known])
    return _Answers(torch.cat(inside), torch.cat(labels), torch.cat(outside))


def _fitted(answers: Mapping[Size, _Answers], episodes: int) -> Calibration:
    """The calibration of these answers, with the score that has the largest mean AUROC."""
    temperatures = [fit_temperature(a.inside, a.labels) for a in answers.values()]
    pairs = list(zip(answers.values(), temperatures, strict=True))
    aurocs = [_aurocs(a, t) for a, t in pairs]
    score = max(SCORES, key=lambda name: sum(found[name] for found in aurocs)) if all(aurocs) else ""
    cells = []
    for (ways, shot), (a, t), found in zip(answers, pairs, aurocs, strict=True):
        scores = score_of(score, a.inside, t).double().numpy() if score else None
        thresholds = () if scores is None else tuple(np.quantile(scores, RATES).tolist())
        cells.append(Cell(ways, shot, episodes, t, _error(a, t), _error(a, 1.0), thresholds, found))
    return Calibration(score, tuple(cells))


def _aurocs(answers: _Answers, temperature: float) -> dict[str, float]:
    """The AUROC of each of SCORES; empty without queries of other classes."""
    if not len(answers.outside):
        return {}
    inside, outside = ({name: score_of(name, x, temperature).numpy() for name in SCORES} for x in answers[::2])
    return {name: auroc(inside[name], outside[name]) for name in SCORES}


def _measured(calibration: Calibration, size: Size, answers: _Answers, rate: float) -> Measured:
    ways, shot = size
    temperature, threshold = calibration.temperature(ways, shot), calibration.threshold(ways, shot, rate)
    aurocs = _aurocs(answers, temperature)
    shares: list[float | None] = [None, None]
    if threshold is not None and aurocs:
        scores = [score_of(calibration.score, logits, temperature) for logits in (answers.inside, answers.outside)]
        shares = [float((score < threshold).double().mean()) for score in scores]
    return Measured(ways, shot, _reliability(answers, temperature), _error(answers, 1.0), aurocs, *shares)


def _error(answers: _Answers, temperature: float) -> float:
    """The expected calibration error with this temperature."""
    return _reliability(answers, temperature).error


def _reliability(answers: _Answers, temperature: float) -> Reliability:
    confidence, guesses = (answers.inside / temperature).softmax(-1).max(-1)  # (n,) each
    return reliability(confidence.numpy(), (guesses == answers.labels).numpy())
