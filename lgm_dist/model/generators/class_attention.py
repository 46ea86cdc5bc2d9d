"""Attention among the class means (the shape of FEAT: Ye et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.class_level import ClassShift, shifts_of_means, zero_linear
from lgm_dist.model.parts import Weights, register_generator


@register_generator("class_attention")
class ClassAttention(ClassShift):
    """Adds to each class mean what it reads from all class means of the episode, with one head of attention.

    Unlike FEAT's, the sum is not normalised and there is no dropout, so that training starts with the means as they are.
    """

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__(channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.out = zero_linear(channels, channels)

    def shift(self, codes: Tensor) -> Tensor:
        """codes (B, N, K, F) -> (B, N, F)."""
        means = codes.mean(2)  # (B, N, F)
        normal = F.layer_norm(means, means.shape[-1:])
        scores = self.query(normal) @ self.key(normal).transpose(1, 2) / self.channels**0.5  # (B, N, N)
        shift: Tensor = self.out(torch.softmax(scores, -1) @ self.value(means))  # (B, N, F)
        return shift

    def generate_unequal(self, codes: Tensor, shots: Sequence[int], _noise: Tensor | None) -> Weights:
        """See `UnequalGenerator`."""
        return shifts_of_means(self, codes, shots)
