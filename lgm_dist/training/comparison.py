"""Several evaluations of one checkpoint on the same episodes, with other settings of head, generator and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lgm_dist.config import SETTINGS, Config, find_setting, marked
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import draw_rows
from lgm_dist.model import LGMNet
from lgm_dist.model.controls import with_other_context
from lgm_dist.training.base_statistics import base_images, fit_head
from lgm_dist.training.embedding import KeptMaps
from lgm_dist.training.evaluation import Evaluation, Score, evaluate
from lgm_dist.training.worker import Worker

Settings = Mapping[str, Any]
"""Settings by flag name, for one row of a comparison; CONTEXT too."""

CONTEXT = "context"
"""other: each episode gets the weights that another episode's support images generate. own: its own."""

_PLAIN = {name: place.default for name, place in SETTINGS.items() if name in marked("compared")}
"""What a comparison can change, at its default."""
_ALL = {**_PLAIN, "model.head": "class_means", "model.generator": "none"}
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
    {**_ALL, **_BEST, "model.pool": 3, "model.rotations": 4},
    {**_ALL, **_BEST, "model.pool": 3, "model.rotations": 4, "model.blocks": 2},
    {**_ALL, **_BEST, "model.pool": 3, "model.rotations": 4, "model.blocks": 2, "model.generator": "base_directions"},
    {**_ALL, **_BEST, "model.head": "cnaps"},
    {**_ALL, **_BEST, "model.head": "logistic"},
    {**_ALL, **_COPIES, "model.power": 0.5, "model.head": "ridge"},
)
"""`lgm-dist evaluate --compare heads`: class means with one ingredient after the other, then the other heads."""
CONTROLS: tuple[Settings, ...] = ({"model.generator": "none"}, {CONTEXT: "other"})
"""`lgm-dist evaluate --compare controls`: what generated weights add, and whether they depend on the episode."""
_LISTS = {"heads": HEADS, "controls": CONTROLS}


@dataclass(frozen=True)
class Row:
    """Evaluations with some settings, one for each cell of ways and shots."""

    settings: Settings
    evaluations: tuple[Evaluation, ...]

    def differences(self, first: Row) -> list[Score]:
        """Accuracy minus that of `first`, paired by episode, of each cell."""
        pairs = zip(self.evaluations, first.evaluations, strict=True)
        return [Score.of(_of_episodes(ours) - _of_episodes(theirs)) for ours, theirs in pairs]

    def __str__(self) -> str:
        shown = self.settings
        if shown.keys() == _PLAIN.keys():  # a row of HEADS, which inherits nothing from the run
            kept = {"model.head": "", "model.generator": "none"}
            shown = {name: value for name, value in shown.items() if value != kept.get(name, _PLAIN[name])}
        return " ".join(f"{name}={str(value).lower()}" for name, value in shown.items()) or "as trained"


def compare(
    model: LGMNet,
    bank: ImageBank,
    base: ImageBank,
    cells: Sequence[Config],
    rows: Sequence[Settings],
    episodes: int,
    draws: int | None = None,
    worker: Worker | None = None,
) -> list[Row]:
    """Evaluate a network as it is, and with the settings of each of `rows`, on the first episodes of a bank's split.

    The backbone embeds each view of an image once for all rows and cells.

    Args:
        model: The network, in evaluation mode, on the worker's device.
        bank: The images of the episodes.
        base: The images of the base classes, for the statistics that heads need.
        cells: Configurations that differ in ways and shots.
        rows: Settings that are marked `compared`.
        episodes: How many episodes, at least 2.
        draws: Noise draws of the generated weights, as for `evaluate`.
        worker: This process among those that evaluate together; None for one process.

    Raises ValueError for protocol paper and for settings that do not fit the network.
    """
    if any(cell.episodes.protocol == "paper" for cell in cells):
        raise ValueError(
            "compare needs protocol standard, whose images are the same in all episodes; add --protocol standard"
        )
    worker = worker or Worker()
    # all of them, before the first takes its time
    variants = [(settings, _variant(model, settings)) for settings in ({}, *rows)]
    maps = shared_maps(model, bank, cells, episodes, worker)
    base_maps = KeptMaps(model, base, cells[0], base_images(base)[0], worker)
    found = []
    for settings, variant in variants:
        configs = [cell.replace(**_of_config(settings)) for cell in cells]
        if settings:
            fit_head(variant, base, configs[0], worker, maps=base_maps)
        if settings.get(CONTEXT) == "other":  # after the statistics of its generator
            variant = with_other_context(variant)
        evaluations = [evaluate(variant, bank, c, bank.split, episodes, draws, worker, maps) for c in configs]
        found.append(Row(settings, tuple(evaluations)))
    return found


def shared_maps(model: LGMNet, bank: ImageBank, cells: Sequence[Config], episodes: int, worker: Worker) -> KeptMaps:
    """The maps of all images of the first episodes of the cells (protocol standard), for evaluations that share them."""
    drawn = [draw_rows(bank, cell, bank.split, 0, episodes) for cell in cells]
    used = np.concatenate([np.unique(part) for draw in drawn for part in (draw.support, draw.query)])  # (n,)
    return KeptMaps(model, bank, cells[0], used, worker)


def rows_of(texts: Sequence[str]) -> list[Settings]:
    """The rows of `--compare`: "heads", "controls", or settings as in "model.pool=2 eval_flips=true".

    Raises ValueError for a setting that a comparison cannot change, or a value of another type.
    """
    return [row for text in texts for row in (_LISTS[text] if text in _LISTS else [_settings_of(text)])]


def _settings_of(text: str) -> Settings:
    pairs = [word.partition("=")[::2] for word in text.split()]
    return {name: _value_of(name, value) for name, value in pairs}


def _value_of(name: str, text: str) -> Any:
    """`text` as the type of the setting of this name."""
    if name == CONTEXT:
        if text not in ("own", "other"):
            raise ValueError(f"compare: context ({text!r}) must be own or other")
        return text
    expected, known = type(find_setting(name).default), [n for n in SETTINGS if n in marked("compared")]
    if name not in known:
        raise ValueError(f"compare cannot change {name}, which takes training; it changes {', '.join(known)}")
    try:
        return {"true": True, "false": False}[text] if expected is bool else expected(text)
    except (KeyError, ValueError):
        kind = "true or false" if expected is bool else f"of type {expected.__name__}"
        raise ValueError(f"compare: {name} ({text!r}) must be {kind}; write {name}=VALUE") from None


def _variant(model: LGMNet, settings: Settings) -> LGMNet:
    """The network with these settings of the group model, with its own context."""
    generator = settings.get("model.generator", model.config.generator)
    if settings.get(CONTEXT) == "other" and generator == "none":
        raise ValueError("compare: context=other needs a network with a generator, and this one has none; leave it out")
    config = Config(model=model.config).replace(**_of_config(settings)).model
    return (model.without_generator() if generator == "none" else model).with_head(config)


def _of_config(settings: Settings) -> Settings:
    """The settings that a configuration has."""
    return {name: value for name, value in settings.items() if name != CONTEXT}


def _of_episodes(evaluation: Evaluation) -> npt.NDArray[np.float64]:
    """Accuracy of each episode (episodes,)."""
    return next(iter(evaluation.accuracies.values()))
