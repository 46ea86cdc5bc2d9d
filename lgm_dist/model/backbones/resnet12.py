"""ResNet-12 as few-shot learners use it: four residual blocks of three convolutions (Lee et al., MetaOptNet, CVPR 2019).

Tian et al. (RFS, ECCV 2020) and Rajasegaran et al. (SKD, 2020) use the same layers; there the last block is pooled.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.dropblock import DropBlock, image_hashes
from lgm_dist.model.layers import he_conv
from lgm_dist.model.norm import Norm
from lgm_dist.model.parts import register_backbone

SLOPE = 0.1
"""Slope of the leaky ReLU for negative values."""


@register_backbone("resnet12")
class ResNet12(nn.Module):
    """images (n, C, H, W) -> feature maps (n, F, h, w) with F = 10 * config.filters; h = w = 4 for 32 x 32 images.

    With `config.pool_last` the last block is pooled too, and h = w = 2. With `config.drop_block`, blocks 1 and 2 drop single
    activations in training, blocks 3 and 4 squares of config.drop_size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.filters * tenths // 10 for tenths in (10, 25, 50, 100)]
        self.channels = widths[-1]
        self.drops = config.drop_block > 0
        inputs = [config.channels, *widths[:-1]]
        self.blocks = nn.ModuleList(Block(config, i, *pair) for i, pair in enumerate(zip(inputs, widths, strict=True)))

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, C, H, W), the images of `episodes` episodes -> (n, 10 * F, h, w)."""
        hashes = image_hashes(x) if self.drops else None  # (n,)
        for block in self.blocks:
            x = block(x, episodes, hashes)  # (n, width, h, w)
        return x


class Block(nn.Module):
    """Three 3 x 3 convolutions beside a 1 x 1 convolution, each normalised; leaky ReLU, pooling, DropBlock."""

    def __init__(self, config: ModelConfig, number: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pooled = number < 3 or config.pool_last
        self.convs = nn.ModuleList(he_conv(c, outputs, 3) for c in (inputs, outputs, outputs))
        self.norms = nn.ModuleList(Norm(config, outputs) for _ in self.convs)
        self.shortcut_conv, self.shortcut_norm = he_conv(inputs, outputs, 1), Norm(config, outputs)
        size = 1 if number < 2 else config.drop_size
        self.drop = DropBlock(config.drop_block, size, number) if config.drop_block else None

    def forward(self, x: Tensor, episodes: int, hashes: Tensor | None) -> Tensor:
        """x (n, inputs, H, W), the images of `episodes` episodes, and the hashes (n,) for DropBlock
        -> (n, outputs, h, w)."""
        shortcut = self.shortcut_norm(self.shortcut_conv(x), episodes)  # (n, outputs, H, W)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), episodes)  # (n, outputs, H, W)
            x = F.leaky_relu_(x if i < 2 else x.add_(shortcut), SLOPE)
        x = F.max_pool2d(x, 2) if self.pooled else x  # (n, outputs, H // 2, W // 2)
        return x if self.drop is None or hashes is None else self.drop(x, hashes)
