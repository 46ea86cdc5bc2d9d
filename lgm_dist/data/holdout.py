"""Base classes that pretraining leaves out, so that episodes can be trained on classes that the backbone has not seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lgm_dist.config import Config, Split
from lgm_dist.data.philox import Purpose, RandomWords, choose


def held_out_classes(config: Config, classes: int) -> npt.NDArray[np.int64]:
    """Numbers of the `pretraining.holdout` base classes, of `classes`, that pretraining leaves out, in ascending order.

    A pure function of the seed; with a larger holdout the same classes and more are left out. Raises ValueError if fewer than
    two classes would be left.
    """
    holdout = config.pretraining.holdout
    if not holdout:
        return np.arange(0)
    if classes - holdout < 2:
        raise ValueError(
            f"pretraining.holdout ({holdout}) must leave 2 of the {classes} base classes; lower it to {max(classes - 2, 0)}"
        )
    words = RandomWords(config.run.seed, "train", {Purpose.HOLDOUT: holdout})(torch.zeros(1, dtype=torch.int64))
    chosen: npt.NDArray[np.int64] = choose(words[Purpose.HOLDOUT][0], torch.tensor(classes)).numpy()
    return np.sort(chosen)


def episode_classes(config: Config, split: Split, classes: int) -> npt.NDArray[np.int64]:
    """Numbers of the classes, of the `classes` of a split, that its episodes are drawn from, in ascending order.

    Raises ValueError as `held_out_classes`, and for classes=held_out without a holdout.
    """
    if split != "train" or config.episodes.classes == "all":
        return np.arange(classes)
    if not config.pretraining.holdout:
        raise ValueError(
            "classes ('held_out') needs classes that pretraining has left out; use the --pretraining.holdout and the --seed "
            "that the backbone was trained with"
        )
    return held_out_classes(config, classes)
