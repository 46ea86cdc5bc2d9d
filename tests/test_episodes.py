"""Episodes of both protocols: a slow reference of a whole episode, the determinism contract, statistics, errors."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from lgm_dist.config import Config, ModelConfig, Split
from lgm_dist.data.augment.rotation import ANGLES
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import (
    Drawn,
    EpisodeBatch,
    EpisodeSampler,
    check_episodes,
    draw_noise,
    draw_rows,
    load_images,
    sample_episodes,
)

STANDARD = Config.of(ways=5, shot=2, query=3, eval_query=4, seed=11)
PAPER = STANDARD.replace(protocol="paper")


def make_bank(sizes: list[int], split: Split = "train", side: int = 16) -> ImageBank:
    images = np.random.default_rng(sum(sizes)).integers(0, 256, (sum(sizes), side, side, 3), dtype=np.uint8)
    images.setflags(write=False)
    return ImageBank(
        name="toy",
        split=split,
        images=images,
        offsets=np.cumsum([0, *sizes]),
        classes=tuple(f"class{i}" for i in range(len(sizes))),
        groups=("",) * len(sizes),
        mean=(129.4, 124.1, 112.5),
        std=(68.2, 65.4, 70.5),
    )


UNEQUAL = [9, 12, 7, 30, 10, 8, 11, 25]
BANK = make_bank(UNEQUAL)


# ---- a slow reference: Python's integers, lists to pop from, one image at a time ----


def words(seed: int, split: int, purpose: int, episode: int, count: int) -> list[int]:
    out: list[int] = []
    for block in range(-(-count // 4)):
        c, k = [block, episode % 2**32, episode >> 32, split << 16 | purpose], [seed % 2**32, seed >> 32]
        for _ in range(10):
            low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [high >> 32 ^ c[1] ^ k[0], high % 2**32, low >> 32 ^ c[3] ^ k[1], low % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        out += c
    return out[:count]


def pick(pool: list[int], drawn: list[int]) -> list[int]:
    pool = list(pool)
    return [pool.pop(word * len(pool) >> 32) for word in drawn]


def members(bank: ImageBank, c: int) -> list[int]:
    return list(range(int(bank.offsets[c]), int(bank.offsets[c + 1])))


def noise_reference(config: Config, seed: int, split: int, episode: int) -> list[float]:
    drawn, out = words(seed, split, 5, episode, 2 * config.model.noise_size), []
    for a, b in zip(drawn[::2], drawn[1::2], strict=True):
        radius = math.sqrt(-2 * math.log((a + 1) / 2**32))
        out += [radius * math.cos(math.tau * b / 2**32), radius * math.sin(math.tau * b / 2**32)]
    return out


@pytest.mark.parametrize("episode", [0, 5, 2**32 + 5])
@pytest.mark.parametrize("seed", [11, 2**40 + 11])
def test_a_whole_standard_episode(episode: int, seed: int) -> None:
    config = STANDARD.replace(seed=seed)
    n, k, q = config.episodes.ways, config.episodes.shot, config.episodes.query
    classes = pick(list(range(len(UNEQUAL))), words(seed, 0, 0, episode, n))
    drawn = words(seed, 0, 1, episode, n * (k + q))
    chosen = [pick(members(BANK, c), drawn[i::n]) for i, c in enumerate(classes)]
    rows = [row for own in chosen for row in own[:k]] + [row for own in chosen for row in own[k:]]
    wiggle = words(seed, 0, 4, episode, 3 * len(rows))
    images = []
    for j, row in enumerate(rows):
        image = BANK.images[row]
        flip, down, right = wiggle[3 * j] * 2 >> 32, wiggle[3 * j + 1] * 5 >> 32, wiggle[3 * j + 2] * 5 >> 32
        padded = np.pad(image[:, ::-1] if flip else image, ((2, 2), (2, 2), (0, 0)), mode="edge")
        images.append(padded[4 - down : 20 - down, 4 - right : 20 - right])  # 16 / 8 = 2 pixels each way
    pixels = (np.stack(images) - np.float32(BANK.mean)) / np.float32(BANK.std)

    batch, drawn = sample_episodes(BANK, config, "train", episode, 1), draw_rows(BANK, config, "train", episode, 1)
    assert drawn.classes.tolist() == [classes]
    assert np.concatenate([drawn.support, drawn.query], axis=1).tolist() == [rows]
    assert drawn.labels.tolist() == batch.labels.tolist()
    assert batch.labels.tolist() == [[i for i in range(n) for _ in range(q)]]
    np.testing.assert_array_equal(batch.images[0].permute(0, 2, 3, 1), pixels)
    np.testing.assert_allclose(batch.noise.flatten(), noise_reference(config, seed, 0, episode), atol=1e-6)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_whole_paper_episode(split: Split) -> None:
    bank, n, k, code = (
        make_bank(UNEQUAL, split),
        PAPER.episodes.ways,
        PAPER.episodes.shot,
        ("train", "val", "test").index(split),
    )
    seed = PAPER.run.seed if split == "train" else PAPER.episodes.eval_seed
    for episode, batch in ((e, sample_episodes(bank, PAPER, split, e, 1)) for e in (0, 1, 2**32 + 2)):
        classes = pick(list(range(len(UNEQUAL))), words(seed, code, 0, episode, n))
        places = pick(list(range(min(UNEQUAL[c] for c in classes))), words(seed, code, 1, episode, k + 1))
        target = words(seed, code, 2, episode, 1)[0] * n >> 32
        angles = [ANGLES[word * 5 >> 32] for word in words(seed, code, 3, episode, n)]
        shown = [(i, place) for i in range(n) for place in places[:k]] + [(target, places[k])]
        rows = [members(bank, classes[i])[place] for i, place in shown]
        drawn = draw_rows(bank, PAPER, split, episode, 1)
        assert [*drawn.support[0], *drawn.query[0]] == rows
        assert drawn.classes.tolist() == [classes]
        assert batch.labels.tolist() == drawn.labels.tolist() == [[target]]
        turned = [
            ndimage.rotate(bank.images[row].astype(float), angles[i], reshape=False, mode="nearest", order=3)
            for row, (i, _) in zip(rows, shown, strict=True)
        ]
        pixels = (np.stack(turned) - 113.77) / 70.1899
        np.testing.assert_allclose(batch.images[0].permute(0, 2, 3, 1), pixels, atol=2e-5)
        np.testing.assert_allclose(batch.noise.flatten(), noise_reference(PAPER, seed, code, episode), atol=1e-6)


# ---- the determinism contract ----


def same(a: EpisodeBatch, b: EpisodeBatch) -> None:
    for field in ("support", "query", "labels", "noise"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field


def joined(parts: list[EpisodeBatch]) -> Any:
    names = ("images", "labels", "noise")
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


@pytest.mark.parametrize("config", [STANDARD, PAPER], ids=["standard", "paper"])
def test_any_slicing_gives_the_same_episodes(config: Config) -> None:
    whole = sample_episodes(BANK, config, "train", 40, 8)
    for world_size in (1, 2, 4, 8):
        share = 8 // world_size
        parts = [sample_episodes(BANK, config, "train", 40 + rank * share, share) for rank in range(world_size)]
        for name, tensor in joined(parts).items():
            assert torch.equal(tensor, getattr(whole, name)), (world_size, name)
    drawn = draw_rows(BANK, config, "train", 40, 8)
    assert len({tuple(row) for row in np.hstack([drawn.support, drawn.query]).tolist()}) == 8, "none twice"
    same(whole, sample_episodes(BANK, config, "train", 40, 8))


def test_seeds_splits_and_high_episodes_differ() -> None:
    def rows(config: Config, split: Split = "train", start: int = 0) -> list[Any]:
        drawn = draw_rows(make_bank([20] * 30, split), config, split, start, 4)
        return [*drawn.support.tolist(), *drawn.query[:, :3].tolist()]

    base, val = rows(STANDARD), rows(STANDARD, "val")
    assert rows(STANDARD.replace(seed=11 + 2**32)) != base
    assert rows(STANDARD, start=2**32) != base
    assert len({str(r) for r in (base, val, rows(STANDARD, "test"), rows(STANDARD.replace(seed=0)))}) == 4
    assert rows(STANDARD.replace(eval_seed=1)) == base
    assert rows(STANDARD.replace(eval_seed=1), "val") != val
    assert rows(STANDARD.replace(seed=1), "val") == val, "all runs are measured on the same episodes"


def test_one_setting_does_not_move_what_others_draw() -> None:
    base = draw_rows(BANK, STANDARD, "train", 0, 50)
    more = draw_rows(BANK, STANDARD.replace(query=5), "train", 0, 50)
    plain = draw_rows(BANK, STANDARD.replace(augment=False), "train", 0, 50)
    paper = draw_rows(BANK, PAPER, "train", 0, 50)
    for other in (more, plain, paper):
        np.testing.assert_array_equal(other.classes, base.classes)
    np.testing.assert_array_equal(more.support, base.support)
    np.testing.assert_array_equal(more.query.reshape(50, 5, 5)[..., :3], base.query.reshape(50, 5, 3))
    np.testing.assert_array_equal(plain.query, base.query)
    noise = [sample_episodes(BANK, c, "train", 0, 3).noise for c in (STANDARD, STANDARD.replace(query=5), PAPER)]
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], noise[2])


# ---- what an episode is ----


def test_standard_sets_are_disjoint_and_class_major() -> None:
    rows = draw_rows(BANK, STANDARD, "train", 0, 500)
    owner = np.arange(len(UNEQUAL)).repeat(UNEQUAL)
    np.testing.assert_array_equal(owner[rows.support].reshape(500, 5, 2), np.stack([rows.classes] * 2, axis=2))
    np.testing.assert_array_equal(owner[rows.query], np.take_along_axis(rows.classes, rows.labels, axis=1))
    np.testing.assert_array_equal(rows.labels, np.tile(np.arange(5).repeat(3), (500, 1)))
    for episode in np.hstack([rows.support, rows.query, rows.classes + 10_000]).tolist():
        assert len(set(episode)) == 5 * (2 + 3) + 5, "no image and no class twice"


def test_paper_episodes_use_the_same_places_in_every_class() -> None:
    rows = draw_rows(BANK, PAPER, "train", 0, 500)
    first = BANK.offsets[rows.classes]  # (500, 5)
    places = rows.support.reshape(500, 5, 2) - first[..., None]
    assert (places == places[:, :1]).all()
    target = rows.query - np.take_along_axis(first, rows.labels, axis=1)
    assert rows.query.shape == rows.labels.shape == (500, 1)
    smallest = np.array(UNEQUAL)[rows.classes].min(axis=1)
    every = np.hstack([places[:, 0], target])  # (500, 3)
    assert all(len(set(row)) == 3 for row in every.tolist())
    assert (every.max(axis=1) < smallest).all()
    assert (every.max(axis=1) == smallest - 1).any()


def test_shapes_layout_and_device() -> None:
    batch = sample_episodes(BANK, STANDARD.replace(model=ModelConfig(noise_size=7)), "train", 3, 4)
    assert batch.support.shape == (4, 10, 3, 16, 16)
    assert batch.query.shape == (4, 15, 3, 16, 16)
    assert batch.noise.shape == (4, 2, 7)
    assert batch.support.dtype == batch.noise.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert batch.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert batch.query.untyped_storage().data_ptr() == batch.support.untyped_storage().data_ptr()
    same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    assert moved.query.device.type == moved.labels.device.type == moved.noise.device.type == "meta"
    assert moved.query.shape == batch.query.shape


@pytest.mark.parametrize("split", ["val", "test"])
def test_val_and_test_images_are_untouched(split: Split) -> None:
    bank = make_bank(UNEQUAL, split)
    config = STANDARD.replace(eval_query=4)
    batch, drawn = sample_episodes(bank, config, split, 0, 6), draw_rows(bank, config, split, 0, 6)
    assert batch.query.shape[1] == 20
    for tensor, rows in ((batch.support, drawn.support), (batch.query, drawn.query)):
        plain = (bank.images[rows] - np.float32(bank.mean)) / np.float32(bank.std)  # (B, S, H, W, C)
        np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2), plain)


def test_load_images_does_not_augment() -> None:
    rows = np.array([3, 90, 3])
    for config, plain in (
        (STANDARD, (BANK.images[rows] - np.float32(BANK.mean)) / np.float32(BANK.std)),
        (PAPER, (BANK.images[rows] - np.float32(113.77)) / np.float32(70.1899)),
    ):
        got = load_images(BANK, config, rows)
        assert got.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(got.permute(0, 2, 3, 1), plain)


def test_a_batch_and_what_was_drawn_print_as_one_line() -> None:
    batch = sample_episodes(BANK, STANDARD, "train", 0, 4)
    assert repr(batch) == "EpisodeBatch(4 episodes: 5-way 2-shot, 15 queries, images (3, 16, 16), cpu)"
    assert repr(BANK) == "ImageBank('toy', train: 8 classes, 112 images of 16 x 16 x 3)"


# ---- statistics: the sum of (observed - expected)^2 / expected has mean d and variance 2d ----


def drawn(bank: ImageBank, config: Config, count: int) -> Drawn:
    return EpisodeSampler(bank, config).draw(torch.arange(count))


def assert_uniform(values: np.ndarray, outcomes: int) -> None:
    counts = np.bincount(values.ravel(), minlength=outcomes)
    assert len(counts) == outcomes
    expected, freedom = values.size / outcomes, outcomes - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_classes_images_and_augmentation_are_uniform() -> None:
    bank = make_bank([20] * 12, side=8)
    rows = draw_rows(bank, STANDARD, "train", 0, 20_000)
    for place in range(5):
        assert_uniform(rows.classes[:, place], 12)
    for column in (0, 1, 9):
        assert_uniform(rows.support[:, column], 240)
    assert_uniform(rows.query[:, 7], 240)
    (parameters,) = drawn(bank, STANDARD, 20_000).parameters  # (20_000, S + T, 3)
    flips, down, right = parameters.numpy().transpose(2, 0, 1)
    assert_uniform(flips * 9 + (down + 1) * 3 + right + 1, 18)
    assert_uniform(flips[:, 0] * 2 + flips[:, 10], 4)


def test_shifts_reach_an_eighth_of_the_image() -> None:
    (parameters,) = drawn(make_bank([6] * 5, side=32), STANDARD, 200).parameters
    assert np.unique(parameters[..., 1:]).tolist() == list(range(-4, 5))


def test_paper_draws_are_uniform() -> None:
    found = drawn(make_bank([20] * 12, side=8), PAPER, 20_000)
    labels, angles = found.labels.numpy(), found.parameters[0][:, ::2, 0].numpy()  # (20_000, 1), (20_000, N + 1)
    assert_uniform(labels, 5)
    assert_uniform(angles[:, :5], 5)
    assert_uniform(angles[:, 0] * 25 + angles[:, 1] * 5 + labels[:, 0], 125)
    assert_uniform(found.rows[:, -1].numpy() % 20, 20)


@pytest.mark.parametrize(("ways", "known"), [(5, 0.672), (20, 0.247)])
def test_angles_alone_leak_the_label_under_paper(ways: int, known: float) -> None:
    """A guess among the classes with the angle of the query is right with probability (1 - (4/5)^n) / (n/5)."""
    found = drawn(make_bank([4] * 20, "test", side=8), PAPER.replace(ways=ways, shot=1), 20_000)
    angles, seen = found.parameters[0][..., 0].numpy()[:, :-1], found.parameters[0][:, -1].numpy()  # support, query
    np.testing.assert_array_equal(np.take_along_axis(angles, found.labels.numpy(), axis=1), seen)
    right = 1 / (angles == seen).sum(axis=1)  # expectation over ties
    formula = (1 - 0.8**ways) / (ways / 5)
    assert formula == pytest.approx(known, abs=5e-4)
    assert abs(right.mean() - formula) < 4 * right.std() / math.sqrt(20_000)


def test_noise() -> None:
    noise = draw_noise(STANDARD, "val", 0, 500, 4)
    assert noise.shape == (4, 500, 2, 32)
    bank = make_bank(UNEQUAL, "val")
    assert torch.equal(noise[0, 7:9], sample_episodes(bank, STANDARD, "val", 7, 2).noise)
    assert torch.equal(noise[:2], draw_noise(STANDARD, "val", 0, 500, 2)), "more draws leave the first as they are"
    values, n = noise.double(), noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 5 * math.sqrt(variance / n)
    assert len(noise.flatten(0, 2).unique(dim=0)) == 4 * 500 * 2, "no layer, episode or draw repeats another"
    assert abs(float((noise[0] * noise[1]).mean())) < 5 / math.sqrt(n / 4)


# ---- what a user can get wrong ----


IMAGES = "{} images a class, but class '{}' of split {} of 'glyphs' has {}; lower shot{}"


@pytest.mark.parametrize(
    ("settings", "split", "counts", "message"),
    [
        (
            {"ways": 20},
            "val",
            [600] * 12,
            "20 ways need 20 classes, split val of 'glyphs' has 12; set ways to 12 or less",
        ),
        ({}, "val", [30, 12, 11], "shot (5) + eval_query (9) = " + IMAGES.format(14, "c", "val", 11, " or eval_query")),
        ({}, "train", [30, 12, 30], "shot (5) + query (8) = " + IMAGES.format(13, "b", "train", 12, " or query")),
        (
            {"protocol": "paper"},
            "test",
            [5, 6, 6],
            "shot (5) + the query (1) = " + IMAGES.format(6, "a", "test", 5, ""),
        ),
    ],
)
def test_too_little_data_is_one_sentence(settings: Any, split: Split, counts: list[int], message: str) -> None:
    config = Config.of(ways=3, shot=5, query=8, eval_query=9).replace(**settings)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_episodes(config, split, "glyphs", counts, "abcdefghijkl"[: len(counts)])


def test_exactly_enough_is_enough() -> None:
    check_episodes(Config.of(ways=5, shot=5, query=15), "train", "toy", [20] * 5)
    check_episodes(Config.of(ways=5, shot=5, protocol="paper"), "val", "toy", [6] * 5)
    rows = draw_rows(make_bank([5] * 5), STANDARD, "train", 0, 3)
    assert np.sort(np.hstack([rows.support, rows.query])).tolist() == [list(range(25))] * 3


def test_sampling_checks_the_bank() -> None:
    with pytest.raises(ValueError, match="9 ways need 9 classes, split train of 'toy' has 8"):
        sample_episodes(BANK, STANDARD.replace(ways=9), "train", 0, 1)
    with pytest.raises(ValueError, match="class 'class2' of split train of 'toy' has 7"):
        draw_rows(BANK, STANDARD.replace(query=6), "train", 0, 1)
    with pytest.raises(ValueError, match=r"split \(val\) was asked of the bank of split train of 'toy'"):
        sample_episodes(BANK, STANDARD, "val", 0, 1)
