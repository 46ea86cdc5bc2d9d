"""No generated weights: the head sees the backbone's feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.parts import Weights, register_generator


@register_generator("none")
class NoGenerator(nn.Module):
    """Codes of length 0, no weights, and feature maps as they are."""

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, features: Tensor, _episodes: int) -> Tensor:
        """features (n, F, h, w) -> (n, 0)."""
        return features.new_empty(len(features), 0)

    def generate(self, _codes: Tensor, _ways: int, _noise: Tensor | None) -> Weights:
        """No layer."""
        return []

    def generate_unequal(self, _codes: Tensor, _shots: Sequence[int], _noise: Tensor | None) -> Weights:
        """No layer."""
        return []

    def transform(self, features: Tensor, _weights: Weights) -> Tensor:
        """features (B, S + T, F, h, w) as they are."""
        return features
