"""A generated 1 x 1 layer of low rank beside the features, from the class means."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.class_level import ClassLevel, class_means, zero_linear
from lgm_dist.model.layers import unit
from lgm_dist.model.parts import Weights, register_generator


@register_generator("low_rank")
class LowRank(ClassLevel):
    """x + 1/N * sum over classes c of (B m_c) (A m_c)^T x at each place of a map, m_c the class mean at length 1.

    A and B are learned; B starts at 0.
    """

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__(channels)
        self.down = nn.Linear(channels, channels, bias=False)
        self.up = zero_linear(channels, channels)

    def weights(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes (B, N, K, F) -> rows A m_c and columns B m_c / N of the layer, (B, N, F) each."""
        means = unit(codes.mean(2))  # (B, N, F)
        return self.down(means), self.up(means) / codes.shape[1]

    def generate_unequal(self, codes: Tensor, shots: Sequence[int], noise: Tensor | None) -> Weights:
        """See `UnequalGenerator`: the class means are all that it reads."""
        return self.generate(class_means(codes, shots), len(shots), noise)

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, n, F, h, w) -> (B, n, F, h, w)."""
        ((down, up),) = weights
        x = features.movedim(2, -1).flatten(1, 3)  # (B, n * h * w, F)
        added = x @ down.transpose(1, 2) @ up  # (B, n * h * w, F)
        return features + added.view(features.movedim(2, -1).shape).movedim(-1, 2)  # (B, n, F, h, w)
