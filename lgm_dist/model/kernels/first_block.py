"""The first block of conv4 on a CPU, a few images at a time: convolution, batch norm, ReLU and 2 x 2 max-pooling.

The feature map before pooling is by far the largest of the network (256 KiB for an image of 32 x 32 pixels), and plain
operations over it wait for memory. Here it is computed once, in pieces that fit into the cache, and never exists as a whole:

- If the norm's scale is positive, batch norm and ReLU do not change which of four pixels is the largest, so the map is pooled
  first. If the scale is negative, the filter of its channel is negated first.
- A value of the map is linear in a 3 x 3 patch of the image. Its mean and variance over all images, and the gradient through
  them, follow from sums over the patches. These do not depend on the filters: 27 x 27 numbers for three image channels.

Values and gradients equal those of the plain operations up to rounding.

Shapes: n images, C channels, F filters, H x W pixels, h x w = ceil(H / 2) x ceil(W / 2), P = 9 C values of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.model.norm import Norm

PIXELS_AT_ONCE = 8 * 1024
"""Pixels of the images in a piece; with 64 filters, 2 MiB of feature map."""


def supports(x: Tensor, norm: Norm) -> bool:
    """True if `first_block` can take `x` and `norm`: in training on a CPU in full precision, `x` without a gradient."""
    return norm.uses_batch and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not x.requires_grad


def first_block(x: Tensor, conv: nn.Conv2d, norm: Norm) -> Tensor:
    """x (n, C, H, W) -> (n, F, h, w). Needs `supports(x, norm)`."""
    assert conv.bias is not None
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(x.dtype)  # (F,)
    weight, bias = conv.weight * sign[:, None, None, None], conv.bias * sign
    out: Tensor = _FirstBlock.apply(x, weight, bias, norm.weight * sign, norm.bias, sign, norm)
    return out


def patch_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, C, H, W) -> sums over all n * H * W zero-padded 3 x 3 patches p: of p (P,) and of p p^T (P, P), in float64.

    A patch is ordered (row, column, channel). Its rows are three rows of the padded image. So the products of two rows of a
    patch, summed, are products of image rows 0, 1 or 2 apart, less those at the top or bottom edge that no patch has.
    """
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, 3, channels, height + 2, width, dtype=torch.float64)  # for each column of a patch
    padded[:, 0, :, 1:-1, 1:] = x[..., :-1]
    padded[:, 1, :, 1:-1] = x
    padded[:, 2, :, 1:-1, :-1] = x[..., 1:]
    lines = padded.flatten(3).flatten(1, 2)  # (n, 3 C, (H + 2) * W)

    def apart(rows: int) -> Tensor:
        upper, lower = lines[..., : lines.shape[2] - rows * width], lines[..., rows * width :]
        return torch.bmm(upper, lower.transpose(1, 2)).sum(0)  # (3 C, 3 C)

    def at(row: int) -> tuple[Tensor, Tensor]:
        line = padded[:, :, :, row].flatten(1, 2).transpose(0, 1).flatten(1)  # (3 C, n * W)
        return line.sum(1), line @ line.T  # (3 C,), (3 C, 3 C)

    (top, top_products), (bottom, bottom_products), total = at(1), at(height), lines.sum((0, 2))
    same, next_to, over_next = (apart(rows) for rows in range(3))
    products = [
        [same - bottom_products, next_to, over_next],
        [next_to.T, same, next_to],
        [over_next.T, next_to.T, same - top_products],
    ]
    return torch.cat([total - bottom, total, total - top]), torch.cat([torch.cat(row, 1) for row in products])


def _as_rows(weight: Tensor) -> Tensor:
    """Filters (F, C, 3, 3) -> (F, P) in float64, in the order of a patch."""
    return weight.permute(0, 2, 3, 1).flatten(1).double()


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
        pixels = x.shape[2] * x.shape[3]
        pooled = x.new_empty(n, height, width, len(weight)).permute(0, 3, 1, 2)  # (n, F, h, w), channels last in memory
        # the number of each window's largest pixel
        largest = torch.empty_like(pooled, dtype=torch.int16 if pixels <= 2**15 else torch.int32)
        for piece in _pieces(x):
            y = F.conv2d(x[piece], weight, bias, padding=1)  # (m, F, H, W)
            pooled[piece], largest[piece] = F.max_pool2d(y, 2, ceil_mode=True, return_indices=True)
        count = float(n * pixels)
        sums, products = patch_sums(x)  # (P,), (P, P)
        filters, average = _as_rows(weight), sums / count  # (F, P), (P,)
        covariance = products / count - torch.outer(average, average)  # (P, P)
        var = ((filters @ covariance) * filters).sum(1).clamp_min(0)  # (F,)
        mean, var, count = norm.track((filters @ average + bias) * sign, var, count)
        mean, var = (mean * sign).to(x.dtype), var.to(x.dtype)
        out = F.batch_norm(pooled, mean, var, gamma, beta, eps=norm.epsilon).relu_()  # (n, F, h, w)
        ctx.save_for_backward(x, weight, bias, gamma, pooled, largest, out, mean, var, sums, products)
        ctx.norm, ctx.count = norm, count
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gamma, pooled, largest, out, mean, var, sums, products = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grads[0], out, 0)  # (n, F, h, w)
        # In evaluation mode the native kernel returns just the two sums that are needed: of grad * normalised map, and of grad.
        _, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
            grad, pooled, gamma, mean, var, None, None, False, ctx.norm.epsilon, [False, True, True]
        )
        # The gradient of the map is scale * grad (0 for a pixel that is not the largest of its four) + slope * map + offset.
        scale, slope, offset = ctx.norm.input_gradient(gamma, grad_gamma, grad_beta, mean, var, ctx.count)
        grad_weight = torch.zeros_like(weight)
        for piece in _pieces(x):
            shape = x.new_empty(len(x[piece]), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)  # (m, F, H, W), not read
            grad_y = torch.ops.aten.max_pool2d_with_indices_backward(
                grad[piece], shape, [2, 2], [2, 2], [0, 0], [1, 1], True, largest[piece].long()
            )  # (m, F, H, W)
            grad_weight += torch.ops.aten.convolution_backward(
                grad_y, x[piece], weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
            )[1]
        filters, slope, offset = _as_rows(weight), slope.double(), offset.double()
        map_sums = filters @ sums + bias * (x.numel() // x.shape[1])  # (F,)
        # sums of products of the map's values and the patches
        map_products = filters @ products + torch.outer(bias.double(), sums)  # (F, P)
        rest = slope[:, None] * map_products + torch.outer(offset, sums)  # (F, P)
        grad_weight *= scale[:, None, None, None]
        grad_weight += rest.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        grad_bias = scale * grad_beta + slope * map_sums + offset * (x.numel() // x.shape[1])  # (F,)
        return None, grad_weight, grad_bias.to(bias.dtype), grad_gamma, grad_beta, None, None
