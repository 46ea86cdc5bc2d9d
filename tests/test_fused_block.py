"""The fused block against plain operations in float64: values, gradients, moving averages, ties, NaN.

Without a GPU its kernels run in Triton's interpreter. A process chooses it once, when it first imports Triton, so this file
runs itself as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.kernels import fused_block
from lgm_dist.model.norm import Norm

NAMES = ("out", "gradient", "weight's gradient", "bias's gradient", "running mean", "running variance")
CASES = [
    (5, 24, 6, 8, torch.float32, True),
    (3, 64, 7, 5, torch.float32, True),
    (3, 64, 5, 7, torch.float32, False),
    (4, 24, 7, 4, torch.bfloat16, True),
    (3, 64, 4, 4, torch.bfloat16, False),
    (2, 80, 3, 3, torch.float32, True),
    (2, 32, 4, 3, torch.float32, True),
    (2, 96, 3, 4, torch.bfloat16, True),
    (2, 128, 3, 3, torch.float32, True),
    (2, 5, 1, 4, torch.float32, True),
    (2, 24, 1, 1, torch.float32, False),
]
LARGE = [
    (192, 64, 32, 32, torch.float32, True),
    (192, 64, 32, 32, torch.bfloat16, True),
    (832, 64, 21, 21, torch.float32, True),
    (192, 64, 4, 4, torch.float32, False),
]
"""Sizes for a GPU: (n, F, h, w), type, pooled or not."""


def make_norm(filters: int, device: str) -> Norm:
    """Scales of both signs, one of them zero; averages that are neither 0 nor 1."""
    torch.manual_seed(1)
    norm = Norm(ModelConfig(), filters)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(norm.running_var)
    with torch.no_grad():
        norm.weight[3] = 0
    assert 0 < int((norm.weight < 0).sum()) < filters - 1
    return norm.train().to(device)


def make_map(n: int, filters: int, h: int, w: int, dtype: torch.dtype, device: str) -> Tensor:
    """Channels with different means and deviations, rounded to `dtype` so that the reference sees the same values."""
    torch.manual_seed(2)
    y = torch.randn(n, h, w, filters) * (0.1 + 3 * torch.rand(filters)) + 2 * torch.randn(filters)
    return y.to(device, dtype).permute(0, 3, 1, 2)


def plain(y: Tensor, conv_bias: Tensor, norm: Norm, pool: bool) -> Tensor:
    y = y + conv_bias[:, None, None]
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.epsilon)
    return F.max_pool2d(F.relu(y), 2, ceil_mode=True) if pool else F.relu(y)


def pair(y: Tensor, pool: bool) -> Iterator[tuple[Tensor, ...]]:
    """The values that NAMES lists, of the fused block and of plain operations in float64, for the same output gradient."""
    for block, dtype in ((fused_block.norm_relu_pool, y.dtype), (plain, torch.float64)):
        norm = make_norm(y.shape[1], y.device.type)
        torch.manual_seed(3)
        conv_bias = torch.randn(y.shape[1]).to(y.device)
        if block is plain:
            norm, conv_bias = norm.double(), conv_bias.double()
        x, conv_bias = y.detach().to(dtype).requires_grad_(), conv_bias.requires_grad_()
        out = block(x, conv_bias, norm, pool)
        if block is not plain:
            assert out.dtype == y.dtype
            assert out.is_contiguous(memory_format=torch.channels_last)
        above = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
        out.backward(above.to(out))
        assert conv_bias.grad is not None
        if block is not plain:
            assert not conv_bias.grad.any()
            assert x.grad is not None
            assert x.grad.dtype == y.dtype
        yield out, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def compare(y: Tensor, pool: bool) -> None:
    for name, ours, known in zip(NAMES, *pair(y, pool), strict=True):
        half = y.dtype == torch.bfloat16 and name in NAMES[:2]  # rounded once, at the end; the interpreter truncates
        rtol, atol = (2**-8 if y.is_cuda else 2**-7, 1e-5) if half else (1e-4, 2e-5)
        if name in NAMES[2:4]:  # sums of many numbers of both signs
            atol *= max(float(known.abs().max()), 1.0)
        wrong = ~torch.isclose(ours.double(), known, rtol, atol)
        worst = float((ours - known).abs().max())
        # One of a million values may be so close to zero that rounding decides whether ReLU lets its gradient through.
        assert int(wrong.sum()) <= wrong.numel() // 10**6, f"{name} of {tuple(y.shape)}, pooled {pool}: off by {worst}"


def check_ties(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        y = make_map(3, 24, 5, 6, dtype, device)
        compare((y - y.mean((0, 2, 3), keepdim=True)).sign(), True)


def check_not_finite(device: str) -> None:
    """A channel with a NaN, an infinity or an overflowing variance becomes NaN; the other channels do not change."""
    for pool in (True, False):
        y = make_map(2, 24, 5, 4, torch.float32, device)
        norm, zeros = make_norm(24, device), torch.zeros(24, device=device)
        known = fused_block.norm_relu_pool(y, zeros, norm, pool)
        y[1, 3, 2, 1], y[0, 7, 4, 3], y[0, 11], y[1, 23, 0, 0] = float("nan"), float("inf"), 1e20, -float("inf")
        out = fused_block.norm_relu_pool(y, zeros, norm, pool)
        bad = torch.zeros(24, dtype=torch.bool, device=device)
        bad[[3, 7, 11, 23]] = True
        assert out[:, bad].isnan().all()
        assert torch.equal(out[:, ~bad], known[:, ~bad])


def check_one_value(device: str) -> None:
    """A single value, which F.batch_norm refuses: it is its own mean, and its variance is zero, not 0 / 0."""
    for pool in (True, False):
        norm, y = make_norm(24, device), make_map(1, 24, 1, 1, torch.float32, device).requires_grad_()
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        out = fused_block.norm_relu_pool(y, torch.ones(24, device=device), norm, pool)
        torch.testing.assert_close(out.flatten(), norm.bias.relu())
        torch.testing.assert_close(norm.running_mean, mean.lerp(y.detach().flatten() + 1, norm.momentum))
        torch.testing.assert_close(norm.running_var, var * (1 - norm.momentum))
        out.sum().backward()
        assert y.grad is not None
        assert norm.weight.grad is not None
        torch.testing.assert_close(y.grad, torch.zeros_like(y), rtol=0, atol=1e-4)
        torch.testing.assert_close(norm.weight.grad, torch.zeros_like(norm.weight), rtol=0, atol=1e-4)


def check_gradients_of_any_strides(device: str) -> None:
    """The gradient of a sum is one expanded number; that of joined channels is a slice of a larger tensor."""
    y, found = make_map(2, 24, 5, 4, torch.float32, device).requires_grad_(), []
    for view in (lambda out: out, lambda out: out.contiguous() * 1, lambda out: torch.cat([out, out], 1)[:, :24]):
        out = fused_block.norm_relu_pool(y, torch.zeros(24, device=device), make_norm(24, device), True)
        found += torch.autograd.grad(view(out).sum(), y)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def check_autocast(device: str) -> None:
    """The convolution returns bfloat16, the norm's parameters are float32; each gets a gradient of its own dtype."""
    weight, conv_bias = torch.randn(24, 3, 3, 3, device=device), torch.zeros(24, device=device)
    x, norm = torch.randn(2, 3, 6, 5, device=device), make_norm(24, device)
    leaves = [weight.requires_grad_(), conv_bias.requires_grad_(), norm.weight, norm.bias]
    with torch.autocast(device, torch.bfloat16):
        y = F.conv2d(x, weight, padding=1)
        out = fused_block.norm_relu_pool(y, conv_bias, norm, True)
    assert y.dtype == out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads)
    assert [bool(grad.any()) for grad in grads] == [True, False, True, True]


