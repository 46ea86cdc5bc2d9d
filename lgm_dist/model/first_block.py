"""The extractor's first block on a CPU, piece by piece: convolution, batch norm, ReLU and 2 x 2 max-pool.

Its feature map before pooling is by far the largest of the network (256 KiB an image of 32 x 32 pixels), and passes over it
wait for memory. Batch norm and ReLU never change which of four pixels is the largest where the norm's scale is positive, so
the map is pooled before they are applied, a few images at a time while it lies in the cache, and never exists as a whole:
what is kept is a quarter of it, and the backward pass computes it anew. Where a scale is negative the channel's filter is
negated first. Values and gradients are those of the plain operations up to rounding.

Shapes: n images, C channels, F filters, H x W pixels, h x w = ceil(H / 2) x ceil(W / 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.model.norm import Norm, affine, moments, union

PIXELS_AT_ONCE = 16 * 1024
"""In a piece: of 64 filters, 4 MiB of feature map."""


def first_block(x: Tensor, conv: nn.Conv2d, norm: Norm) -> Tensor:
    """x (n, C, H, W), which gets no gradient -> (n, F, h, w). Wants `norm` in training, of kind batch, not per episode."""
    assert conv.bias is not None
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(x.dtype)  # (F,)
    weight, bias = conv.weight * sign[:, None, None, None], conv.bias * sign
    out: Tensor = _FirstBlock.apply(x, weight, bias, norm.weight * sign, norm.bias, sign, norm)
    return out


def _pieces(x: Tensor) -> Iterator[slice]:
    size = max(PIXELS_AT_ONCE // (x.shape[2] * x.shape[3]), 1)
    for first in range(0, len(x), size):
        yield slice(first, first + size)


class _FirstBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, sign: Tensor, norm: Norm
    ) -> Tensor:
        n, height, width = len(x), -(-x.shape[2] // 2), -(-x.shape[3] // 2)
        pooled = x.new_empty(n, height, width, len(weight)).permute(0, 3, 1, 2)  # (n, F, h, w), channels last in memory
        parts = []
        for piece in _pieces(x):
            y = F.conv2d(x[piece], weight, bias, padding=1)  # (m, F, H, W)
            parts.append(moments(y))
            pooled[piece] = F.max_pool2d(y, 2, ceil_mode=True)
        mean, var, count = union(parts)
        mean, var, count = norm.settle(mean * sign, var, count)
        mean, var = (mean * sign).to(x.dtype), var.to(x.dtype)
        out = F.batch_norm(pooled, mean, var, gamma, beta, eps=norm.epsilon).relu_()  # (n, F, h, w)
        ctx.save_for_backward(x, weight, bias, gamma, pooled, out, mean, var)
        ctx.norm, ctx.count = norm, count
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gamma, pooled, out, mean, var = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grads[0], out, 0)  # (n, F, h, w)
        # In its evaluation mode the native kernel gives just the two sums needed: of grad * normalised map, and of grad.
        _, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
            grad, pooled, gamma, mean, var, None, None, False, ctx.norm.epsilon, [False, True, True]
        )
        scale, slope, offset = ctx.norm.input_gradient(gamma, grad_gamma, grad_beta, mean, var, ctx.count)
        grad *= scale[:, None, None]
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for piece in _pieces(x):
            y = F.conv2d(x[piece], weight, bias, padding=1)  # (m, F, H, W)
            largest = F.max_pool2d(y, 2, ceil_mode=True, return_indices=True)[1]  # (m, F, h, w)
            grad_y = torch.ops.aten.max_pool2d_with_indices_backward(
                grad[piece], y, [2, 2], [2, 2], [0, 0], [1, 1], True, largest
            )  # (m, F, H, W)
            grad_y += affine(y, slope, offset)
            _, grad_w, grad_b = torch.ops.aten.convolution_backward(
                grad_y, x[piece], weight, [len(bias)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True]
            )
            grad_weight += grad_w
            grad_bias += grad_b
        return None, grad_weight, grad_bias, grad_gamma, grad_beta, None, None
