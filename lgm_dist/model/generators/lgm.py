"""The paper's generator: a context encoder reads the support set, and two linear layers generate two convolutions from it.

Shape legend: B episodes, S support images, n images, F channels of the backbone's feature maps, G = config.filters, h x w
size of a map, Z noise size; a context has a mean and a log-variance for each of Z values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.kernels import episode_convolution
from lgm_dist.model.layers import conv3x3, pool
from lgm_dist.model.norm import Norm
from lgm_dist.model.parts import Weights, register_generator


class ContextEncoder(nn.Module):
    """Feature maps of single support images to their contexts; the mean of these is the context of the episode."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        f = config.filters
        self.convs = nn.ModuleList([conv3x3(channels, f), conv3x3(f, f), conv3x3(f, 2 * config.noise_size)])
        self.norms = nn.ModuleList(Norm(config, f) for _ in range(2))

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, F, h, w), feature maps of the support images of `episodes` episodes -> (n, 2Z)."""
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = pool(norm(F.relu_(conv(x)), episodes))  # (n, G, ceil(h / 2), ceil(w / 2)); ReLU before the norm
        context: Tensor = self.convs[2](x).mean(dim=(2, 3))  # (n, 2Z)
        return context


class WeightGenerator(nn.Module):
    """One linear layer from z to the kernel and the biases of a generated 3 x 3 convolution."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight_norm = config.weight_norm
        size = (9 * inputs + 1) * outputs
        self.w1 = nn.Parameter(torch.empty(config.noise_size, size))
        self.b1 = nn.Parameter(torch.zeros(size))
        nn.init.xavier_uniform_(self.w1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, Z) -> kernels (B, outputs, inputs, 3, 3), each filter of L2 norm 1, and biases (B, outputs), which are not
        normalised."""
        flat = torch.addmm(self.b1, z, self.w1)  # (B, 9 * inputs * outputs + outputs)
        kernel = flat[:, : -self.outputs].unflatten(1, (self.outputs, -1))  # (B, outputs, 9 * inputs)
        if self.weight_norm:
            kernel = kernel * kernel.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        return kernel.unflatten(2, (-1, 3, 3)), flat[:, -self.outputs :]


@register_generator("lgm")
class LGMGenerator(nn.Module):
    """Two generated 3 x 3 convolutions, the first followed by ReLU and pooling; no normalisation."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.channels = config.filters
        self.kernels = config.kernels
        self.encoder = ContextEncoder(config, channels)
        self.layers = nn.ModuleList(
            WeightGenerator(config, inputs, config.filters) for inputs in (channels, config.filters)
        )

    def encode(self, features: Tensor, episodes: int) -> Tensor:
        """features (n, F, h, w) -> contexts of the single images (n, 2Z)."""
        codes: Tensor = self.encoder(features, episodes)
        return codes

    def generate(self, codes: Tensor, _ways: int, noise: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """codes (B, S, 2Z), noise (B, 2, Z) or None -> kernels (B, G, F, 3, 3) and biases (B, G) of the two layers."""
        mean, log_variance = codes.mean(dim=1).chunk(2, dim=1)  # (B, Z)
        draws = [mean, mean] if noise is None else [mean + (log_variance / 2).exp() * noise[:, i] for i in range(2)]
        return [layer(z) for layer, z in zip(self.layers, draws, strict=True)]

    def generate_unequal(
        self, codes: Tensor, shots: Sequence[int], noise: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """As `generate`: the context is the mean over all support images, whichever class they show."""
        return self.generate(codes, len(shots), noise)

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, n, F, h, w), each episode's through its own weights -> (B, n, G, ceil(h / 2), ceil(w / 2))."""
        if self.kernels == "auto" and episode_convolution.supports(features):
            return _by_matrix_products(features, weights)
        return _by_groups(features, weights)


def _by_groups(features: Tensor, weights: Weights) -> Tensor:
    """Each layer as one convolution with a group for each episode."""
    episodes = len(features)
    (kernel1, bias1), (kernel2, bias2) = weights
    x = features.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)  # (n, B * F, h, w), channels last in memory
    x = F.conv2d(x, kernel1.flatten(0, 1), bias1.flatten(), padding=1, groups=episodes)  # (n, B * G, h, w)
    x = pool(F.relu_(x))  # (n, B * G, ceil(h / 2), ceil(w / 2))
    x = F.conv2d(x, kernel2.flatten(0, 1), bias2.flatten(), padding=1, groups=episodes)
    maps: Tensor = x.contiguous().unflatten(1, (episodes, -1)).transpose(0, 1)  # (B, n, G, ceil(h / 2), ceil(w / 2))
    return maps


def _by_matrix_products(features: Tensor, weights: Weights) -> Tensor:
    """Each layer as one matrix product for each episode."""
    (kernel1, bias1), (kernel2, bias2) = weights
    x = episode_convolution.convolve(features, kernel1, bias1).flatten(0, 1)  # (B * n, G, h, w)
    x = pool(F.relu(x)).unflatten(0, features.shape[:2])  # (B, n, G, ceil(h / 2), ceil(w / 2))
    return episode_convolution.convolve(x, kernel2, bias2)  # (B, n, G, ceil(h / 2), ceil(w / 2))
