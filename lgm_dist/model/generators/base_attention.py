"""Attention from the class means to the weights of the base classes (Gidaris & Komodakis, CVPR 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.class_level import ClassShift, shifts_of_means
from lgm_dist.model.layers import unit
from lgm_dist.model.parts import Weights, register_generator


@register_generator("base_attention")
class BaseAttention(ClassShift):
    """Adds to each class mean the base classes' weights that it resembles, scaled to its length and, channel by channel, by
    learned factors that start at 0.

    The weights are those of the linear classifier that pretraining has trained; `fit` stores them. Train it with
    classes=held_out: a class that is itself a base class would find its own weights.
    """

    base: Tensor

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("base", torch.zeros(config.base_outputs, channels))
        self.query = nn.Linear(channels, channels, bias=False)
        nn.init.eye_(self.query.weight)
        self.temperature = nn.Parameter(torch.tensor(10.0))
        self.scale = nn.Parameter(torch.zeros(channels))

    def fit(self, _mean: Tensor, weights: Tensor | None) -> None:
        """Store the classifier's weights (base_outputs, F), each row scaled to length 1.

        Raises ValueError if there is no classifier.
        """
        if weights is None:
            raise ValueError(
                "model.generator ('base_attention') needs the classifier of the base classes; train a stage pretraining first"
            )
        self.base.copy_(unit(weights))

    def shift(self, codes: Tensor) -> Tensor:
        """codes (B, N, K, F) -> (B, N, F)."""
        means = codes.mean(2)  # (B, N, F)
        scores = self.temperature * (unit(self.query(means)) @ self.base.T)  # (B, N, base_outputs)
        read = torch.softmax(scores, -1) @ self.base  # (B, N, F)
        shift: Tensor = self.scale * read * means.norm(dim=-1, keepdim=True)  # (B, N, F)
        return shift

    def generate_unequal(self, codes: Tensor, shots: Sequence[int], _noise: Tensor | None) -> Weights:
        """See `UnequalGenerator`."""
        return shifts_of_means(self, codes, shots)
