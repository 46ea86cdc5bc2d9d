"""Layers that several parts are made of: those of the authors' TensorFlow graph, a convolution of residual networks, vectors of
length 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution with padding 1, Glorot uniform weights, zero biases, and channels last in memory."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv.to(memory_format=torch.channels_last)


def he_conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """A size x size convolution of the same padding, without bias, with He normal weights, and channels last in memory."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv.to(memory_format=torch.channels_last)


def pool(x: Tensor) -> Tensor:
    """2 x 2 max-pooling; an odd height or width rounds up: (n, F, h, w) -> (n, F, ceil(h / 2), ceil(w / 2))."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def unit(x: Tensor) -> Tensor:
    """Vectors (..., D), each divided by its L2 norm; zeros stay zeros."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
