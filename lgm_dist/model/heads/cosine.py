"""The paper's matching head.

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.vectors import Vectors, cosine_similarities
from lgm_dist.model.parts import register_head


@register_head("cosine")
class Cosine(nn.Module):
    """The paper's matching head: softmax of the cosine similarities to all support images, without a temperature.

    A class's probability is the sum over its support images.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.vectors = Vectors(config, channels)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """support (B, S, G, h, w), query (B, T, G, h, w) -> log-probabilities (B, T, N)."""
        similarities = cosine_similarities(self.vectors(query), self.vectors(support))  # (B, T, S)
        by_class: Tensor = similarities.log_softmax(-1).unflatten(2, (ways, -1))  # (B, T, N, K)
        return by_class.logsumexp(-1)  # (B, T, N)

    def logits(self, support: Tensor, query: Tensor, shots: Sequence[int]) -> Tensor:
        """See `UnequalHead`. A class's probability is proportional to the mean over its support images, not to the sum, so
        that a class with more images is not more probable."""
        similarities = cosine_similarities(self.vectors(query), self.vectors(support))  # (B, T, S)
        parts = similarities.split(list(shots), 2)  # each (B, T, K)
        return torch.stack([part.logsumexp(-1) - math.log(part.shape[2]) for part in parts], -1)  # (B, T, N)
