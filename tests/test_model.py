"""The vectorised network against a loop over episodes (tests/reference.py), and properties that hold for any weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import EagerLGMNet
from torch import Tensor
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model import LGMNet, build_model

SMALL = ModelConfig(filters=8, noise_size=4)


def build(config: ModelConfig = SMALL, training: bool = True, dtype: torch.dtype = torch.float64) -> LGMNet:
    """A network in which no bias, scale or moving statistic has its initial value of 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    model = LGMNet(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.ndim == 1:
                value.add_(torch.rand(value.shape, generator=generator) * (0.3 if "running" in name else 0.1))
    return model.to(dtype).train(training)


def draw(
    episodes: int, support: int, query: int, size: tuple[int, int], config: ModelConfig = SMALL, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """support (B, S, C, H, W), query (B, T, C, H, W), noise (B, 2, Z)"""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(
        episodes, support + query, config.channels or 3, *size, generator=generator, dtype=torch.float64
    )
    images = images + torch.randn(episodes, support + query, config.channels or 3, 1, 1, generator=generator)
    noise = torch.randn(episodes, 2, config.noise_size, generator=generator, dtype=torch.float64)
    return images[:, :support], images[:, support:], noise


# episodes, ways, shot, query images of an episode (any number, in any order of classes), image size
SETTINGS = [
    (1, 5, 1, 1, (32, 32)),
    (3, 5, 1, 3, (32, 32)),
    (2, 3, 4, 7, (20, 33)),
    (2, 20, 1, 4, (32, 32)),
    (3, 2, 2, 3, (17, 17)),
    (2, 2, 1, 1, (84, 84)),
]


@pytest.mark.parametrize("noisy", [True, False], ids=["drawn", "mean"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equals_the_loop_over_episodes(setting: tuple[Any, ...], training: bool, noisy: bool) -> None:
    episodes, ways, shot, queries, size = setting
    compare(SMALL, episodes, ways, shot, queries, size, training, noisy)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_papers_network_equals_the_loop_over_episodes(kernels: Any) -> None:
    compare(ModelConfig(kernels=kernels), 2, 5, 1, 1, (32, 32), True, True)


def compare(
    config: ModelConfig,
    episodes: int,
    ways: int,
    shot: int,
    queries: int,
    size: tuple[int, int],
    training: bool,
    noisy: bool,
) -> None:
    """Compares log-probabilities, gradients of parameters and images, and moving statistics."""
    model = build(config, training)
    twin = copy.deepcopy(model)
    eager = EagerLGMNet(twin.state_dict(keep_vars=True), training)
    support, query, noise = draw(episodes, ways * shot, queries, size, config)
    labels = torch.arange(episodes * queries) % ways
    results = []
    for network in (model, eager):
        inputs = support.clone().requires_grad_(), query.clone().requires_grad_()
        log_p = network(*inputs, ways, noise if noisy else None)  # (B, T, N)
        F.nll_loss(log_p.flatten(0, 1), labels).backward()
        results.append((log_p.detach(), inputs[0].grad, inputs[1].grad))
    assert results[0][0].shape == (episodes, queries, ways)
    for ours, expected in zip(*results, strict=True):
        assert relative(ours, expected) < 1e-11
    # The exact gradient of a bias before a normalisation is 0, so the bound has an absolute part.
    for (name, ours), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad - expected.grad).abs().max() < 1e-11 * expected.grad.abs().max() + 1e-16, name
    for (name, ours), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert (ours - expected).abs().max() < 1e-13, name


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def test_probabilities_sum_to_one() -> None:
    for training in (True, False):
        support, query, noise = draw(3, 10, 4, (32, 32))
        total = build(training=training)(support, query, 5, noise).exp().sum(-1)  # (B, T)
        assert (total - 1).abs().max() < 1e-12


def test_queries_do_not_influence_each_other_in_evaluation() -> None:
    model = build(training=False)
    support, query, noise = draw(2, 6, 5, (32, 32))
    together = model(support, query, 3, noise)
    for i in range(5):
        alone = model(support, query[:, i : i + 1], 3, noise)
        assert (alone[:, 0] - together[:, i]).abs().max() < 1e-12


def test_queries_influence_no_context_and_no_generated_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(training=False)
    support, query, noise = draw(2, 6, 5, (32, 32))
    seen: list[Tensor] = []
    generate = model.generator.generate
    monkeypatch.setattr(model.generator, "generate", lambda codes, *rest: seen.append(codes) or generate(codes, *rest))
    model(support, query, 3, noise)
    model(support, 50 * query.flip(1), 3, noise)
    assert torch.equal(*seen)
    gradient = torch.autograd.grad(seen[0].sum(), model.backbone.convs[0].weight)[0]
    assert gradient.abs().max() > 0, "the codes are made from the support images"


def test_training_statistics_include_the_queries() -> None:
    support, query, _ = draw(2, 6, 5, (32, 32))
    with_queries, without = build(), build()
    with_queries(support, query, 3)
    without(support, query[:, :1] * 0 + support[:, :1], 3)
    means = [m.backbone.norms[0].running_mean for m in (with_queries, without)]
    assert (means[0] - means[1]).abs().max() > 1e-4


def test_episodes_are_independent_in_evaluation() -> None:
    model = build(training=False)
    support, query, noise = draw(3, 6, 2, (32, 32))
    together = model(support, query, 3, noise)
    for b in range(3):
        alone = model(support[b : b + 1], query[b : b + 1], 3, noise[b : b + 1])
        assert (alone[0] - together[b]).abs().max() < 1e-12


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_permuting_the_classes_permutes_the_probabilities(training: bool) -> None:
    support, query, noise = draw(2, 8, 3, (32, 32))
    order = torch.tensor([2, 0, 3, 1])
    permuted = support.unflatten(1, (4, 2))[:, order].flatten(1, 2)  # (B, S, C, H, W)
    before, after = (build(training=training)(s, query, 4, noise) for s in (support, permuted))
    assert (before[..., order] - after).abs().max() < 1e-12
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_order_of_a_class_s_shots_does_not_matter(training: bool) -> None:
    support, query, noise = draw(2, 9, 3, (32, 32))
    by_class = support.unflatten(1, (3, 3)).clone()  # (B, N, K, C, H, W)
    by_class[:, 1] = by_class[:, 1, [2, 0, 1]]
    before, after = (build(training=training)(s, query, 3, noise) for s in (support, by_class.flatten(1, 2)))
    assert (before - after).abs().max() < 1e-12
    mixed = build(training=training)(support.roll(1, 1), query, 3, noise)  # across classes the order matters
    assert (before - mixed).abs().max() > 1e-4


def test_no_noise_is_noise_of_zero() -> None:
    support, query, noise = draw(2, 6, 3, (32, 32))
    mean, zero, drawn = (build()(support, query, 3, n) for n in (None, torch.zeros_like(noise), noise))
    assert torch.equal(mean, zero)
    assert (mean - drawn).abs().max() > 1e-4


def test_each_generated_layer_has_its_own_noise() -> None:
    model, noise = build(), draw(2, 6, 3, (32, 32))[2]
    codes = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = model.generator.generate(codes, 3, noise)
    for layer in range(2):
        changed = noise.clone()
        changed[:, layer] += 1
        other = model.generator.generate(codes, 3, changed)
        same = [torch.equal(a[0], b[0]) for a, b in zip(plain, other, strict=True)]
        assert same == [layer != 0, layer != 1]


@pytest.mark.parametrize("noisy", [True, False], ids=["drawn", "mean"])
@pytest.mark.parametrize("generator", ["lgm", "none"])
def test_embed_and_classify_equal_forward_in_evaluation(generator: str, noisy: bool) -> None:
    model = build(replace(SMALL, generator=generator), training=False)
    support, query, noise = draw(3, 6, 4, (20, 33))
    given = noise if noisy else None
    images = torch.cat([support, query], 1)
    features, codes = (x.unflatten(0, (3, 10)) for x in model.embed(images.flatten(0, 1)))
    parts = model.classify(features, codes[:, :6], 3, given)
    assert (parts - model(support, query, 3, given)).abs().max() < 1e-12


def test_embed_refuses_training() -> None:
    with pytest.raises(AssertionError, match="in training"):
        build().embed(draw(1, 2, 1, (32, 32))[0][0])


@pytest.mark.parametrize("weight_norm", [True, False])
def test_weight_norm_makes_unit_filters(weight_norm: bool) -> None:
    config = ModelConfig(filters=8, noise_size=4, weight_norm=weight_norm)
    codes = torch.randn(5, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = build(config).generator
    for layer, (kernel, bias) in zip(generator.layers, generator.generate(codes, 1, None), strict=True):
        length = kernel.flatten(2).norm(dim=-1)  # (B, F)
        assert kernel.shape == (5, 8, 8, 3, 3)
        assert bool(((length - 1).abs() < 1e-12).all()) == weight_norm
        flat = codes[:, 0, :4] @ layer.w1 + layer.b1
        assert torch.allclose(bias, flat[:, -8:], atol=1e-14)  # biases are never normalised
        if not weight_norm:
            assert torch.allclose(kernel.flatten(1), flat[:, :-8], atol=1e-14)


OPTIONS: list[dict[str, Any]] = [
    *({"norm_scope": scope} for scope in ("global", "worker", "episode")),
    *({"norm": norm} for norm in ("group", "instance", "layer")),
    {"norm": "group", "norm_groups": 2},
    {"weight_norm": False},
    {"channels": 1, "filters": 24, "noise_size": 5},
    {"norm_decay": 0.9, "norm_epsilon": 1e-5},
    {"kernels": "reference"},
    *({"generator": generator, "head": head} for generator in ("lgm", "none") for head in ("cosine", "class_means")),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_train_every_parameter(options: dict[str, Any], training: bool) -> None:
    config = ModelConfig(**({"filters": 8, "noise_size": 4} | options))
    model = build(config, training, torch.float32)
    support, query, noise = (x.float() for x in draw(3, 6, 6, (32, 32), config))
    labels = torch.arange(3).repeat(6)

    def loss() -> Tensor:
        log_p = model(support, query, 3, noise)
        assert log_p.shape == (3, 6, 3)
        return F.nll_loss(log_p.flatten(0, 1), labels)

    before = loss()
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    torch.optim.Adam(model.parameters(), 1e-3).step()
    assert loss() < before
    assert bool([*model.buffers()]) == (config.norm == "batch")


def test_a_map_of_one_pixel_trains_the_centre_of_a_kernel_only() -> None:
    """The last convolution of the context encoder sees maps of 1 x 1 for images of 32 x 32."""
    model = build()
    support, query, noise = draw(3, 6, 6, (32, 32))
    model(support, query, 3, noise)[..., 0].sum().backward()
    gradient = model.generator.encoder.convs[2].weight.grad
    assert gradient[..., 1, 1].abs().min() > 0
    gradient[..., 1, 1] = 0
    assert not gradient.any()


@pytest.mark.parametrize("scope", ["global", "worker", "episode"])
def test_only_statistics_of_the_episode_keep_it_apart_from_the_others_in_training(scope: str) -> None:
    config = ModelConfig(filters=8, noise_size=4, norm_scope=scope)
    support, query, noise = draw(3, 6, 2, (32, 32))
    before = build(config)(support, query, 3, noise)
    other = torch.cat([support[:1], 3 * support[1:]])
    change = (build(config)(other, query, 3, noise) - before)[0].abs().max()
    assert (change < 1e-12) == (scope == "episode")


@pytest.mark.parametrize("norm", ["group", "instance", "layer"])
def test_norms_of_single_images_are_the_same_in_training_and_evaluation(norm: str) -> None:
    config = ModelConfig(filters=8, noise_size=4, norm=norm)
    support, query, noise = draw(2, 6, 2, (32, 32))
    training, evaluation = (build(config, mode)(support, query, 3, noise) for mode in (True, False))
    assert torch.equal(training, evaluation)


def bad_inputs() -> list[tuple[tuple[Any, ...], str]]:
    support, query, noise = torch.zeros(2, 6, 3, 32, 32), torch.zeros(2, 4, 3, 32, 32), torch.zeros(2, 2, 4)
    return [
        ((support[0], query, 3), r"support \(6, 3, 32, 32\) and query \(2, 4, 3, 32, 32\) must be \(B, S, C, H, W\)"),
        ((support, query[0], 3), r"query \(4, 3, 32, 32\) must be"),
        ((support, query[..., :16], 3), r"query \(2, 4, 3, 32, 16\) must be"),
        ((support[:1], query, 3), r"support \(1, 6, 3, 32, 32\) and query \(2, "),
        ((support[:, :, :1], query[:, :, :1], 3), r"images have 1 channels, the model's channels is 3"),
        ((support, query, 4), r"ways \(4\) must divide the 6 support images"),
        ((support, query, 0), r"ways \(0\) must divide"),
        ((support, query, 3, noise[:1]), r"noise \(1, 2, 4\) must be \(2, 2, 4\)"),
        ((support, query, 3, noise[:, 0]), r"noise \(2, 4\) must be \(2, 2, 4\)"),
    ]


@pytest.mark.parametrize(("arguments", "message"), bad_inputs(), ids=lambda x: x if isinstance(x, str) else "")
def test_shapes_that_do_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(dtype=torch.float32)(*arguments)


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (build_model(SMALL, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected), "the global generator is where it was"
    torch.manual_seed(1)
    for name, value in LGMNet(SMALL).state_dict().items():
        assert torch.equal(first[name], value)
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (value.ndim == 1), name  # biases, scales, statistics: constants
