"""The paper's two generated convolutions beside the features: x + a * g(x)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.generators.lgm import LGMGenerator, WeightGenerator
from lgm_dist.model.kernels import episode_convolution
from lgm_dist.model.parts import Weights, register_generator


@register_generator("residual")
class Residual(LGMGenerator):
    """Codes and weights as the paper's; the convolutions keep the size of the maps, so they are not pooled.

    a is learned from 0, so that training starts with the features as they are.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.channels = channels
        self.layers[1] = WeightGenerator(config, config.filters, channels)
        self.share = nn.Parameter(torch.zeros(()))

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, n, F, h, w) -> (B, n, F, h, w)."""
        (kernel1, bias1), (kernel2, bias2) = weights
        hidden = F.relu(self._convolve(features, kernel1, bias1))  # (B, n, G, h, w)
        moved: Tensor = features + self.share * self._convolve(hidden, kernel2, bias2)  # (B, n, F, h, w)
        return moved

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """x (B, n, F, h, w), each episode's with its own kernel -> (B, n, G, h, w)."""
        if self.kernels == "auto" and episode_convolution.supports(x):
            return episode_convolution.convolve(x, kernel, bias)
        images = x.transpose(0, 1).flatten(1, 2)  # (n, B * F, h, w)
        y = F.conv2d(images, kernel.flatten(0, 1), bias.flatten(), padding=1, groups=len(x))  # (n, B * G, h, w)
        maps: Tensor = y.unflatten(1, (len(x), -1)).transpose(0, 1)  # (B, n, G, h, w)
        return maps
