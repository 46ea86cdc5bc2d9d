"""Classes that pretraining leaves out: which they are, and episodes of them alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_episodes import BANK, UNEQUAL, make_bank, pick, words

from lgm_dist.config import Config
from lgm_dist.data.episodes import EpisodeSampler, check_episodes, draw_rows
from lgm_dist.data.holdout import held_out_classes

CONFIG = Config.of(ways=3, shot=2, query=3, seed=5, classes="held_out", **{"pretraining.holdout": 4})


def test_the_seed_chooses_them() -> None:
    for seed in (5, 2**40 + 5):
        config = CONFIG.replace(seed=seed)
        assert held_out_classes(config, 60).tolist() == sorted(pick(list(range(60)), words(seed, 0, 17, 0, 4)))
    more = held_out_classes(CONFIG.replace(**{"pretraining.holdout": 20}), 60)
    assert set(held_out_classes(CONFIG, 60)) < set(more)
    assert len(more) == 20
    assert held_out_classes(Config(), 60).tolist() == []


def test_every_class_is_left_out_equally_often() -> None:
    often = np.zeros(10)
    for seed in range(300):
        often[held_out_classes(CONFIG.replace(seed=seed), 10)] += 1
    assert ((often - 120) ** 2 / 120).sum() < 9 + 5 * 18**0.5


def test_training_episodes_have_these_classes_alone() -> None:
    left_out = held_out_classes(CONFIG, len(UNEQUAL))
    rows = draw_rows(BANK, CONFIG, "train", 0, 300)
    assert np.unique(rows.classes).tolist() == left_out.tolist()
    assert np.array_equal(np.searchsorted(BANK.offsets, rows.support[:, ::2], side="right") - 1, rows.classes)
    drawn = EpisodeSampler(BANK, CONFIG).draw(torch.arange(3))
    assert np.array_equal(drawn.classes, rows.classes[:3])
    first = pick(left_out.tolist(), words(5, 0, 0, 0, 3))
    assert rows.classes[0].tolist() == first


def test_val_and_test_episodes_have_all_classes() -> None:
    val = make_bank(UNEQUAL, "val")
    config = CONFIG.replace(eval_query=4)
    assert np.unique(draw_rows(val, config, "val", 0, 300).classes).tolist() == list(range(len(UNEQUAL)))


def test_what_a_user_can_get_wrong() -> None:
    with pytest.raises(
        ValueError, match=r"^classes \('held_out'\) needs classes that pretraining has left out; use the "
    ):
        check_episodes(CONFIG.replace(**{"pretraining.holdout": 0}), "train", "toy", UNEQUAL)
    with pytest.raises(
        ValueError, match=r"^pretraining.holdout \(7\) must leave 2 of the 8 base classes; lower it to 6$"
    ):
        check_episodes(CONFIG.replace(**{"pretraining.holdout": 7}), "train", "toy", UNEQUAL)
    with pytest.raises(ValueError, match=r"^5 ways need 5 classes, split train of 'toy' has 4; set ways to 4 or less$"):
        check_episodes(CONFIG.replace(ways=5), "train", "toy", UNEQUAL)
    with pytest.raises(ValueError, match=r"^pretraining.holdout \(-1\) must be a whole number of at least 0$"):
        Config.of(**{"pretraining.holdout": -1})
