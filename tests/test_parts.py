"""Parts by name: parts of one's own, names that are unknown or taken, a generator switched off, former state_dict keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model import (
    LGMNet,
    Norm,
    build_model,
    load_tf_variables,
    register_backbone,
    register_generator,
    register_head,
    upgrade_state_dict,
)

SMALL = {"filters": 8, "noise_size": 4}


@register_backbone("tiny")
class Tiny(nn.Module):
    """One convolution; 6 channels, whatever config.filters is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.channels = 6
        self.conv = nn.Conv2d(config.channels, self.channels, 5, stride=4)
        self.norm = Norm(config, self.channels)

    def forward(self, images: Tensor, episodes: int) -> Tensor:
        return self.norm(self.conv(images), episodes).relu()


@register_generator("scales")
class Scales(nn.Module):
    """Scales each channel by a function of the means of the classes."""

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear = nn.Linear(channels, channels)

    def encode(self, features: Tensor, _episodes: int) -> Tensor:
        return features.mean((2, 3))  # (n, F)

    def generate(self, codes: Tensor, ways: int, _noise: Tensor | None) -> list[tuple[Tensor, ...]]:
        means = codes.unflatten(1, (ways, -1)).mean(2)  # (B, N, F)
        return [(self.linear(means).amax(1),)]  # (B, F)

    def transform(self, features: Tensor, weights: Any) -> Tensor:
        return features * weights[0][0][:, None, :, None, None]


@register_head("distance")
class Distance(nn.Module):
    """The nearest support image, by Euclidean distance through a linear layer."""

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 4, bias=False)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        s, q = (self.linear(maps.mean((3, 4))) for maps in (support, query))  # (B, S, 4), (B, T, 4)
        return -torch.cdist(q, s).unflatten(2, (ways, -1)).amin(3).log_softmax(-1)


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """support (2, 6, 3, 32, 32), query (2, 4, 3, 32, 32), noise (2, 2, 4)"""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, 3, 32, 32), (2, 4, 3, 32, 32), (2, 2, 4)
    support, query, noise = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return support, query, noise


@pytest.mark.parametrize(
    "names",
    [
        {"backbone": "tiny", "generator": "scales", "head": "distance"},
        *({part: name} for part, name in (("backbone", "tiny"), ("generator", "scales"), ("head", "distance"))),
        {"backbone": "tiny", "generator": "none", "head": "class_means"},
    ],
    ids=str,
)
def test_parts_from_outside_the_package_train_a_step(names: dict[str, str]) -> None:
    model = build_model(ModelConfig(**SMALL, **names))
    support, query, noise = draw()
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(2):
        loss = F.nll_loss(model(support, query, 3, noise).flatten(0, 1), torch.tensor([0, 1, 2, 0, 0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("part", ["backbone", "generator", "head"])
def test_an_unknown_name_is_refused_with_the_known_ones(part: str) -> None:
    known = {
        "backbone": "conv4, resnet12, .*tiny, torchvision:NAME",
        "generator": "lgm, none, scales",
        "head": "class_means, cosine, distance",
    }[part]
    with pytest.raises(ValueError, match=rf"model\.{part} \('resnet99'\) must be one of {known}; .*register_{part}"):
        build_model(ModelConfig(**SMALL, **{part: "resnet99"}))


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="head 'cosine' is registered already; choose another name"):
        register_head("cosine")(Distance)
    assert register_head("distance")(Distance) is Distance, "a notebook's cell may run twice"


def test_group_norm_of_channels_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.norm_groups \(4\) must divide the 6 channels"):
        build_model(ModelConfig(**SMALL, backbone="tiny", norm="group", norm_groups=4))


def test_the_authors_variables_need_the_papers_parts() -> None:
    with pytest.raises(ValueError, match=r"fit model\.backbone conv4 and model\.generator lgm, not conv4 and none"):
        load_tf_variables(build_model(ModelConfig(**SMALL, generator="none")), {})


@pytest.mark.parametrize("switched_off", [True, False], ids=["switched off", "built without"])
def test_no_generator_against_a_loop_by_hand(switched_off: bool) -> None:
    """Class means of the backbone's flattened maps, one episode, query and class after the other."""
    config = ModelConfig(**SMALL, generator="lgm" if switched_off else "none", head="class_means")
    model = build_model(config).double().eval()
    off = model.without_generator() if switched_off else model
    support, query, noise = draw(torch.float64)
    log_p = off(support, query, 3, noise)
    for b in range(2):
        features = [model.backbone(images, 1).flatten(1).tolist() for images in (support[b], query[b])]
        means = [
            [sum(pair) / 2 for pair in zip(*features[0][2 * c : 2 * c + 2], strict=True)] for c in range(3)
        ]  # two shots
        for t, image in enumerate(features[1]):
            logits = []
            for mean in means:
                dot = sum(x * y for x, y in zip(image, mean, strict=True))
                logits.append(10 * dot / math.hypot(*image) / math.hypot(*mean))
            total = sum(map(math.exp, logits))
            assert log_p[b, t].exp().tolist() == pytest.approx([math.exp(x) / total for x in logits], abs=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_without_its_generator_shares_the_other_parts_and_changes_nothing(training: bool) -> None:
    model = build_model(ModelConfig(**SMALL)).train(training)
    support, query, noise = draw()
    before = model.eval()(support, query, 3, noise)
    off = model.train(training).without_generator()
    assert (off.backbone, off.head) == (model.backbone, model.head)
    assert (off.config.generator, model.config.generator) == ("none", "lgm")
    assert {module.training for module in (*off.modules(), *model.modules())} == {training}
    assert not any(name.startswith("generator") for name in off.state_dict())
    assert torch.equal(model.eval()(support, query, 3, noise), before)
    assert not torch.allclose(off.eval()(support, query, 3, noise), before)


def test_former_keys_get_todays_names() -> None:
    names = {
        "extractor.convs.0.weight": "backbone.convs.0.weight",
        "extractor.norms.3.running_var": "backbone.norms.3.running_var",
        "context_encoder.convs.2.bias": "generator.encoder.convs.2.bias",
        "generators.1.w1": "generator.layers.1.w1",
    }
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    upgraded = upgrade_state_dict(tensors)
    assert list(upgraded) == list(names.values())
    assert list(upgraded.values()) == list(tensors.values())
    assert upgraded.keys() <= LGMNet(ModelConfig(**SMALL)).state_dict().keys()
    assert upgrade_state_dict(upgraded) == upgraded
