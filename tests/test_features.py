"""FeatureBank against images turned, shifted and averaged by numpy, one at a time; its episodes against those of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_episodes import UNEQUAL, make_bank, members, pick, words
from torch import Tensor
from torch.nn import functional as F

from lgm_dist.config import Config
from lgm_dist.data import sample_episodes
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import draw_rows
from lgm_dist.data.features import FeatureBank, FeatureSampler, open_features

CONFIG = Config.of(ways=4, shot=2, query=3, seed=2**35 + 3, **{"generator.copies": 3})
PLAIN = CONFIG.replace(augment=False)
BANK = dataclasses.replace(make_bank(UNEQUAL, side=16), digest="d")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LGM_DIST_CACHE", str(tmp_path))


def pooled(images: Tensor) -> Tensor:
    """A backbone: averages of 4 x 4 pixels."""
    return F.avg_pool2d(images, 4)  # (m, 3, 4, 4)


def by_hand(image: np.ndarray) -> np.ndarray:
    """(16, 16, 3) uint8 -> features (4, 4, 3)."""
    normal = (image.astype(float) - BANK.mean) / BANK.std
    return normal.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))


def test_augmented_copies_are_a_function_of_seed_row_and_copy(tmp_path: Path) -> None:
    bank = open_features(BANK, CONFIG, pooled, "net")
    assert (bank.features.shape, bank.classes) == ((len(BANK.images), 3, 4, 4, 3), BANK.classes)
    assert bank.offsets.tolist() == BANK.offsets.tolist()
    for row in (0, 5, 60, len(BANK.images) - 1):
        for copy in range(3):
            flip, down, right = words(CONFIG.run.seed, 0, 4, 2**62 + 2**40 * copy + row, 3)
            image = BANK.images[row][:, ::-1] if flip * 2 >> 32 else BANK.images[row]
            padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
            top, left = 4 - (down * 5 >> 32), 4 - (right * 5 >> 32)
            expected = by_hand(padded[top : top + 16, left : left + 16])
            np.testing.assert_allclose(bank.features[row, copy], expected, atol=1e-5)
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".features", ".lock"]
    assert not bank.features.flags.writeable


def test_other_splits_have_their_images_as_they_are() -> None:
    val = dataclasses.replace(make_bank([6, 9, 7, 8, 6], "val", side=16), digest="d")
    config = CONFIG.replace(**{"generator.variants": "all"})
    bank = open_features(val, config, pooled, "net")
    assert bank.features.shape == (36, 1, 4, 4, 3)
    np.testing.assert_allclose(bank.features[7, 0], by_hand(val.images[7]), atol=1e-5)
    images = bank.as_images()
    assert images.images.shape == (36, 4, 4, 3)
    batch = sample_episodes(images, config.replace(eval_query=4), "val", 2, 3)
    rows = draw_rows(val, config.replace(eval_query=4), "val", 2, 3)
    np.testing.assert_array_equal(batch.query.permute(0, 1, 3, 4, 2), bank.features[rows.query, 0])


def test_a_variant_of_a_class_is_a_class() -> None:
    bank = open_features(BANK, PLAIN.replace(**{"generator.variants": "all"}), pooled, "net")
    n, classes = len(BANK.images), len(BANK.classes)
    assert (len(bank.features), len(bank.classes), len(set(bank.classes))) == (12 * n, 12 * classes, 12 * classes)
    assert bank.counts.tolist() == 12 * BANK.counts.tolist()
    assert bank.classes[classes + 2] == "class2, channels 1"
    assert bank.classes[5 * classes + 1] == "class1, turned 90, channels 2"
    for variant, (turns, channels) in enumerate((t, c) for t in range(4) for c in range(3)):
        image = np.roll(np.rot90(BANK.images[17], turns), channels, axis=2)
        np.testing.assert_allclose(bank.features[variant * n + 17, 0], by_hand(image), atol=1e-5)


def test_only_the_classes_that_pretraining_leaves_out() -> None:
    config = PLAIN.replace(classes="held_out", **{"pretraining.holdout": 4, "generator.variants": "rotations"})
    left_out = sorted(pick(list(range(len(UNEQUAL))), words(config.run.seed, 0, 17, 0, 4)))
    bank = open_features(BANK, config, pooled, "net")
    assert bank.classes[:4] == tuple(f"class{c}" for c in left_out)
    assert bank.counts.tolist() == 4 * [UNEQUAL[c] for c in left_out]
    first = members(BANK, left_out[1])[0]
    np.testing.assert_allclose(bank.features[bank.offsets[1], 0], by_hand(BANK.images[first]), atol=1e-5)
    FeatureSampler(bank, config.replace(ways=16, query=5))(0, 2)
    with pytest.raises(ValueError, match="17 ways need 17 classes, split train of 'toy' has 16"):
        FeatureSampler(bank, config.replace(ways=17))


def test_episodes_have_the_images_of_the_image_banks_episodes() -> None:
    """With features that are the images themselves, to the bit."""
    sampler = FeatureSampler(open_features(BANK, PLAIN, lambda images: images, "identity"), PLAIN)
    theirs, ours = sample_episodes(BANK, PLAIN, "train", 2**40, 5), sampler(2**40, 5)
    for name in ("images", "support", "query", "labels", "noise"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    part = sampler(2**40 + 3, 1)
    assert torch.equal(part.images[0], ours.images[3])


def test_an_episode_draws_a_copy_of_each_image() -> None:
    bank = open_features(BANK, CONFIG, pooled, "net")
    sampler = FeatureSampler(bank, CONFIG)
    rows, batch = draw_rows(BANK, CONFIG, "train", 7, 1), sampler(7, 1)
    copies = [word * 3 >> 32 for word in words(CONFIG.run.seed, 0, 16, 7, 20)]
    chosen = bank.features[np.concatenate([rows.support, rows.query], axis=1)[0], copies]  # (S + T, h, w, F)
    np.testing.assert_array_equal(batch.images[0].permute(0, 2, 3, 1), chosen)
    assert set(copies) == {0, 1, 2}


def test_features_are_computed_once_for_each_network_and_setting(tmp_path: Path) -> None:
    seen = []

    def embed(images: Tensor) -> Tensor:
        seen.append(len(images))
        return pooled(images)

    def opened(config: Config = CONFIG, network: str = "net", bank: ImageBank = BANK) -> FeatureBank:
        seen.clear()
        return open_features(bank, config, embed, network)

    first = opened()
    assert sum(seen) == 3 * len(BANK.images) + 1, "one image tells the shape"
    again = opened()
    assert seen == [1]
    assert np.array_equal(first.features, again.features)
    others: list[dict[str, Any]] = [
        {"config": CONFIG.replace(seed=1)},
        {"config": CONFIG.replace(**{"generator.copies": 2})},
        {"config": CONFIG.replace(augment=False)},
        {"config": CONFIG.replace(**{"generator.variants": "channels"})},
        {"network": "other"},
        {"bank": dataclasses.replace(BANK, digest="e")},
    ]
    for number, other in enumerate(others):
        opened(**other)
        assert len(list(tmp_path.glob("*.features"))) == number + 2, other
    for same in (CONFIG.replace(lr=0.5), CONFIG.replace(ways=5), CONFIG.replace(shot=1)):
        opened(same)
        assert seen == [1]


def test_a_builder_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    calls = iter(range(100))

    def failing(images: Tensor) -> Tensor:
        if next(calls) == 2:
            raise RuntimeError("no memory")
        return pooled(images)

    with pytest.raises(RuntimeError, match="no memory"):
        open_features(BANK, CONFIG, failing, "net")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_variants_that_the_images_cannot_have() -> None:
    wide = dataclasses.replace(BANK, images=BANK.images[:, :8])
    with pytest.raises(
        ValueError, match=r"^generator.variants \(rotations\) need square images, and these are 16 x 8; use"
    ):
        open_features(wide, CONFIG.replace(**{"generator.variants": "rotations"}), pooled, "net")
    grey = dataclasses.replace(BANK, images=BANK.images[..., :1], mean=BANK.mean[:1], std=BANK.std[:1])
    with pytest.raises(
        ValueError, match=r"^generator.variants \(channels\) need colour images, and these are grey; use"
    ):
        open_features(grey, CONFIG.replace(**{"generator.variants": "all"}), pooled, "net")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LGM_DIST_CACHE", "/dev/null/x")
    with pytest.raises(ValueError, match=r"^cache \(/dev/null/x\) cannot be written \(.*\); name another folder"):
        open_features(BANK, CONFIG, pooled, "net")
