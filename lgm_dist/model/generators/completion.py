"""Class-mean completion: the mean of many images of a class, estimated from few by a small network that all channels share."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.config import ModelConfig
from lgm_dist.model.class_level import ClassShift, deviation, small_network
from lgm_dist.model.parts import register_generator


@register_generator("completion")
class Completion(ClassShift):
    """Corrects each channel of a class mean by what is known of it: the mean, mean and spread of the class means of the
    episode, the spread of the class's images, and 1 / K.

    The network works on one channel at a time and so cannot remember the directions of classes. All five numbers but the last
    are relative to the average spread of the episode's class means, and so is the correction.
    """

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__(channels)
        self.network = small_network(5, 1)

    def shift(self, codes: Tensor) -> Tensor:
        """codes (B, N, K, F) -> (B, N, F)."""
        means = codes.mean(2)  # (B, N, F)
        centre = means.mean(1, keepdim=True)  # (B, 1, F)
        spread = deviation(means.movedim(1, -1))[:, None]  # (B, 1, F)
        unit = spread.mean(2, keepdim=True)  # (B, 1, 1)
        within = deviation(codes.movedim(2, -1))  # (B, N, F); about 0 with one shot
        known = [(means - centre) / unit, centre / unit, spread / unit, within / unit]
        shots = torch.full_like(means, 1 / codes.shape[2])  # (B, N, F)
        inputs = torch.stack([x.expand_as(means) for x in known] + [shots], dim=-1)  # (B, N, F, 5)
        shift: Tensor = unit * self.network(inputs)[..., 0]  # (B, N, F)
        return shift
