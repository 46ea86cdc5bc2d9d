"""Nearest class mean by cosine similarity.

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, D values of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.vectors import Vectors, cosine_similarities
from lgm_dist.model.parts import register_head


@register_head("class_means")
class ClassMeans(nn.Module):
    """Softmax of the cosine similarities to the class means, times a learned temperature that starts at 10."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.vectors = Vectors(config, channels)
        self.temperature = nn.Parameter(torch.tensor(10.0))

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """support (B, S, G, h, w), query (B, T, G, h, w) -> log-probabilities (B, T, N)."""
        means = self.vectors(support).unflatten(1, (ways, -1)).mean(dim=2)  # (B, N, D)
        similarities = cosine_similarities(self.vectors(query), means)  # (B, T, N)
        return (self.temperature * similarities).log_softmax(-1)  # (B, T, N)
