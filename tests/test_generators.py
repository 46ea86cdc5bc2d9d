"""Generators that begin as the identity: against loops over one episode, and what all of them have to keep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model import LGMNet, build_model
from lgm_dist.model.class_level import gram_statistics
from lgm_dist.model.controls import with_other_context

N, K, T, C = 3, 2, 4, 6
NAMES = ("residual", "low_rank", "class_attention", "base_attention", "completion", "projection", "metric", "gram")
SUPPORT_ONLY = ("class_attention", "base_attention", "completion", "gram")


def network(name: str, *, moved: bool = True, seed: int = 0) -> LGMNet:
    """A network whose images are maps of C channels; `moved`: all of its parameters are away from their start."""
    config = ModelConfig(
        backbone="none", generator=name, head="class_means", channels=C, filters=C, noise_size=4, base_outputs=5
    )
    model = build_model(config).double().eval()
    random = torch.Generator().manual_seed(seed)
    if hasattr(model.generator, "fit"):
        model.generator.fit(torch.rand(C, generator=random).double(), torch.randn(5, C, generator=random).double())
    if moved:
        with torch.no_grad():
            for parameter in model.generator.parameters():  # type: ignore[attr-defined]
                parameter += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    return model


def maps(episodes: int = 3, shots: int = K, seed: int = 1) -> tuple[Tensor, Tensor]:
    """support (B, S, F, 2, 3), query (B, T, F, 2, 3), positive as after a ReLU"""
    random = torch.Generator().manual_seed(seed)
    both = torch.rand(episodes, N * shots + T, C, 2, 3, generator=random, dtype=torch.float64)
    return both[:, : N * shots], both[:, N * shots :]


def transformed(model: LGMNet, support: Tensor, query: Tensor) -> Tensor:
    """(B, S + T, F, h, w)"""
    generator, both = model.generator, torch.cat([support, query], dim=1)
    codes = generator.encode(support.flatten(0, 1), len(support)).unflatten(0, support.shape[:2])
    return generator.transform(both, generator.generate(codes, N, None))


@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_it_is_class_means_without_a_generator(name: str) -> None:
    model = network(name, moved=False)
    support, query = maps()
    off = network("none", moved=False)
    torch.testing.assert_close(model(support, query, N), off(support, query, N), rtol=0, atol=1e-12)
    torch.testing.assert_close(network(name).without_generator()(support, query, N), off(support, query, N))
    assert not torch.allclose(network(name)(support, query, N), off(support, query, N), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_another_order_of_the_classes_is_another_order_of_the_answers(name: str) -> None:
    model, (support, query), order = network(name), maps(), [2, 0, 1]
    other = support.unflatten(1, (N, K))[:, order].flatten(1, 2)
    torch.testing.assert_close(model(other, query, N), model(support, query, N)[..., order])


@pytest.mark.parametrize("name", NAMES)
def test_another_order_of_shots_or_queries_changes_nothing(name: str) -> None:
    model, (support, query) = network(name), maps()
    other = support.unflatten(1, (N, K)).flip(2).flatten(1, 2)
    torch.testing.assert_close(model(other, query.flip(1), N), model(support, query, N).flip(1))


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_does_not_depend_on_its_batch_or_its_queries(name: str) -> None:
    model, (support, query) = network(name), maps()
    whole = model(support, query, N)
    torch.testing.assert_close(model(support[1:2], query[1:2], N), whole[1:2])
    torch.testing.assert_close(model(support, query[:, :1], N), whole[:, :1])


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str, shots: int) -> None:
    model = network(name).train()
    support, query = maps(2, shots)
    F.nll_loss(model(support, query, N).flatten(0, 1), torch.tensor([0, 1, 2, 0] * 2)).backward()
    for key, parameter in model.generator.named_parameters():  # type: ignore[attr-defined]
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # without noise the paper's log-variances have no effect
        assert parameter.grad.any() or name == "residual", key


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_leave_the_start(name: str) -> None:
    model = network(name, moved=False).train()
    optimizer, (support, query) = torch.optim.Adam(model.parameters(), 1e-2), maps()
    losses = []
    for _ in range(15):
        loss = F.nll_loss(model(support, query, N).flatten(0, 1), torch.tensor([0, 1, 2, 0] * 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved, still = transformed(model, support, query), torch.cat([support, query], dim=1)
    assert not torch.allclose(moved, still, atol=1e-4), "not the head's temperature alone"
    assert torch.equal(moved[:, N * K :], still[:, N * K :]) == (name in SUPPORT_ONLY)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close(name: str) -> None:
    model, (support, query) = network(name).float(), (x.float() for x in maps())
    wanted = model(support, query, N)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(support, query, N)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_alone_keeps_the_size_of_the_maps(name: str) -> None:
    """Heads take their statistics through a generator with one class of one image."""
    generator, features = network(name).generator, maps()[1][:1]  # (1, T, F, h, w)
    codes = generator.encode(features[0, :1], 1)[None]
    found = generator.transform(features, generator.generate(codes, 1, None))
    assert found.shape == features.shape
    assert found.isfinite().all()


# ---- one episode by hand, in numpy ----


def weight(layer: Any) -> np.ndarray:
    array: np.ndarray = layer.weight.detach().numpy()
    return array


def softmax(x: np.ndarray) -> np.ndarray:
    e: np.ndarray = np.exp(x - x.max())
    return e / e.sum()


def length1(x: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = x / math.sqrt(float(x @ x))
    return scaled


def means_by_hand(support: np.ndarray) -> list[np.ndarray]:
    """support (S, F, h, w) -> N class means (F,)."""
    return [sum(support[c * K + k].mean((1, 2)) for k in range(K)) / K for c in range(N)]  # type: ignore[misc]


def check_places(name: str, at_place: Any) -> None:
    """`at_place(generator, means, x)` is what becomes of the vector x (F,) of one place of a map."""
    model, (support, query) = network(name), maps()
    found = transformed(model, support, query).detach().numpy()
    both = torch.cat([support, query], dim=1).numpy()
    means = means_by_hand(support[1].numpy())
    for image, y, x in ((0, 0, 0), (5, 1, 2), (7, 0, 1)):
        expected = at_place(model.generator, means, both[1, image, :, y, x])
        np.testing.assert_allclose(found[1, image, :, y, x], expected, atol=1e-10)


def check_shifts(name: str, of_class: Any) -> None:
    """`of_class(generator, means, c)` is what is added to the support images of class c."""
    model, (support, query) = network(name), maps()
    found = transformed(model, support, query).detach().numpy()[1]
    means = means_by_hand(support[1].numpy())
    for c in range(N):
        shift = of_class(model.generator, means, c)
        for k in range(K):
            image = c * K + k
            np.testing.assert_allclose(found[image], support[1, image].numpy() + shift[:, None, None], atol=1e-10)
    np.testing.assert_array_equal(found[N * K :], query[1].numpy())


def test_low_rank_by_hand() -> None:
    def at_place(generator: Any, means: list[np.ndarray], x: np.ndarray) -> np.ndarray:
        layer = np.eye(C)
        for mean in means:
            layer += np.outer(weight(generator.up) @ length1(mean), weight(generator.down) @ length1(mean)) / N
        return layer @ x

    check_places("low_rank", at_place)


def test_projection_by_hand() -> None:
    def at_place(generator: Any, means: list[np.ndarray], x: np.ndarray) -> np.ndarray:
        centre = sum(means) / N
        rows = np.stack([mean - centre for mean in means])
        gram = rows @ rows.T
        cosine = [length1(means[i]) @ length1(means[j]) for i in range(N) for j in range(N) if i != j]
        lengths = [math.hypot(*mean) for mean in means]
        figures = [np.mean(cosine), np.std(cosine), np.std(lengths) / np.mean(lengths), 1 / K, 1 / N]
        share, ridge = generator.network(torch.tensor(np.array(figures))).tolist()
        inverse = np.linalg.inv(gram + math.exp(ridge) * np.trace(gram) / N * np.eye(N))
        d = x - centre
        return x - math.tanh(share) * (d - rows.T @ inverse @ rows @ d)

    check_places("projection", at_place)


def test_class_attention_by_hand() -> None:
    def of_class(generator: Any, means: list[np.ndarray], c: int) -> np.ndarray:
        normal = [(m - m.mean()) / math.sqrt(m.var() + 1e-5) for m in means]
        query = weight(generator.query) @ normal[c]
        scores = np.array([query @ (weight(generator.key) @ other) / math.sqrt(C) for other in normal])
        read = sum(a * (weight(generator.value) @ m) for a, m in zip(softmax(scores), means, strict=True))
        return weight(generator.out) @ read

    check_shifts("class_attention", of_class)


def test_base_attention_by_hand() -> None:
    def of_class(generator: Any, means: list[np.ndarray], c: int) -> np.ndarray:
        base = [length1(row) for row in torch.randn(5, C, generator=after_the_mean()).double().numpy()]
        query = length1(weight(generator.query) @ means[c])
        shares = softmax(np.array([generator.temperature.item() * (query @ row) for row in base]))
        read = sum(a * row for a, row in zip(shares, base, strict=True))
        return generator.scale.detach().numpy() * read * math.hypot(*means[c])

    def after_the_mean() -> torch.Generator:
        random = torch.Generator().manual_seed(0)
        torch.rand(C, generator=random)
        return random

    check_shifts("base_attention", of_class)


def test_gram_by_hand() -> None:
    def of_class(generator: Any, means: list[np.ndarray], c: int) -> np.ndarray:
        base = torch.rand(C, generator=torch.Generator().manual_seed(0)).double().numpy()
        cosine = [[length1(a) @ length1(b) for b in means] for a in means]
        of = [np.mean(row) for row in cosine]
        shift = np.zeros(C)
        for j in range(N):
            inputs = torch.tensor(np.array([cosine[c][j], of[c], of[j], 1 / K]))
            shift += generator.pairs(inputs).item() * (means[j] - means[c])
        inputs = torch.tensor(np.array([length1(means[c]) @ length1(base), of[c], 1 / K]))
        return shift + generator.classes(inputs).item() * (base - means[c])

    check_shifts("gram", of_class)


def test_metric_by_hand() -> None:
    model, (support, query) = network("metric"), maps()
    found = transformed(model, support, query).detach() / torch.cat([support, query], dim=1)
    codes = support[1].mean((2, 3)).unflatten(0, (N, K)).numpy()  # (N, K, F)
    between, within = codes.mean(1).var(0), codes.var(1).mean(0)
    p, q = model.generator.network(gram_statistics(torch.from_numpy(codes)[None])).tanh()[0].tolist()  # type: ignore[attr-defined]
    scale = (between / between.mean() + 0.1) ** p * (within / between.mean() + 0.1) ** q
    np.testing.assert_allclose(found[1], np.broadcast_to(scale[:, None, None], found[1].shape), atol=1e-10)


def test_residual_by_hand() -> None:
    """With torch's convolution of one episode at a time."""
    model, (support, query) = network("residual"), maps()
    generator: Any = model.generator
    found = transformed(model, support, query)
    codes = generator.encode(support.flatten(0, 1), 3).unflatten(0, (3, N * K))
    weights = generator.generate(codes, N, None)
    for b, images in enumerate(torch.cat([support, query], dim=1)):
        (k1, b1), (k2, b2) = [(kernel[b], bias[b]) for kernel, bias in weights]
        g = F.conv2d(F.conv2d(images, k1, b1, padding=1).relu(), k2, b2, padding=1)
        torch.testing.assert_close(found[b], images + generator.share * g)


