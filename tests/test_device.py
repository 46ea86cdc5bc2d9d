"""Episodes are the same on every device. Other tests check those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_episodes import make_bank

from lgm_dist.config import Config, Protocol, Split
from lgm_dist.data import sample_episodes
from lgm_dist.data.episodes import EpisodeSampler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = Config.of(ways=4, shot=2, query=3, eval_query=5, seed=2**63 + 5, eval_seed=7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("protocol", "augment"), [("standard", True), ("standard", False), ("paper", True)])
@pytest.mark.parametrize("start", [0, 2**40 + 3])
def test_resident_images_give_the_same_episodes(
    device: str, split: Split, protocol: Protocol, augment: bool, start: int
) -> None:
    bank, config = make_bank([9, 14, 30, 8, 11], split), CONFIG.replace(protocol=protocol, augment=augment)
    resident = EpisodeSampler(bank, config, device, resident=True)(start, 6)
    mapped = sample_episodes(bank, config, split, start, 6)
    assert torch.equal(resident.images.cpu(), mapped.images)
    assert torch.equal(resident.support.cpu(), mapped.support)
    assert torch.equal(resident.query.cpu(), mapped.query)
    assert torch.equal(resident.labels.cpu(), mapped.labels)
    np.testing.assert_allclose(resident.noise.cpu(), mapped.noise, rtol=1e-6, atol=1e-7 if device == "cuda" else 0)
    assert resident.images.stride() == mapped.images.stride(), "channels last"


def test_episodes_do_not_depend_on_their_neighbours() -> None:
    sampler = EpisodeSampler(make_bank([9, 14, 30, 8, 11]), CONFIG)
    whole, part = sampler(100, 8), sampler(103, 2)
    for name in ("images", "labels", "noise"):
        assert torch.equal(getattr(whole, name)[3:5], getattr(part, name))


@pytest.mark.parametrize(("protocol", "split"), [("standard", "train"), ("paper", "val")])
def test_a_gpu_never_waits_for_the_host(protocol: Protocol, split: Split) -> None:
    """Tensors of the meta device have no values: an operation that needs them, as a CUDA graph cannot hold, fails."""
    bank, config = make_bank([9, 14, 30, 8, 11], split), CONFIG.replace(protocol=protocol)
    batch = EpisodeSampler(bank, config, "meta", resident=True)(0, 6)
    known = sample_episodes(bank, config, split, 0, 6)
    for name in ("images", "labels", "noise"):
        ours, theirs = getattr(batch, name), getattr(known, name)
        assert ours.is_meta
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_impossible_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 ways need 6 classes"):
        EpisodeSampler(make_bank([9, 14, 30, 8, 11]), CONFIG.replace(ways=6))
