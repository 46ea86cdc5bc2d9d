"""The generator against published vectors, plain integers and hand-made bounds, on the CPU and on a GPU."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lgm_dist.config import Split
from lgm_dist.data.philox import Purpose, RandomWords, bounded, choose, normals, uniform
from lgm_dist.philox import Philox

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as in the paper, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high % 2**32, low >> 32 ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def draws(
    seed: int, split: Split, purpose: int, episodes: range | list[int], count: int, device: str = "cpu"
) -> Tensor:
    """`count` words of one purpose of each episode."""
    return RandomWords(seed, split, {purpose: count}, device)(torch.tensor(list(episodes), device=device))[purpose]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(device: str, counter: str, key: str, words: str) -> None:
    """Random123's kat_vectors for philox4x32 with 10 rounds."""
    c, k, w = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert reference(c, k) == w
    assert Philox((k[0], k[1]), device)(torch.tensor(c, device=device)).tolist() == w


@pytest.mark.parametrize("device", DEVICES)
def test_layout_of_the_counter(device: str) -> None:
    seed, episodes = 0x0123456789ABCDEF, [0, 7, 2**32 + 7, 2**62 + 1]
    counts = {Purpose.CLASSES: 1, Purpose.NOISE: 10, 1000: 5}
    got = RandomWords(seed, "val", counts, device)(torch.tensor(episodes, device=device))
    for purpose, count in counts.items():
        assert got[purpose].shape == (4, count)
        for episode, row in zip(episodes, got[purpose].tolist(), strict=True):
            code = 65536 * 1 + {Purpose.CLASSES: 0, Purpose.NOISE: 5, 1000: 1000}[purpose]  # val is split 1
            low, high = episode % 2**32, episode >> 32
            words = [word for b in range(3) for word in reference([b, low, high, code], [seed % 2**32, seed >> 32])]
            assert row == words[:count]


def test_every_part_of_the_address_matters() -> None:
    base = draws(1, "train", Purpose.CLASSES, [0], 4).tolist()
    others = [
        draws(1 + 2**32, "train", Purpose.CLASSES, [0], 4),
        draws(1, "test", Purpose.CLASSES, [0], 4),
        draws(1, "train", Purpose.IMAGES, [0], 4),
        draws(1, "train", Purpose.CLASSES, [2**32], 4),
    ]
    assert all(other.tolist() != base for other in others)
    assert draws(1, "train", Purpose.CLASSES, [0], 11)[:, :4].tolist() == base, "a longer draw begins with the shorter"


def test_words_are_uniform_and_uncorrelated_in_each_bit() -> None:
    words = draws(3, "train", Purpose.IMAGES, range(2000), 16).numpy()
    bits = (words[..., None] >> np.arange(32)) & 1  # (2000, 16, 32)
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 4.5 * 0.5 / math.sqrt(32_000)
    assert len(np.unique(words)) > words.size - 5  # a birthday gives 0.12 pairs


def test_bounded() -> None:
    edges = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1])
    assert bounded(edges, 2).tolist() == [0, 0, 1, 1]
    assert bounded(edges, 600).tolist() == [0, 299, 300, 599]
    words = draws(0, "train", Purpose.TARGET, range(1000), 70)
    counts = np.bincount(bounded(words, 7).numpy().ravel(), minlength=7)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 6 + 5 * math.sqrt(12)


def test_uniform() -> None:
    edges = torch.tensor([0, 255, 256, 2**31, 2**32 - 1])
    assert uniform(edges).tolist() == [0, 0, 2**-24, 0.5, 1 - 2**-24]
    assert uniform(edges, -3, 5)[[0, 3]].tolist() == [-3, 1]
    assert uniform(edges).dtype == torch.float32
    drawn = uniform(draws(0, "train", Purpose.JITTER, range(1000), 70), 0.6, 1.4).flatten()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in 1,000 times
    assert stats.kstest(drawn, stats.uniform(0.6, 0.8).cdf).statistic < 1.95 / math.sqrt(70_000)


@pytest.mark.parametrize("device", DEVICES)
def test_choose_is_popping_from_a_list(device: str) -> None:
    sizes = torch.tensor([9, 12, 30, 9, 600, 9], device=device)
    words = draws(5, "train", Purpose.IMAGES, range(6), 9, device)
    for row, size, chosen in zip(words.tolist(), sizes.tolist(), choose(words, sizes).tolist(), strict=True):
        pool = list(range(size))
        assert chosen == [pool.pop(word * len(pool) >> 32) for word in row]
    assert sorted(choose(words[:1], sizes[:1])[0].tolist()) == list(range(9)), "all of nine"
    grid = words.view(2, 3, 9)  # more dimensions: each row by itself
    assert torch.equal(choose(grid, sizes.view(2, 3)).flatten(0, 1), choose(words, sizes))


def test_every_ordered_choice_is_equally_likely() -> None:
    words = draws(2, "train", Purpose.IMAGES, range(60_000), 3)
    chosen = choose(words, torch.full((60_000,), 5)).numpy()
    expected = 60_000 / 60
    counts = [int((chosen == want).all(axis=1).sum()) for want in itertools.permutations(range(5), 3)]
    assert sum(counts) == 60_000
    assert sum((c - expected) ** 2 / expected for c in counts) < 59 + 5 * math.sqrt(118)


@pytest.mark.parametrize("device", DEVICES)
def test_normals(device: str) -> None:
    words = draws(4, "train", Purpose.NOISE, range(2000), 64, device)
    got = normals(words).cpu().numpy()
    first, second = words[0, :2].tolist()
    radius, angle = math.sqrt(-2 * math.log((first + 1) / 2**32)), 2 * math.pi * second / 2**32
    np.testing.assert_allclose(got[0, :2], [radius * math.cos(angle), radius * math.sin(angle)], rtol=1e-6)
    n = got.size  # 128,000; moments of a standard normal, within 5 standard errors
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((got.astype(np.float64) ** power).mean() - moment) < 5 * math.sqrt(variance / n)
    assert abs((got[:, 0::2] * got[:, 1::2]).mean()) < 5 / math.sqrt(n / 2), "the two of a pair are uncorrelated"
    extremes = normals(torch.tensor([0, 0, 2**32 - 1, 0], device=device)).tolist()
    assert np.isfinite(extremes).all()
    assert extremes[0] == pytest.approx(math.sqrt(64 * math.log(2)))


def test_the_bits_of_normals_on_the_cpu() -> None:
    """Those of 60-digit arithmetic: an update of numpy or torch must not change the noise of a run that is resumed."""
    bits = [1087489791, 849658428, 1066841439, -1326662790]
    assert normals(torch.tensor([1, 2, 2**31, 2**32 - 1])).view(torch.int32).tolist() == bits
