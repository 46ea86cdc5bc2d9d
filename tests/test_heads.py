"""The heads against loops over episodes, queries and classes written by hand, and against figures worked out on paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.class_means import ClassMeans
from lgm_dist.model.heads.cnaps import Cnaps
from lgm_dist.model.heads.cosine import Cosine
from lgm_dist.model.heads.logistic import Logistic
from lgm_dist.model.heads.ridge import Ridge

COSINE = Cosine(ModelConfig(), 3)
Vector = list[float]
Array = npt.NDArray[np.float64]


def cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def softmax(values: Vector) -> Vector:
    return [math.exp(value) / sum(map(math.exp, values)) for value in values]


def matching(support: list[Vector], query: Vector, ways: int) -> Vector:
    """A class's probability is the sum over its support images."""
    p, shots = softmax([cosine(query, image) for image in support]), len(support) // ways
    return [sum(p[c * shots + k] for k in range(shots)) for c in range(ways)]


def nearest_mean(temperature: float) -> Callable[[list[Vector], Vector, int], Vector]:
    def probabilities(support: list[Vector], query: Vector, ways: int) -> Vector:
        shots, similarities = len(support) // ways, []
        for c in range(ways):
            images = support[c * shots : (c + 1) * shots]
            mean = [sum(image[d] for image in images) / shots for d in range(len(query))]
            similarities.append(temperature * cosine(query, mean))
        return softmax(similarities)

    return probabilities


def class_means(temperature: float) -> ClassMeans:
    head = ClassMeans(ModelConfig(), 3).double()
    with torch.no_grad():
        head.temperature.fill_(temperature)
    return head


def maps(episodes: int, images: int, seed: int = 0) -> Tensor:
    """(B, n, G, h, w)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(episodes, images, 3, 2, 4, generator=generator, dtype=torch.float64) + 0.3


def mahalanobis(support: list[Vector], query: Vector, ways: int) -> Vector:
    """Half the squared distances, each by the inverse of its class's covariance (Simple CNAPS), of unit vectors."""
    classes = np.array([unit(image) for image in support]).reshape(ways, -1, len(query))  # (N, K, D)
    shots, all_of_them = classes.shape[1], np.cov(classes.reshape(-1, len(query)).T)
    logits = []
    for images in classes:
        own = np.cov(images.T) if shots > 1 else np.zeros_like(all_of_them)
        q = shots / (shots + 1) * own + (1 - shots / (shots + 1)) * all_of_them + np.eye(len(query))
        rest = unit(query) - images.mean(0)
        logits.append(-float(rest @ np.linalg.inv(q) @ rest) / 2)
    return softmax(logits)


def reconstruction(temperature: float, penalty: float, size: float) -> Callable[[list[Vector], Vector, int], Vector]:
    """FRN: each place of the query by ridge regression from all places of all images of a class."""

    def probabilities(support: list[Vector], query: Vector, ways: int) -> Vector:
        shots, logits = len(support) // ways, []
        for c in range(ways):
            rows = [place for image in support[c * shots : (c + 1) * shots] for place in places(image)]
            x = np.array(rows)  # (R, G)
            hat = np.linalg.inv(x.T @ x + len(x) / x.shape[1] * penalty * np.eye(x.shape[1])) @ x.T @ x  # (G, G)
            errors = [float(((place - size * place @ hat) ** 2).sum()) for place in places(query)]
            logits.append(-temperature * sum(errors) / len(errors))
        return softmax(logits)

    return probabilities


def unit(vector: Vector) -> Array:
    return np.array(vector) / math.hypot(*vector)


def places(image: Vector) -> list[Array]:
    """The 2 x 4 places of a flattened map of 3 channels, each of norm 1."""
    return [unit([image[g * 8 + place] for g in range(3)]) for place in range(8)]


def ridge(temperature: float, penalty: float, size: float) -> Ridge:
    head = Ridge(ModelConfig(), 3).double()
    with torch.no_grad():
        head.temperature.fill_(temperature)
        head.log_penalty.fill_(math.log(penalty))
        head.log_size.fill_(math.log(size))
    return head


HEADS = {
    "cnaps": (Cnaps(ModelConfig(), 3).double(), mahalanobis),
    "ridge": (ridge(7.0, 0.3, 1.2), reconstruction(7.0, 0.3, 1.2)),
    "cosine": (COSINE, matching),
    "class means": (ClassMeans(ModelConfig(), 3).double(), nearest_mean(10.0)),
    "class means, another temperature": (class_means(3.7), nearest_mean(3.7)),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("episodes", "ways", "shot", "queries"), [(2, 3, 1, 4), (1, 5, 3, 2), (3, 2, 2, 5)])
