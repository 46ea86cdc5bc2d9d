"""No backbone: images that are feature maps already."""

from __future__ import annotations

from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.parts import register_backbone


@register_backbone("none")
class NoBackbone(nn.Module):
    """Images (n, F, h, w) as they are, F = config.channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.channels = config.channels

    def forward(self, images: Tensor, _episodes: int) -> Tensor:
        """images (n, F, h, w) -> the same."""
        return images
