"""DropBlock: what it drops, that it keeps the mean, and that a mask depends on the image and the step alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from lgm_dist.config import ModelConfig
from lgm_dist.model import build_model
from lgm_dist.model.dropblock import DropBlock, image_hashes

HASHES = torch.randint(2**32, (64,), generator=torch.Generator().manual_seed(0))


def masks(share: float, size: int, side: int, channels: int = 48, layer: int = 0) -> np.ndarray:
    """True where a map of ones was dropped: (64, F, side, side)."""
    return (DropBlock(share, size, layer)(torch.ones(64, channels, side, side), HASHES) == 0).numpy()


@pytest.mark.parametrize(("share", "size", "side"), [(0.1, 1, 8), (0.1, 2, 4), (0.1, 2, 2), (0.3, 2, 5), (0.1, 5, 10)])
def test_the_share_is_dropped_and_the_mean_kept(share: float, size: int, side: int) -> None:
    x = torch.ones(64, 256, side, side)
    y = DropBlock(share, size, 0)(x, HASHES)
    squares = share * x.numel() / size**2
    error = 4 * share / squares**0.5
    assert float((y == 0).float().mean()) == pytest.approx(share, abs=error)
    assert float(y.mean()) == pytest.approx(1, abs=error / (1 - share))
    assert float(y.max()) == pytest.approx(1 / (1 - share), rel=2e-3)
    assert y.unique().numel() == 2


@pytest.mark.parametrize("size", [2, 3])
def test_dropped_activations_form_squares(size: int) -> None:
    dropped, square = masks(0.05, size, 12, 16), np.ones((size, size))
    opened = np.stack([[ndimage.binary_opening(channel, square) for channel in image] for image in dropped])
    assert (opened == dropped).all(), "every dropped activation lies in a square that is dropped as a whole"
    regions = [ndimage.label(channel) for channel in dropped.reshape(-1, 12, 12)]
    areas = np.concatenate([np.bincount(labels.ravel())[1:] for labels, count in regions if count])
    assert areas.min() == size**2
    assert np.bincount(areas).argmax() == size**2, "most squares are alone"


def test_places_channels_images_layers_and_steps_drop_independently() -> None:
    drop, ones = DropBlock(0.5, 1, 0), torch.ones(64, 64, 8, 8)
    first, second = (drop(ones, HASHES) == 0 for _ in range(2))
    other = DropBlock(0.5, 1, 1)(ones, HASHES) == 0
    pairs = [(first, second), (first, other), *((first, first.roll(1, d)) for d in range(4))]
    for a, b in pairs:
        assert float((a == b).float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / a.numel() ** 0.5)


def test_an_images_mask_does_not_depend_on_the_batch() -> None:
    x = torch.randn(64, 300, 4, 4)
    whole, part = DropBlock(0.3, 2, 0)(x, HASHES), DropBlock(0.3, 2, 0)(x[40:], HASHES[40:])
    assert torch.equal(whole[40:], part)


def test_the_gradient_passes_where_nothing_was_dropped() -> None:
    x = torch.randn(64, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    y = DropBlock(0.3, 2, 0)(x, HASHES)
    y.sum().backward()
    assert torch.allclose(x.grad * x, y)
    assert ((x.grad == 0) == (y == 0)).all()


def network(share: float) -> Any:
    config = ModelConfig(backbone="resnet12", generator="none", filters=4, drop_block=share)
    return build_model(config).train().backbone


def test_a_resumed_network_drops_the_same_and_no_global_generator_is_used() -> None:
    images, model = torch.randn(4, 3, 32, 32), network(0.2)
    state = torch.random.get_rng_state()
    for _ in range(3):
        model(images, 1)
    resumed, forgetful = network(0.2), network(0.2)
    saved = copy.deepcopy(model.state_dict())
    resumed.load_state_dict(saved)
    forgetful.load_state_dict({k: torch.zeros_like(v) if k.endswith("calls") else v for k, v in saved.items()})
    expected = model(images, 1)
    assert torch.equal(resumed(images, 1), expected)
    assert not torch.equal(forgetful(images, 1), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {int(v) for k, v in model.state_dict().items() if k.endswith("calls")} == {4}


def test_without_a_share_or_in_evaluation_nothing_is_dropped() -> None:
    plain, dropping, images = network(0.0), network(0.2), torch.randn(4, 3, 32, 32)
    assert dropping.state_dict().keys() - plain.state_dict().keys() == {f"blocks.{i}.drop.calls" for i in range(4)}
    assert plain.state_dict().keys() < dropping.state_dict().keys()
    assert torch.equal(plain.eval()(images, 1), dropping.eval()(images, 1)), "the initial weights are the same too"
    assert all(block.drop.calls == 0 for block in dropping.blocks)


def polynomial(image: Tensor, bits: int) -> int:
    """The hash in Python's integers."""
    factor, total = 1, 0
    for value in image.flatten().view(getattr(torch, f"int{bits}")).tolist():
        factor = factor * 0x1E3779B97F4A7C15 % 2**64
        total += value * factor
    return total % 2**64 >> 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_hash_of_an_image(dtype: torch.dtype) -> None:
    images = torch.randn(3, 3, 5, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bits = 8 * images.element_size()
    assert image_hashes(images).tolist() == [polynomial(image.contiguous(), bits) for image in images]
    changed = images.clone()
    changed[:, 2, 4, 3] = torch.nextafter(changed[:, 2, 4, 3], torch.tensor(9, dtype=dtype))
    assert not (image_hashes(changed) == image_hashes(images)).any()


def test_squares_that_do_not_fit_and_wrong_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.drop_size \(5\) must be at most 4 for maps of 4 x 4"):
        DropBlock(0.1, 5, 0)(torch.ones(2, 3, 4, 4), HASHES[:2])
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"drop_block \(.*\) must be in \[0, 1\); 0 turns it off"):
            ModelConfig(drop_block=share)
    with pytest.raises(ValueError, match=r"drop_size \(0\) must be a whole number of at least 1"):
        ModelConfig(drop_size=0)


@pytest.mark.gpu
def test_a_cuda_graph_drops_anew_at_each_replay() -> None:
    hashes, x, drop = HASHES.cuda(), torch.ones(64, 20, 4, 4, device="cuda"), DropBlock(0.3, 2, 0).cuda()
    drop(x, hashes)  # before the capture, as every kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = drop(x, hashes)
    drop.calls.zero_()
    on_cpu = DropBlock(0.3, 2, 0)
    for _ in range(3):
        graph.replay()
        assert torch.equal(y.cpu() == 0, on_cpu(x.cpu(), HASHES) == 0)
