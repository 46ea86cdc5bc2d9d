"""Batch norm, ReLU and 2 x 2 max-pooling after a convolution of the backbone, on one GPU in training, in Triton.

Plain operations pass over the feature map about ten times, and every pass waits for memory. Here the forward pass reads the
map twice (statistics; normalise, ReLU and pool), and the backward pass reads it once and writes its gradient once:

- The largest normalised value of a window is where the map is largest, or smallest if the scale is negative. That value of
  the map, the window's peak, is kept, so the sums of the backward pass run over the peaks: a quarter of the map.
- The backward pass finds again from the map which of the four pixels it was and whether ReLU let it through.

Nothing is atomic: programs write partial results, and one kernel combines them in a fixed order, so the same input gives the
same bits. Nothing waits for the device, so a CUDA graph can capture all of it. The arithmetic is in float32.

Triton is imported by the first call of `available` that needs it; the package and CPUs do without it.

Shapes: n images, F channels, h x w pixels. In memory a map is a matrix (rows, F) whose rows are its n * h * w pixels.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lgm_dist.model.norm import Norm

log = logging.getLogger(__name__)

PROGRAMS = 512
"""Largest number of partial results: about four programs for each of an H200's 132 multiprocessors, and a power of two."""
_DTYPES = (torch.float32, torch.bfloat16)


def available(x: Tensor) -> bool:
    """True if `norm_relu_pool` runs on the device and dtype of `x`: on CUDA, or anywhere under TRITON_INTERPRET=1."""
    if x.dtype not in _DTYPES:
        return False
    there = _starts() if x.is_cuda else os.environ.get("TRITON_INTERPRET") == "1"
    return there and _kernels() is not None


def supports(x: Tensor, norm: Norm) -> bool:
    """True if conv4 should use `norm_relu_pool` for input `x` of a block: in training on a GPU, without other workers."""
    return x.is_cuda and norm.uses_batch and norm.all_reduce is None and available(x)


def norm_relu_pool(y: Tensor, conv_bias: Tensor, norm: Norm, pool: bool) -> Tensor:
    """y (n, F, h, w) -> (n, F, ceil(h / 2), ceil(w / 2)), or (n, F, h, w) if `pool` is False; dtype of y, channels last.

    `y` is a convolution's output without its bias `conv_bias` (F,): normalisation subtracts the bias again, so it only moves
    the running mean, and its gradient is zero. Needs `available(y)` and `norm.uses_batch`, and no other worker.
    """
    assert available(y)
    assert norm.uses_batch
    assert norm.all_reduce is None
    out: Tensor = _NormReluPool.apply(y, conv_bias, norm.weight, norm.bias, norm, pool)
    return out


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, norm: Norm, pool: bool) -> Tensor:
        assert y.numel() < 2**30 * y.shape[1], "rows are counted in 32 bits"
        assert {t.dtype for t in (conv_bias, weight, bias, norm.running_mean, norm.running_var)} == {torch.float32}
        y = y.contiguous(memory_format=torch.channels_last)
        n, filters, height, width = y.shape
        size = (n, -(-height // 2), -(-width // 2), filters) if pool else (n, height, width, filters)
        out = y.new_empty(size).permute(0, 3, 1, 2)  # (n, F, ceil(h / 2), ceil(w / 2)) or (n, F, h, w), channels last
        peaks = torch.empty_like(out) if pool else y
        with torch.cuda.device_of(y):
            mean, inverse_std = _normalisation(y, conv_bias, norm)  # (F,)
            _on_windows("apply", y, out, pool, mean, inverse_std, weight, bias, out, peaks)
        ctx.save_for_backward(y, peaks, mean, inverse_std, weight, bias)
        ctx.pool = pool
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, peaks, mean, inverse_std, weight, bias = ctx.saved_tensors
        norm = mean, inverse_std, weight, bias
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_y, grad_weight, grad_bias = torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias)
        with torch.cuda.device_of(y):
            partial, _ = _partial_results("gradient_sums", peaks, grad, *norm)
            _combine("combine_gradient_sums", partial, inverse_std, grad_weight, grad_bias)
            _on_windows("input_gradient", y, grad, ctx.pool, *norm, grad_weight, grad_bias, grad, grad_y, _rows(y))
        return grad_y, torch.zeros_like(grad_bias), grad_weight, grad_bias, None, None


def _normalisation(y: Tensor, conv_bias: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation (F,) of y (n, F, h, w); moves the running averages."""
    results = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_var)
    partial, each = _partial_results("moments", y)
    settings = (float(norm.momentum), float(norm.epsilon), _rows(y), each)
    _combine("combine_moments", partial, conv_bias, norm.running_mean, norm.running_var, *results, *settings)
    return results


def _partial_results(kernel: str, x: Tensor, *tensors: Tensor) -> tuple[Tensor, int]:
    """Two numbers for each channel from each program (programs, 2, F), and the number of rows of x (n, F, h, w) in a program.

    A tile has 8 KiB and two more are always being loaded: with four programs on a multiprocessor that is 64 KiB, about twice
    what an H200's memory delivers during its latency.
    """
    filters, rows, channels = x.shape[1], _rows(x), _channels(x)
    tile = 8192 // (channels * x.element_size())
    each = -(-rows // min(PROGRAMS, -(-rows // tile)))
    programs = -(-rows // each)
    partial = x.new_empty(programs, 2, filters, dtype=torch.float32)
    grid = (programs, -(-filters // channels))
    _run(kernel, grid, 8, x, *tensors, partial, rows, each, filters, tile, channels)
    return partial, each


def _combine(kernel: str, partial: Tensor, *arguments: Tensor | float) -> None:
    """Combine the programs' results, eight channels in a program: memory is read 32 bytes at a time."""
    programs, _, filters = partial.shape
    _run(kernel, (-(-filters // 8),), 8, partial, *arguments, programs, filters, _power_of_two(programs), 8)


def _on_windows(kernel: str, y: Tensor, pooled: Tensor, pool: bool, *arguments: Tensor | int) -> None:
    """Run a kernel over the windows of y (n, F, h, w), or over its pixels if `pool` is False; `pooled` has a value for each.

    In a tile each thread has eight values for each of a window's four pixels. All are loaded at once, and the registers are
    few enough for at least five programs on a multiprocessor.
    """
    filters, rows, channels = y.shape[1], _rows(pooled), _channels(y)
    tile = 1024 // channels
    grid = (-(-rows // tile), -(-filters // channels))
    _run(kernel, grid, 4, y, *arguments, rows, filters, *y.shape[2:], pool, tile, channels)


def _run(kernel: str, grid: tuple[int, ...], warps: int, *arguments: Tensor | float) -> None:
    # enable_fp_fusion: the default until Triton 3.10
    getattr(_kernels(), kernel)[grid](*arguments, num_warps=warps, enable_fp_fusion=True)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _channels(x: Tensor) -> int:
    """Channels of a tile: a power of two, as Triton requires."""
    return min(_power_of_two(x.shape[1]), 64)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@functools.cache
def _kernels() -> Any:
    """The module of the kernels, or None without Triton; a kernel is compiled when it is first used."""
    try:
        from lgm_dist.model.kernels import triton_kernels
    except ImportError:
        return None
    return triton_kernels


@functools.cache
def _starts() -> bool:
    """True if a kernel runs on this machine's GPU; Triton builds its launcher with a C compiler, which may be missing."""
    if _kernels() is None:
        return False
    try:
        _partial_results("moments", torch.zeros(1, 1, 1, 1, device="cuda"))
    except Exception as error:
        log.warning("Triton does not work on this machine, so training uses slower plain operations: %s", error)
        return False
    return True
