"""A scale of each channel from how it varies between and within the classes of the episode, with generated shrinkage."""

from __future__ import annotations

from torch import Tensor

from lgm_dist.config import ModelConfig
from lgm_dist.model.class_level import STATISTICS, ClassLevel, gram_statistics, small_network
from lgm_dist.model.parts import Weights, register_generator


@register_generator("metric")
class Metric(ClassLevel):
    """Multiplies channel f by (b_f + e)^p * (w_f + e)^q, b_f its variance between the class means and w_f its mean variance
    within the classes, both relative to the mean of b over the channels, and e = 0.1.

    A small network generates the powers p and q from statistics of the Gram matrix; both start at 0. It sees no direction, so
    that it cannot remember classes.
    """

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__(channels)
        self.network = small_network(STATISTICS, 2)

    def weights(self, codes: Tensor) -> tuple[Tensor]:
        """codes (B, N, K, F) -> scales (B, F)."""
        between = codes.mean(2).var(1, correction=0)  # (B, F)
        within = codes.var(2, correction=0).mean(1)  # (B, F); 0 with one shot
        size = between.mean(1, keepdim=True).clamp_min(1e-12)  # (B, 1)
        powers = self.network(gram_statistics(codes)).tanh()  # (B, 2)
        logarithm = powers[:, :1] * (between / size + 0.1).log() + powers[:, 1:] * (within / size + 0.1).log()
        return (logarithm.exp(),)  # (B, F)

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, n, F, h, w) -> (B, n, F, h, w)."""
        ((scale,),) = weights
        return features * scale[:, None, :, None, None].to(features.dtype)
