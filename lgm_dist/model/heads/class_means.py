"""Nearest class mean by cosine similarity.

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, D values of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.vectors import Vectors, cosine_similarities, means_of_classes
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
        return self.logits(support, query, [support.shape[1] // ways] * ways).log_softmax(-1)  # (B, T, N)

    def logits(self, support: Tensor, query: Tensor, shots: Sequence[int]) -> Tensor:
        """See `UnequalHead`."""
        return self.similarities(means_of_classes(self.vectors(support), shots), query)

    def similarities(self, means: Tensor, query: Tensor) -> Tensor:
        """Class means (B, N, D), query (B, T, G, h, w) -> cosine similarities times the temperature (B, T, N)."""
        return self.temperature * cosine_similarities(self.vectors(query), means)  # (B, T, N)
