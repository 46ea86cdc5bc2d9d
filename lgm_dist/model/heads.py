"""Heads: maps of support and query images to log-probabilities.

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, D = G * h * w values of an
image's map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.parts import register_head


@register_head("cosine")
class Cosine(nn.Module):
    """The paper's matching head: softmax of the cosine similarities to all support images, without a temperature.

    A class's probability is the sum over its support images.
    """

    def __init__(self, _config: ModelConfig, _channels: int) -> None:
        super().__init__()

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """support (B, S, G, h, w), query (B, T, G, h, w) -> log-probabilities (B, T, N)."""
        similarities = cosine_similarities(vectors(query), vectors(support))  # (B, T, S)
        by_class: Tensor = similarities.log_softmax(-1).unflatten(2, (ways, -1))  # (B, T, N, K)
        return by_class.logsumexp(-1)  # (B, T, N)


@register_head("class_means")
class ClassMeans(nn.Module):
    """Softmax of the cosine similarities to the class means, times a learned temperature that starts at 10."""

    def __init__(self, _config: ModelConfig, _channels: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(10.0))

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """support (B, S, G, h, w), query (B, T, G, h, w) -> log-probabilities (B, T, N)."""
        means = vectors(support).unflatten(1, (ways, -1)).mean(dim=2)  # (B, N, D)
        similarities = cosine_similarities(vectors(query), means)  # (B, T, N)
        return (self.temperature * similarities).log_softmax(-1)  # (B, T, N)


def vectors(maps: Tensor) -> Tensor:
    """maps (B, n, G, h, w) -> (B, n, D); bfloat16 becomes float32."""
    flat = maps.flatten(2)
    return flat.float() if flat.dtype == torch.bfloat16 else flat


def cosine_similarities(query: Tensor, others: Tensor) -> Tensor:
    """query (B, T, D), others (B, n, D) -> (B, T, n) in [-1, 1]; 0 for a vector of zeros.

    In full precision, also under autocast and with tf32: similarities differ by less than bfloat16 or tf32 resolve.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, others = _unit(query), _unit(others)
        if query.is_cuda:
            return (query.double() @ others.double().transpose(1, 2)).to(query.dtype)  # (B, T, n)
        return query @ others.transpose(1, 2)  # (B, T, n)


def _unit(x: Tensor) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