CHECKS = (check_ties, check_not_finite, check_one_value, check_gradients_of_any_strides, check_autocast)


def interpreted() -> None:
    assert fused_block.available(torch.zeros(1))
    assert not fused_block.available(torch.zeros(1, dtype=torch.float64))
    for case in CASES:
        compare(make_map(*case[:5], "cpu"), case[5])
    fused_block.PROGRAMS = 3  # so few that each takes several tiles
    for dtype in (torch.float32, torch.bfloat16):
        compare(make_map(4, 64, 11, 13, dtype, "cpu"), True)
    for check in CHECKS:
        check("cpu")


def run(program: list[str], **environment: str) -> None:
    done = subprocess.run([sys.executable, *program], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests below run the compiled kernels")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_all_of_it_in_the_interpreter() -> None:
    run([__file__], TRITON_INTERPRET="1")


def test_triton_is_neither_needed_nor_imported_without_a_gpu() -> None:
    code = "import sys, torch\nfrom lgm_dist.model.kernels.fused_block import available\nassert not available(torch.zeros(1))\n"
    run(["-c", code + "assert 'triton' not in sys.modules"], TRITON_INTERPRET="0")
    run(["-c", f"import sys\nsys.modules['triton'] = None\n{code}"], TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_values_gradients_and_averages(case: tuple[int, int, int, int, torch.dtype, bool]) -> None:
    compare(make_map(*case[:5], "cuda"), case[5])


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_special_cases(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_each_time_and_in_a_cuda_graph(dtype: torch.dtype, pool: bool) -> None:
    y, other = (make_map(96, 64, 21, 21, dtype, "cuda").mul(k).requires_grad_() for k in (1, 2))
    norm, conv_bias = make_norm(64, "cuda"), torch.ones(64, device="cuda", requires_grad=True)
    averages, start = (norm.running_mean, norm.running_var), (norm.running_mean.clone(), norm.running_var.clone())

    def step(y: Tensor) -> tuple[Tensor, ...]:
        for average, value in zip(averages, start, strict=True):
            average.copy_(value)
        out = fused_block.norm_relu_pool(y, conv_bias, norm, pool)
        grads = torch.autograd.grad(out.square().sum(), (y, conv_bias, norm.weight, norm.bias))
        return out.detach(), *grads, *(average.clone() for average in averages)

    def assert_same(ours: tuple[Tensor, ...], known: tuple[Tensor, ...]) -> None:
        for mine, expected in zip(ours, known, strict=True):
            assert torch.equal(mine, expected)

    known = step(other)
    for _ in range(3):
        assert_same(step(other), known)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(y)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step(y)
    with torch.no_grad():
        y.copy_(other)
    for _ in range(2):
        graph.replay()
        assert_same(captured, known)


if __name__ == "__main__":
    interpreted()
