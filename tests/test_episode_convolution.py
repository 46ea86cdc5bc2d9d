"""Convolutions with each episode's own kernel, against torch's convolution of one episode after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model import build_model
from lgm_dist.model.kernels.episode_convolution import convolve


def inputs(height: int, width: int, filters: int = 3, out: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(height * width)
    shapes = (2, 4, filters, height, width), (2, out, filters, 3, 3), (2, out)
    x, kernel, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return x, kernel, bias


def plain(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """One episode after the other."""
    return torch.stack([F.conv2d(*one, padding=1) for one in zip(x, kernel, bias, strict=True)])


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 2), (1, 1), (3, 5), (11, 11)])
def test_values_and_gradients(height: int, width: int) -> None:
    arguments = inputs(height, width)
    ours, known = convolve(*arguments), plain(*arguments)
    torch.testing.assert_close(ours, known)
    grad = torch.randn_like(known)
    for mine, theirs in zip(
        torch.autograd.grad(ours, arguments, grad), torch.autograd.grad(known, arguments, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(dtype: torch.dtype) -> None:
    """Under autocast bfloat16 and float32 maps, as norms return them, give bfloat16; backward runs outside of autocast."""
    arguments = inputs(4, 4)
    x, kernel, bias = (argument.detach().float().requires_grad_() for argument in arguments)
    with torch.autocast("cpu", torch.bfloat16):
        ours = convolve(x.to(dtype), kernel, bias)
    assert ours.dtype == torch.bfloat16
    known = plain(*arguments)
    torch.testing.assert_close(ours.double(), known, rtol=0.05, atol=0.1)
    grad = torch.randn_like(known)
    known.backward(grad)
    ours.backward(grad.bfloat16())
    for mine, theirs in zip((x, kernel, bias), arguments, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=0.02 * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_generator_on_a_gpu_is_that_of_the_cpu(kernels: str) -> None:
    """In float64, for an odd map and an even one."""
    torch.manual_seed(0)
    generator = build_model(ModelConfig(filters=8, kernels=kernels)).double().generator
    codes = torch.randn(3, 5, 64, dtype=torch.float64)
    weights = generator.generate(codes, 5, torch.randn(3, 2, 32, dtype=torch.float64))
    on_gpu = [(kernel.cuda(), bias.cuda()) for kernel, bias in weights]
    for size in (4, 11):
        features = torch.randn(3, 6, 8, size, size, dtype=torch.float64)
        known = generator.transform(features, weights)
        torch.testing.assert_close(generator.transform(features.cuda(), on_gpu).cpu(), known)
