"""Classes with unequal numbers of support images: every head and generator that takes them, against loops by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lgm_dist.config import ModelConfig
from lgm_dist.model import LGMNet, build_model

SHOTS = [3, 1, 5, 2]
G, SIDE, QUERIES = 4, 3, 7
GENERATORS = ("lgm", "residual", "low_rank", "class_attention", "none")


def maps(count: int, seed: int = 0) -> np.ndarray:
    """(count, G, SIDE, SIDE)"""
    return np.random.default_rng(seed).standard_normal((count, G, SIDE, SIDE)) + 0.3


SUPPORT, QUERY = maps(sum(SHOTS)), maps(QUERIES, 1)


def head(name: str) -> Any:
    config = ModelConfig(channels=G, filters=G, head=name, backbone="conv4", generator="none")
    return build_model(config).head.double()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_class(x: np.ndarray) -> list[np.ndarray]:
    return np.split(x, np.cumsum(SHOTS)[:-1])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def class_means() -> np.ndarray:
    means = np.stack([part.mean(0) for part in by_class(SUPPORT.reshape(len(SUPPORT), -1))])
    return softmax(10 * unit(QUERY.reshape(QUERIES, -1)) @ unit(means).T)


def cosine() -> np.ndarray:
    likeness = np.exp(unit(QUERY.reshape(QUERIES, -1)) @ unit(SUPPORT.reshape(len(SUPPORT), -1)).T)
    means = np.stack([part.mean(1) for part in np.split(likeness, np.cumsum(SHOTS)[:-1], axis=1)], 1)
    return means / means.sum(1, keepdims=True)


def cnaps() -> np.ndarray:
    s, q = unit(SUPPORT.reshape(len(SUPPORT), -1)), unit(QUERY.reshape(QUERIES, -1))
    everything, distances = np.cov(s.T), []
    for part in by_class(s):
        k = len(part)
        own = np.cov(part.T) if k > 1 else 0
        covariance = k / (k + 1) * own + everything / (k + 1) + np.eye(s.shape[1])
        rest = q - part.mean(0)
        distances.append((rest * np.linalg.solve(covariance, rest.T).T).sum(1))
    return softmax(-np.stack(distances, 1) / 2)


def logistic() -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    labels = np.repeat(np.arange(len(SHOTS)), SHOTS)
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    model.fit(unit(SUPPORT.reshape(len(SUPPORT), -1)), labels)
    found: np.ndarray = model.predict_proba(unit(QUERY.reshape(QUERIES, -1)))
    return found


def ridge() -> np.ndarray:
    def places(x: np.ndarray) -> np.ndarray:
        return unit(x.reshape(len(x), G, -1).transpose(0, 2, 1))  # (n, P, G)

    residuals = []
    for part in by_class(places(SUPPORT)):
        s = part.reshape(-1, G)  # (K * P, G)
        penalty = len(s) / G * np.exp(2.0)
        shares = np.linalg.solve(s @ s.T + penalty * np.eye(len(s)), s)  # (K * P, G)
        rebuilt = places(QUERY) @ shares.T @ s
        residuals.append(((places(QUERY) - rebuilt) ** 2).sum(2).mean(1))
    return softmax(-10 * np.stack(residuals, 1))


@pytest.mark.parametrize("expected", [class_means, cosine, cnaps, logistic, ridge], ids=lambda f: f.__name__)
def test_heads_against_loops(expected: Any) -> None:
    found = head(expected.__name__).logits(torch.from_numpy(SUPPORT)[None], torch.from_numpy(QUERY)[None], SHOTS)
    atol = 2e-4 if expected is logistic else 2e-6
    np.testing.assert_allclose(found[0].softmax(-1).detach().numpy(), expected(), atol=atol)


@pytest.mark.parametrize("name", ["class_means", "cosine", "cnaps", "logistic", "ridge"])
def test_logits_of_equal_shots_give_the_heads_answer(name: str) -> None:
    s, q = torch.from_numpy(maps(12))[None], torch.from_numpy(QUERY)[None]
    made = head(name)
    torch.testing.assert_close(made.logits(s, q, [3] * 4).log_softmax(-1), made(s, q, 4))


def network(generator: str) -> LGMNet:
    """A network whose generated weights differ from none."""
    model = build_model(ModelConfig(channels=3, filters=4, noise_size=3, generator=generator, head="class_means"))
    random = torch.Generator().manual_seed(3)
    for parameter in model.generator.parameters():
        with torch.no_grad():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return model.double().eval()


@pytest.mark.parametrize("generator", GENERATORS)
@torch.no_grad()
def test_generators_of_equal_shots_give_the_networks_answer(generator: str) -> None:
    model = network(generator)
    features = torch.from_numpy(np.random.default_rng(2).standard_normal((1, 12 + 5, 4, 4, 4)))
    codes = model.generator.encode(features[0, :12], 1)[None]
    torch.testing.assert_close(
        model.logits(features, codes, [3] * 4).log_softmax(-1), model.classify(features, codes, 4)
    )


@pytest.mark.parametrize("generator", GENERATORS)
@torch.no_grad()
def test_images_that_are_there_twice_change_nothing_that_a_mean_does_not(generator: str) -> None:
    """All images of a class twice, for every class: unequal shots (2, 4, 6) are (1, 2, 3) again."""
    model, once = network(generator), [1, 2, 3]
    features = torch.from_numpy(np.random.default_rng(2).standard_normal((1, 6 + 5, 4, 4, 4)))
    twice = torch.cat([features[:, :6].repeat_interleave(2, 1), features[:, 6:]], 1)
    answers = [
        model.logits(x, model.generator.encode(x[0, : sum(shots)], 1)[None], shots)
        for x, shots in ((features, once), (twice, [2 * k for k in once]))
    ]
    torch.testing.assert_close(*answers)


@torch.no_grad()
def test_low_rank_against_a_loop() -> None:
    model, shots = network("low_rank"), [1, 3]
    x = np.random.default_rng(2).standard_normal((1, 4 + 2, 4, 2, 2))
    a, b = model.generator.down.weight.numpy(), model.generator.up.weight.numpy()
    averages = x[0, :4].mean((2, 3))
    means = unit(np.stack([averages[0], averages[1:].mean(0)]))
    layer = np.eye(4) + sum(np.outer(b @ m, a @ m) for m in means) / 2
    moved = np.einsum("fg,nghw->nfhw", layer, x[0]).reshape(6, -1)
    expected = 10 * unit(moved[4:]) @ unit(np.stack([moved[0], moved[1:4].mean(0)])).T
    features = torch.from_numpy(x)
    found = model.logits(features, model.generator.encode(features[0, :4], 1)[None], shots)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("generator", ["completion", "gram", "metric", "projection"])
def test_generators_that_count_the_shots_refuse(generator: str) -> None:
    model = network(generator)
    assert model.needs_equal_shots() == f"model.generator ({generator!r})"
    features = torch.zeros(1, 5, 4, 4, 4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=rf"^model\.generator \('{generator}'\) needs the same number of images of each"
    ):
        model.logits(features, torch.zeros(1, 3, 4, dtype=torch.float64), [1, 2])
