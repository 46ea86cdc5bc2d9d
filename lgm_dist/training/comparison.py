"""Several evaluations of one checkpoint on the same episodes, with other settings of head, generator and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lgm_dist import checks
from lgm_dist.config import SETTINGS, Config, Split, find_setting, marked
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import draw_rows
from lgm_dist.model import LGMNet
from lgm_dist.training.base_statistics import base_images, fit_head
from lgm_dist.training.embedding import KeptMaps
from lgm_dist.training.evaluation import Evaluation, Score, evaluate
from lgm_dist.training.worker import Worker

Settings = Mapping[str, Any]
"""Settings by flag name, for one row of a comparison."""

_ALL = {"model.head": "class_means", "model.generator": "none"}
_COPIES = {"eval_copies": 5, "eval_flips": True}
_BEST = {"model.pool": 2, "model.power": 0.5, "model.centre": True, "model.shrinkage": 0.8, **_COPIES}
HEADS: tuple[Settings, ...] = (
    _ALL,
    {**_ALL, "model.pool": 1},
    {**_ALL, "model.pool": 1, "model.centre": True},
    {**_ALL, "model.pool": 1, "model.centre": True, "eval_copies": 5},
    {**_ALL, "model.pool": 1, "model.centre": True, **_COPIES},
    {**_ALL, "model.pool": 1, "model.centre": True, **_COPIES, "model.power": 0.5},
    {**_ALL, "model.pool": 1, "model.centre": True, **_COPIES, "model.power": 0.5, "model.shrinkage": 0.5},
    {**_ALL, **_BEST},
    {**_ALL, **_BEST, "model.pool": 3},
    {**_ALL, **_BEST, "model.head": "cnaps"},
    {**_ALL, **_BEST, "model.head": "logistic"},
    {**_ALL, **_COPIES, "model.power": 0.5, "model.head": "ridge"},
)
"""`lgm-dist evaluate --compare heads`: class means with one ingredient after the other, then the other heads."""


@dataclass(frozen=True)
class Row:
    """Evaluations with some settings, one for each cell of ways and shots."""

    settings: Settings
    evaluations: tuple[Evaluation, ...]

    def differences(self, first: Row) -> list[Score]:
        """Accuracy minus that of `first`, paired by episode, of each cell."""
        pairs = zip(self.evaluations, first.evaluations, strict=True)
        return [Score.of(_accuracies(ours) - _accuracies(theirs)) for ours, theirs in pairs]


def _accuracies(evaluation: Evaluation) -> Any:
    return next(iter(evaluation.accuracies.values()))


def read_settings(words: str) -> Settings:
    """The settings of words such as "model.pool=2 eval_flips=true". Raises ValueError for one that cannot be compared."""
    found: dict[str, Any] = {}
    for word in words.split():
        name, _, text = word.partition("=")
        if find_setting(name) and name not in marked("compared"):
            raise ValueError(
                f"compare ({word!r}) cannot change {name}; it can change {', '.join(n for n in SETTINGS if n in marked('compared'))}"
            )
        found[name] = _read(name, text)
    return found


def _read(name: str, text: str) -> Any:
    """`text` as the type of the setting."""
    default = find_setting(name).default
    try:
        value = {"true": True, "false": False}[text] if type(default) is bool else type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(f"compare: {name} ({text!r}) must be of type {type(default).__name__}") from None
    return checks.typed(name, value, default)


def compare(
    model: LGMNet,
    banks: Mapping[Split, ImageBank],
    cells: Sequence[Config],
    rows: Sequence[Settings],
    split: Split,
    episodes: int,
    worker: Worker | None = None,
) -> list[Row]:
    """Evaluate a network as it is, and with the settings of each of `rows`, on the first episodes of a split.

    The backbone embeds each view of an image once for all rows and cells.

    Args:
        model: The network, in evaluation mode, on the worker's device.
        banks: The bank of `split`, and the train split's for the statistics of the base classes.
        cells: Configurations of protocol standard that differ in ways and shots.
        rows: Settings that are marked `compared`.
        split: train, val or test.
        episodes: How many episodes, at least 2.
        worker: This process among those that evaluate together; None for one process.

    Raises ValueError for settings that do not fit the network.
    """
    worker, bank = worker or Worker(), banks[split]
    variants = [(settings, _variant(model, settings)) for settings in ({}, *rows)]  # all are checked before any is evaluated
    drawn = [draw_rows(bank, cell, split, 0, episodes) for cell in cells]
    used = np.concatenate([np.unique(part) for draw in drawn for part in draw[:2]])  # (n,)
    maps = KeptMaps(model, bank, cells[0], used, worker)
    base = KeptMaps(model, banks["train"], cells[0], base_images(banks["train"])[0], worker)
    found = []
    for settings, variant in variants:
        configs = [cell.replace(**settings) for cell in cells]
        fit_head(variant, banks["train"], configs[0], worker, maps=base)
        evaluations = (evaluate(variant, bank, config, split, episodes, 0, worker, maps) for config in configs)
        found.append(Row(settings, tuple(evaluations)))
    return found


def _variant(model: LGMNet, settings: Settings) -> LGMNet:
    """The network with these settings of the group model."""
    generator = settings.get("model.generator", model.config.generator)
    if generator not in (model.config.generator, "none"):
        raise ValueError(
            f"compare: model.generator ({generator!r}) must be none or the network's own, {model.config.generator}; another one "
            "would have to be trained"
        )
    config = Config(model=model.config).replace(**settings).model
    return (model.without_generator() if generator == "none" else model).with_head(config)
