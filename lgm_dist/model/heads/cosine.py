"""The paper's matching head.

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images.
"""

from __future__ import annotations

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
