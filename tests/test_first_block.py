"""The first block, a few images at a time, against plain operations: values, gradients, moving averages, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model import LGMNet
from lgm_dist.model.kernels import first_block
from lgm_dist.model.norm import Norm

FILTERS = 8
Layers = tuple[nn.Conv2d, Norm]


def layers(seed: int = 0) -> Layers:
    """A convolution and a norm, half of whose scales are negative."""
    torch.manual_seed(seed)
    conv, norm = (
        nn.Conv2d(3, FILTERS, 3, padding=1).double(),
        Norm(ModelConfig(), FILTERS).double(),
    )
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert 0 < int((norm.weight < 0).sum()) < FILTERS
    return conv, norm.train()


def plain(x: Tensor, conv: nn.Conv2d, norm: Norm) -> Tensor:
    """torch's own, pooled last."""
    y = conv(x)
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.epsilon)
    return F.max_pool2d(F.relu(y), 2, ceil_mode=True)


@pytest.mark.parametrize("pixels", [1, 700, 10**6], ids="pieces of {} pixels".format)
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (21, 21), (1, 1), (2, 1)], ids=str)
def test_values_gradients_and_averages_are_the_plain_ones(
    size: tuple[int, int], pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_block, "PIXELS_AT_ONCE", pixels)
    x = torch.randn(13, 3, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for block in (first_block.first_block, plain):
        conv, norm = layers()
        y = block(x, conv, norm)
        torch.manual_seed(1)
        y.backward(torch.randn_like(y))
        grads = [p.grad for p in (conv.weight, norm.weight, norm.bias)]
        assert conv.bias is not None
        assert conv.bias.grad is not None
        assert float(conv.bias.grad.abs().max()) < 1e-12, "the mean takes a bias away again"
        found.append([y.detach(), *grads, norm.running_mean, norm.running_var])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_pixels_numbered_beyond_sixteen_bits() -> None:
    """182 x 181 pixels are more than 2^15: the last window's largest has to be found again in the backward pass."""
    torch.manual_seed(2)
    x, found = torch.randn(1, 3, 182, 181, dtype=torch.float64), []
    for block in (first_block.first_block, plain):
        conv, norm = layers()
        block(x, conv, norm)[..., -1, -1].sum().backward()
        found.append(conv.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 3, 6, 5), (2, 1, 2, 3), (3, 2, 1, 1)], ids=str)
def test_sums_over_patches_are_those_of_unfolded_images(shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(3)
    x = torch.randn(shape)
    patches = F.unfold(x.double(), 3, padding=1)  # (n, C * 9, H * W), channel before row and column
    patches = patches.unflatten(1, (-1, 9)).transpose(1, 2).flatten(1, 2).transpose(0, 1).flatten(1)  # (P, n * H * W)
    sums, products = first_block.patch_sums(x)
    torch.testing.assert_close(sums, patches.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products, patches @ patches.T, rtol=1e-12, atol=1e-12)


def test_equal_pixels_send_the_gradient_where_pooling_does() -> None:
    """A map of one value: all four of a window are the largest, and one of them gets the gradient."""
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    found = []
    for block in (first_block.first_block, plain):
        conv, norm = layers()
        block(x, conv, norm).square().sum().backward()
        found.append(conv.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "pieces"),
    [
        (ModelConfig(), True),
        (ModelConfig(norm_scope="worker"), True),
        (ModelConfig(norm_scope="episode"), False),
        (ModelConfig(norm="group"), False),
        (ModelConfig(kernels="reference"), False),
    ],
    ids=str,
)
def test_the_backbone_uses_it_if_it_is_equal(
    config: ModelConfig, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, block = [], first_block.first_block
    monkeypatch.setattr(first_block, "first_block", lambda *a: calls.append(1) or block(*a))
    model = LGMNet(config)
    support, query = torch.randn(2, 2, 3, 16, 16), torch.randn(2, 1, 3, 16, 16)
    model.train()(support, query, 2)
    assert bool(calls) == pieces
    calls.clear()
    model.eval()(support, query, 2)
    model.train()(support.requires_grad_(), query, 2).sum().backward()
    assert not calls, "neither in evaluation nor if the images need a gradient"
    assert support.grad is not None


PROGRAM = """
import sys, torch
from pathlib import Path
from lgm_dist.config import ModelConfig
from lgm_dist.model.backbones.conv4 import Conv4
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
torch.set_num_threads(1)
backbone = Conv4(ModelConfig(channels=3, kernels=sys.argv[1])).train()
x = torch.randn(512, 3, 32, 32).contiguous(memory_format=torch.channels_last)
before = peak()
backbone(x, 1).sum().backward()
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_the_whole_map_is_never_in_memory() -> None:
    """512 images' map takes 128 MiB; the plain operations keep it, its normalised copy and their gradients."""
    used = {}
    for how in ("auto", "reference"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
        used[how] = int(done.stdout)
    assert used["reference"] - used["auto"] > 2 * 512 * 64 * 32 * 32 * 4
