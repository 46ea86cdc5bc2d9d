"""Convolution of each episode's images with the episode's own kernel, as one matrix product for each episode, on a GPU.

The plain operation is a convolution with one group for each episode; in float32 cuDNN runs these groups one after the other.

Shapes: B episodes of n images, F channels in and G out, P = h * w pixels of a map, 9 taps of a kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def supports(x: Tensor) -> bool:
    """True if `convolve` is the faster way for the device of `x`."""
    return x.is_cuda


def convolve(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """x (B, n, F, h, w), kernel (B, G, F, 3, 3), bias (B, G) -> (B, n, G, h, w), zero-padded.

    The result has the dtype of `x`, or that of autocast, and G last in memory; fastest if F is last in the memory of `x`.
    The same input gives the same bits.
    """
    device, (height, width) = x.device.type, x.shape[3:]
    if torch.is_autocast_enabled(device):  # cast here: the backward pass runs outside of autocast
        x = x.to(torch.get_autocast_dtype(device))
    pixels = x.permute(0, 1, 3, 4, 2).flatten(2, 3)  # (B, n, P, F)
    taps = kernel.to(x.dtype).flatten(3).permute(0, 3, 2, 1)  # (B, 9, F, G)
    y = _Convolve.apply(pixels, taps.flatten(1, 2), height, width) + bias[:, None].to(x.dtype)  # (B, n * P, G)
    out: Tensor = y.unflatten(1, (x.shape[1], height, width)).permute(0, 1, 4, 2, 3)
    return out


class _Convolve(torch.autograd.Function):
    """pixels (B, n, P, F), taps (B, 9 * F, G) -> (B, n * P, G)."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, taps: Tensor, height: int, width: int) -> Tensor:
        columns = _columns(pixels, _neighbours(height, width, pixels.device)[0])  # (B, n * P, 9 * F)
        ctx.save_for_backward(columns, taps)
        ctx.shape, ctx.size = pixels.shape, (height, width)
        return torch.bmm(columns, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, taps = ctx.saved_tensors
        filters = ctx.shape[3]
        opposite = _neighbours(*ctx.size, grad.device)[1]
        # Gathering the gradients of a pixel's neighbours adds nothing up, so the order of additions is always the same.
        around = _columns(grad.unflatten(1, ctx.shape[1:3]), opposite)  # (B, n * P, 9 * G)
        back = taps.unflatten(1, (9, filters)).transpose(2, 3).flatten(1, 2)  # (B, 9 * G, F)
        grad_pixels = torch.bmm(around, back).view(ctx.shape)
        return grad_pixels, torch.bmm(columns.transpose(1, 2), grad), None, None


def _columns(pixels: Tensor, neighbours: Tensor) -> Tensor:
    """pixels (B, n, P, F) -> (B, n * P, 9 * F): the values at each pixel's `neighbours` (P * 9,); pixel P is zero."""
    with_zeros = F.pad(pixels, (0, 0, 0, 1))  # (B, n, P + 1, F)
    return with_zeros.index_select(2, neighbours).view(len(pixels), -1, 9 * pixels.shape[3])


@cache  # unbounded: a CUDA graph keeps the addresses of these tensors
def _neighbours(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of each pixel's 3 x 3 neighbours in row-major order (P * 9,), P beyond the border; and in reverse order."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    step = torch.arange(9)
    rows, columns = (y.reshape(-1, 1) + step // 3 - 1, x.reshape(-1, 1) + step % 3 - 1)  # (P, 9)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    number = torch.where(inside, rows * width + columns, height * width)  # (P, 9)
    return number.flatten().to(device), number.flip(1).flatten().to(device)
