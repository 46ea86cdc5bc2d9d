"""Each backbone against the same layers of torch.nn or torchvision, over two workers, in bf16, and in a short training."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from helpers.threads import Threads
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model import AllReduce, LGMNet, Norm, build_model

RESNET12 = {"backbone": "resnet12", "filters": 8}
RESNET18 = {"backbone": "torchvision:resnet18"}
MOBILENET = {"backbone": "torchvision:mobilenet_v3_small"}
ALL = [{"backbone": "conv4"}, {**RESNET12, "drop_block": 0.1}, RESNET18, MOBILENET]


def build(**settings: Any) -> LGMNet:
    """A network of class means; scales, shifts and moving averages of the backbone differ from 1 and 0."""
    model = build_model(ModelConfig(generator="none", head="class_means", **settings))
    generator = torch.Generator().manual_seed(3)
    for norm in (m for m in model.modules() if isinstance(m, Norm)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.add_(0.2 * torch.rand(tensor.shape, generator=generator))
    return model.train()


def draw(n: int, size: int = 32, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images (n, C, size, size), channels last."""
    images = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class PlainBlock(nn.Module):
    """A block of ResNet-12, layer after layer."""

    def __init__(self, inputs: int, outputs: int, pooled: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), batch_norm(outputs), nn.LeakyReLU(0.1)),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), batch_norm(outputs), nn.LeakyReLU(0.1)),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), batch_norm(outputs)),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), batch_norm(outputs))
        self.after = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2) if pooled else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.main(x) + self.shortcut(x))


def plain_resnet12(channels: int, widths: list[int], pool_last: bool) -> nn.Module:
    inputs = [channels, *widths[:-1]]
    pooled = [True, True, True, pool_last]
    return nn.Sequential(*map(PlainBlock, inputs, widths, pooled))


