"""Networks of torchvision with first layers for small images: `torchvision:resnet18`, `torchvision:mobilenet_v3_small`."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.extras import need
from lgm_dist.model.layers import he_conv
from lgm_dist.model.norm import Norm
from lgm_dist.model.parts import register_backbone

FAMILIES = ("resnet", "resnext", "wide_resnet", "mobilenet_v")
"""How the names begin of networks that draw no random numbers before the classifier and take any layer as normalisation."""
_NOT_USED = ("maxpool", "avgpool", "fc", "classifier")


@register_backbone("torchvision:NAME")
class TorchvisionModel(nn.Module):
    """images (n, C, H, W) -> feature maps (n, F, h, w), from the layers before the global average.

    The first convolution is 3 x 3 of stride 1 instead of stride 2, and resnets do without the max-pooling after it. For
    32 x 32 images h = w = 4 for resnets and 2 for mobilenets. The name says how wide the network is; `config.filters` does not.
    Raises ValueError for a name that is none of FAMILIES, and if torchvision is not installed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        network = _build(config)
        layers = [(name, layer) for name, layer in network.named_children() if name not in _NOT_USED]
        self.layers = nn.Sequential(OrderedDict(layers))
        name, first = next((n, m) for n, m in self.layers.named_modules() if isinstance(m, nn.Conv2d))
        self.layers.set_submodule(name, he_conv(config.channels, first.out_channels, 3))
        self.layers.to(memory_format=torch.channels_last)
        self.channels = next(m.in_features for m in network.modules() if isinstance(m, nn.Linear))

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, C, H, W), the images of `episodes` episodes -> (n, F, h, w)."""
        for norm in self.modules():
            if isinstance(norm, _InnerNorm):
                norm.episodes = episodes
        maps: Tensor = self.layers(x)  # (n, F, h, w)
        return maps


class _InnerNorm(Norm):
    """A `Norm` inside a network whose layers pass on nothing but images."""

    episodes = 1

    def forward(self, x: Tensor, _episodes: int = 1) -> Tensor:
        return super().forward(x, self.episodes)


def _build(config: ModelConfig) -> nn.Module:
    """The network of torchvision that `config.backbone` names, with random weights and `Norm`."""
    need("torchvision", "torchvision", f"for model.backbone {config.backbone}")
    from torchvision import models

    name = config.backbone.partition(":")[2]
    known = [known for known in models.list_models(module=models) if known.startswith(FAMILIES)]
    if name not in known:
        raise ValueError(
            f"model.backbone ({config.backbone!r}) must be torchvision:NAME with NAME one of {', '.join(known)}"
        )
    network: nn.Module = models.get_model(name, weights=None, num_classes=1, norm_layer=partial(_InnerNorm, config))
    return network
