"""Class means mixed with each other and with the mean of the base classes, by weights from their Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.config import ModelConfig
from lgm_dist.model.class_level import ClassShift, cosines, small_network
from lgm_dist.model.layers import unit
from lgm_dist.model.parts import register_generator


@register_generator("gram")
class Gram(ClassShift):
    """m_c + sum over classes j of a_cj * (m_j - m_c) + b_c * (m - m_c), m the mean of the base classes, which `fit` stores.

    Two small networks give a_cj from the cosine of the two means, the mean cosine of each with the others, and 1 / K; and b_c
    from the cosine with m, the mean cosine with the others, and 1 / K. They see no direction.
    """

    base: Tensor

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("base", torch.zeros(channels))
        self.pairs, self.classes = small_network(4, 1), small_network(3, 1)

    def fit(self, mean: Tensor, _weights: Tensor | None) -> None:
        """Store the mean of the base classes (F,)."""
        self.base.copy_(mean)

    def shift(self, codes: Tensor) -> Tensor:
        """codes (B, N, K, F) -> (B, N, F)."""
        means = codes.mean(2)  # (B, N, F)
        matrix = cosines(means)  # (B, N, N)
        others = matrix.mean(2)  # (B, N)
        shots = torch.full_like(others, 1 / codes.shape[2])  # (B, N)
        pair = [matrix, others[:, :, None], others[:, None], shots[:, None]]
        mixing = self.pairs(torch.stack([x.expand_as(matrix) for x in pair], dim=-1))[..., 0]  # (B, N, N)
        single = torch.stack([unit(means) @ unit(self.base), others, shots], dim=-1)  # (B, N, 3)
        to_base = self.classes(single)  # (B, N, 1)
        shift: Tensor = mixing @ means - mixing.sum(2, keepdim=True) * means  # (B, N, F)
        shift += to_base * (self.base - means)
        return shift
