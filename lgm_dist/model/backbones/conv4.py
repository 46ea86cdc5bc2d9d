"""The paper's backbone: four 3 x 3 convolutions with normalisation and ReLU, the first three pooled."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.kernels import first_block, fused_block
from lgm_dist.model.layers import conv3x3, pool
from lgm_dist.model.norm import Norm
from lgm_dist.model.parts import register_backbone


@register_backbone("conv4")
class Conv4(nn.Module):
    """images (n, C, H, W) -> feature maps (n, F, h, w) with F = config.filters; h = w = 4 for 32 x 32 images."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.drop_block or config.pool_last:
            raise ValueError(
                f"model.drop_block ({config.drop_block}) and model.pool_last ({config.pool_last}) are for resnet12, not for "
                "conv4; leave them out"
            )
        self.channels = config.filters
        self.kernels = config.kernels
        inputs = (config.channels, config.filters, config.filters, config.filters)
        self.convs = nn.ModuleList(conv3x3(c, config.filters) for c in inputs)
        self.norms = nn.ModuleList(Norm(config, config.filters) for _ in inputs)

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, C, H, W), the images of `episodes` episodes -> (n, F, h, w)."""
        return self.last_maps(x, episodes, 1)[0]

    def last_maps(self, x: Tensor, episodes: int, blocks: int) -> list[Tensor]:
        """x (n, C, H, W) -> the maps of the last `blocks` blocks, at most two, each (n, F, h, w)."""
        last, maps = len(self.convs) - 1, []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, Norm)
            assert conv.bias is not None
            if self.kernels == "auto" and i == 0 and first_block.supports(x, norm):
                x = first_block.first_block(x, conv, norm)  # (n, F, ceil(H / 2), ceil(W / 2))
            elif self.kernels == "auto" and fused_block.supports(x, norm):
                y = F.conv2d(x, conv.weight, padding=1)  # (n, F, h, w)
                x = fused_block.norm_relu_pool(y, conv.bias, norm, i < last)
            else:
                x = F.relu_(norm(conv(x), episodes))  # (n, F, h, w)
                x = pool(x) if i < last else x  # (n, F, ceil(h / 2), ceil(w / 2))
            if i > last - blocks:
                maps.append(x)
        return maps