def plain_conv4(channels: int, filters: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(4):
        conv = nn.Conv2d(filters if i else channels, filters, 3, padding=1)
        layers += [conv, batch_norm(filters), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    return nn.Sequential(*layers[:-1])


def torchvision_model(name: str, channels: int) -> nn.Module:
    """torchvision's own network, with the first layers that small images need; its output is not flattened."""
    from torchvision import models

    network = models.get_model(name, weights=None)
    if hasattr(network, "features"):
        network = network.features
        network[0][0] = nn.Conv2d(channels, network[0][0].out_channels, 3, stride=1, padding=1, bias=False)
    else:
        network.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        network.maxpool = network.avgpool = network.fc = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.01
    return network


def copy_weights(ours: nn.Module, plain: nn.Module) -> None:
    """Copies convolutions and normalisations in their order; other layers have no weights."""
    kinds: list[tuple[Any, Any]] = [(nn.Conv2d, nn.Conv2d), (Norm, nn.BatchNorm2d)]
    for our_kind, plain_kind in kinds:
        pairs = ([m for m in net.modules() if isinstance(m, k)] for net, k in ((ours, our_kind), (plain, plain_kind)))
        for source, target in zip(*pairs, strict=True):
            target.load_state_dict(source.state_dict(), strict=False)


def gradients(network: nn.Module) -> list[Tensor]:
    """Gradients of the weights: first the convolutions, then the normalisations."""
    modules = [m for kind in (nn.Conv2d, (Norm, nn.BatchNorm2d)) for m in network.modules() if isinstance(m, kind)]
    return [p.grad for m in modules for p in m.parameters(recurse=False)]


def averages(network: nn.Module) -> list[Tensor]:
    """Moving means and variances of the normalisations."""
    norms = [m for m in network.modules() if isinstance(m, Norm | nn.BatchNorm2d)]
    return [average for norm in norms for average in (norm.running_mean, norm.running_var)]


def compare(ours: nn.Module, plain: nn.Module, images: Tensor) -> None:
    """Maps, gradients and moving averages of a training step, and maps in evaluation."""
    copy_weights(ours.double(), plain.double())
    found = []
    for network, arguments in ((ours, (1,)), (plain, ())):
        maps = network.train()(images, *arguments).flatten(1)  # (n, F * h * w)
        (maps * torch.linspace(-1, 1, maps.shape[1], dtype=maps.dtype)).square().sum().backward()
        after = network.eval()(images, *arguments).flatten(1)  # (n, F * h * w)
        found.append([maps, after, *gradients(network), *averages(network)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("filters", [32, 64, 96, 128])
def test_conv4_of_any_width_is_the_plain_layers(filters: int) -> None:
    """With kernels: images without a gradient take the path of the first block."""
    compare(build(filters=filters).backbone, plain_conv4(3, filters), draw(3))


@pytest.mark.parametrize(
    ("pool_last", "channels", "size", "side"), [(False, 3, 32, 4), (True, 3, 32, 2), (False, 1, 28, 3)]
)
def test_resnet12_is_the_plain_layers(pool_last: bool, channels: int, size: int, side: int) -> None:
    backbone = build(**RESNET12, pool_last=pool_last, channels=channels).backbone
    compare(backbone, plain_resnet12(channels, [8, 20, 40, 80], pool_last), draw(4, size, channels))
    assert backbone(draw(2, size, channels), 1).shape == (2, 80, side, side)
    assert backbone.channels == 80


@pytest.mark.parametrize(
    ("name", "channels", "width", "side"),
    [("resnet18", 3, 512, 4), ("mobilenet_v3_small", 1, 576, 2), ("mobilenet_v2", 3, 1280, 2)],
)
def test_a_network_of_torchvision_is_torchvisions_own(name: str, channels: int, width: int, side: int) -> None:
    backbone = build(backbone=f"torchvision:{name}", channels=channels).backbone
    compare(backbone, torchvision_model(name, channels), draw(3, 16, channels))
    assert backbone(draw(1, 32, channels), 1).shape == (1, width, side, side)
    assert backbone.channels == width


@pytest.mark.parametrize(("name", "width"), [("resnet34", 512), ("resnext50_32x4d", 2048)])
def test_other_resnets_of_torchvision(name: str, width: int) -> None:
    backbone = build(backbone=f"torchvision:{name}").eval().backbone
    assert backbone.channels == width
    assert backbone(draw(1, 32, dtype=torch.float32), 1).shape == (1, width, 4, 4)


def test_resnet12_has_the_published_widths() -> None:
    """MetaOptNet's has 12,424,320 parameters without a classifier."""
    backbone = build_model(ModelConfig(backbone="resnet12", generator="none")).backbone
    assert sum(p.numel() for p in backbone.parameters()) == 12_424_320
    assert [block.convs[0].out_channels for block in backbone.blocks] == [64, 160, 320, 640]
    for block in backbone.blocks:
        for conv in block.convs:  # He: variance 2 / (9 * outputs)
            assert float(conv.weight.detach().var()) == pytest.approx(2 / (9 * conv.out_channels), rel=0.06)


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s["backbone"])
def test_two_workers_are_one(settings: dict[str, Any]) -> None:
    """Maps, gradients and moving averages, with slices of 2 and 3 images; DropBlock drops the same on either side."""
    images, sizes = draw(5, 16), [2, 3]
    alone = build(**settings).double()
    copies = copy.deepcopy(alone), copy.deepcopy(alone)
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None, None, None]

    def step(model: LGMNet, x: Tensor, w: Tensor) -> Tensor:
        maps = model.backbone(x, 1)
        (maps * w).sum().backward()
        return maps.detach()

    def work(rank: int, all_reduce: AllReduce) -> Tensor:
        copies[rank].reduce_over(all_reduce)
        return step(copies[rank], images.split(sizes)[rank], weights.split(sizes)[rank])

    expected = step(alone, images, weights)
    maps = torch.cat(Threads(2).run(work))  # (5, F, h, w)
    assert (maps - expected).abs().max() < 1e-10 * expected.abs().max()
    for one, x, y in zip(*(list(m.backbone.parameters()) for m in (alone, *copies)), strict=True):
        assert (x.grad + y.grad - one.grad).abs().max() < 1e-9 * max(1.0, float(one.grad.abs().max()))
    for one, x, y in zip(*(list(m.backbone.buffers()) for m in (alone, *copies)), strict=True):
        assert torch.equal(x, y)
        assert (x - one).abs().max() < 1e-10


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s["backbone"])
def test_bf16_is_finite_and_close(settings: dict[str, Any]) -> None:
    model, images = build(**settings), draw(8, dtype=torch.float32)
    exact = copy.deepcopy(model).backbone(images, 1)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.backbone(images, 1)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    maps.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.backbone.parameters())
    assert F.cosine_similarity(maps.float().flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s["backbone"])
def test_a_few_steps_learn_random_labels(settings: dict[str, Any]) -> None:
    model, images = build(**settings), draw(16, 16, dtype=torch.float32)
    linear, labels, losses = nn.Linear(model.backbone.channels, 4), torch.arange(16) % 4, []
    optimizer = torch.optim.SGD([*model.backbone.parameters(), *linear.parameters()], 0.05, momentum=0.9)
    for _ in range(8):
        loss = F.cross_entropy(linear(model.backbone(images, 1).mean((2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("settings", ALL[1:], ids=lambda s: s["backbone"])
def test_scope_episode_normalises_each_episode_alone(settings: dict[str, Any]) -> None:
    model, images = build(**settings, norm_scope="episode").double(), draw(8, 16)
    alone = copy.deepcopy(model)
    together = model.backbone(images, 2)
    first = alone.backbone(images[:4], 1)
    assert (together[:4] - first).abs().max() < 1e-10
    assert (together[4:] - first).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["torchvision:vgg11", "torchvision:", "torchvision:resnet19"])
def test_an_unknown_network_of_torchvision_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"\('{name}'\) must be torchvision:NAME with NAME one of .*resnet18"):
        build_model(ModelConfig(backbone=name))
    with pytest.raises(
        ValueError, match=r"model\.backbone \('conv4:x'\) must be one of conv4, none, resnet12, .*torchvision:NAME"
    ):
        build_model(ModelConfig(backbone="conv4:x"))


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"torchvision is needed .*resnet18; install lgm-dist\[torchvision\]"):
        build_model(ModelConfig(**RESNET18))