# ---- controls ----


@pytest.mark.parametrize("name", ["low_rank", "class_attention", "residual"])
def test_another_episodes_context(name: str) -> None:
    model, (support, query) = network(name), maps()
    found = with_other_context(model)(support, query, N)
    for b in range(3):
        generator, other = model.generator, support[b - 1]
        codes = generator.encode(other, 1)[None]
        both = torch.cat([support[b], query[b]])[None]
        moved = generator.transform(both, generator.generate(codes, N, None))
        torch.testing.assert_close(found[b : b + 1], model.head(moved[:, : N * K], moved[:, N * K :], N))
    assert not torch.allclose(found, model(support, query, N))


def test_without_weights_another_context_changes_nothing() -> None:
    model, (support, query) = network("none"), maps()
    assert torch.equal(with_other_context(model)(support, query, N), model(support, query, N))


def test_base_attention_needs_a_classifier() -> None:
    generator: Any = network("base_attention").generator
    with pytest.raises(
        ValueError, match=r"^model.generator \('base_attention'\) needs the classifier of the base classes"
    ):
        generator.fit(torch.zeros(C), None)


def test_what_fit_stores_is_in_a_checkpoint() -> None:
    assert "generator.base" in network("gram").state_dict()
    assert network("base_attention").state_dict()["generator.base"].shape == (5, C)
    assert isinstance(network("gram").generator, nn.Module)
