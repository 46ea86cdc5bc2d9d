"""Episodes made by torch on a device are those made in numpy; the numpy ones are held against slow references elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_episodes import make_bank

from lgm_dist.config import Config, Protocol, Split
from lgm_dist.data import sample_episodes
from lgm_dist.data.device import DeviceSampler, choose, philox

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = Config.of(ways=4, shot=2, query=3, eval_query=5, seed=2**63 + 5, eval_seed=7)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_published_vectors(counter: list[int], key: list[int], words: str) -> None:
    """Random123's kat_vectors."""
    found = philox(tuple(torch.tensor(c) for c in counter), tuple(key))  # type: ignore[arg-type]
    assert " ".join(f"{int(word):08x}" for word in found) == words


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("protocol", "augment"), [("standard", True), ("standard", False), ("paper", True)])
@pytest.mark.parametrize("start", [0, 2**40 + 3])
def test_the_stream_is_that_of_numpy(device: str, split: Split, protocol: Protocol, augment: bool, start: int) -> None:
    bank, config = make_bank([9, 14, 30, 8, 11], split), CONFIG.replace(protocol=protocol, augment=augment)
    ours, known = DeviceSampler(bank, config, device)(start, 6), sample_episodes(bank, config, split, start, 6)
    assert torch.equal(ours.images.cpu(), known.images)
    assert torch.equal(ours.support.cpu(), known.support)
    assert torch.equal(ours.query.cpu(), known.query)
    assert torch.equal(ours.labels.cpu(), known.labels)
    np.testing.assert_allclose(ours.noise.cpu(), known.noise, rtol=1e-6, atol=1e-7)
    assert ours.images.stride() == known.images.stride(), "channels last"


def test_episodes_do_not_depend_on_their_neighbours() -> None:
    sampler = DeviceSampler(make_bank([9, 14, 30, 8, 11]), CONFIG, "cpu")
    whole, part = sampler(100, 8), sampler(103, 2)
    for name in ("images", "labels", "noise"):
        assert torch.equal(getattr(whole, name)[3:5], getattr(part, name))


def test_choose_is_popping_from_a_list() -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(5, 12, 40)
    words = random.integers(0, 2**32, (40, 5))
    found = choose(torch.from_numpy(words), torch.from_numpy(sizes))
    for row, size, drawn in zip(found.tolist(), sizes.tolist(), words.tolist(), strict=True):
        pool = list(range(size))
        assert row == [pool.pop(word * len(pool) >> 32) for word in drawn]


def test_what_it_cannot_make_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="6 ways need 6 classes"):
        DeviceSampler(make_bank([9, 14, 30, 8, 11]), CONFIG.replace(ways=6), "cpu")