def test_equals_the_loop_by_hand(head: str, episodes: int, ways: int, shot: int, queries: int) -> None:
    vectorised, by_hand = HEADS[head]
    support, query = maps(episodes, ways * shot), maps(episodes, queries, 1)
    log_p = vectorised(support, query, ways)
    assert log_p.shape == (episodes, queries, ways)
    for b in range(episodes):
        for t in range(queries):
            expected = by_hand(support[b].flatten(1).tolist(), query[b, t].flatten().tolist(), ways)
            assert log_p[b, t].exp().tolist() == pytest.approx(expected, abs=1e-12)


def test_the_temperature_is_learned() -> None:
    """Its gradient by central differences."""
    support, query = maps(2, 6), maps(2, 4, 1)
    head = class_means(3.7)
    head(support, query, 3)[..., 0].sum().backward()
    up, down = (class_means(3.7 + step)(support, query, 3)[..., 0].sum().item() for step in (1e-5, -1e-5))
    assert head.temperature.grad.item() == pytest.approx((up - down) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(("ways", "shot"), [(5, 1), (5, 5), (20, 5), (3, 50)])
def test_logistic_regression_equals_scikit_learns(ways: int, shot: int) -> None:
    """With two classes scikit-learn fits one weight vector instead of two, and so another penalty."""
    centres = maps(1, ways, 5).repeat_interleave(shot, 1)
    support, query = centres + maps(1, ways * shot), maps(1, 30, 1)
    x, q = ([unit(image.tolist()) for image in images[0].flatten(1)] for images in (support, query))
    fitted = LogisticRegression(C=1.0, tol=1e-12, max_iter=100_000).fit(x, np.arange(ways).repeat(shot))
    p = Logistic(ModelConfig(), 3)(support, query, ways)[0].exp()
    np.testing.assert_allclose(p.numpy(), fitted.predict_proba(q), atol=1e-4)


def test_episodes_do_not_influence_each_other() -> None:
    support, query = maps(3, 6), maps(3, 4, 1)
    for kind in (Cnaps, Logistic, Ridge):
        head = kind(ModelConfig(), 3)
        together = head(support, query, 3)
        for b in range(3):
            torch.testing.assert_close(together[b : b + 1], head(support[b : b + 1], query[b : b + 1], 3))


@pytest.mark.parametrize("kind", [Cosine, ClassMeans, Cnaps, Logistic, Ridge])
def test_bfloat16_maps_are_compared_in_float32(kind: Callable[..., Any]) -> None:
    head = kind(ModelConfig(), 3)
    support, query = maps(2, 6).bfloat16(), maps(2, 4, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = head(support, query, 3)
    assert torch.equal(ours, head(support.float(), query.float(), 3))


@pytest.mark.parametrize(("ways", "least"), [(5, 0.433), (20, 1.273)])
def test_least_loss_of_perfect_similarities(ways: int, least: float) -> None:
    """Bounds of the specification: even similarities of +1 and -1 leave log(1 + (n - 1) e^-2) without a temperature."""
    support = -torch.ones(1, ways, 6, dtype=torch.float64)
    support[:, 1] = 1
    loss = -COSINE(support, 3 * torch.ones(1, 1, 6, dtype=torch.float64), ways)[0, 0, 1].item()
    assert loss == pytest.approx(math.log(1 + (ways - 1) * math.exp(-2)), abs=1e-12)
    assert round(loss, 3) == least


@pytest.mark.parametrize(("ways", "least"), [(5, 0.905), (20, 2.078)])
def test_least_loss_of_orthogonal_classes(ways: int, least: float) -> None:
    """log(1 + (n - 1) / e), from similarities of 1 and 0."""
    support = torch.eye(ways, dtype=torch.float64)[None]  # (1, N, D)
    loss = -COSINE(support, support, ways).diagonal(dim1=1, dim2=2)
    assert [round(value, 3) for value in loss[0].tolist()] == [least] * ways


def test_zero_features_have_similarity_zero_and_a_finite_gradient() -> None:
    for kind in (Cosine, ClassMeans, Cnaps, Logistic):
        head = kind(ModelConfig(), 3)
        support = torch.zeros(1, 2, 4, requires_grad=True)
        log_p = head(support, torch.ones(1, 1, 4), 2)
        log_p[0, 0, 0].backward()
        assert log_p.exp().tolist() == [[[0.5, 0.5]]]
        assert support.grad.isfinite().all()
