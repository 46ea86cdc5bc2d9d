"""What heads compare: pooled, powered, centred and whitened maps, against loops by hand and numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lgm_dist.config import ModelConfig
from lgm_dist.model import LGMNet, build_model
from lgm_dist.model.heads.vectors import Vectors

Array = npt.NDArray[np.float64]
SMALL = {"filters": 4, "noise_size": 2, "generator": "none"}


def maps(*shape: int, seed: int = 0) -> Tensor:
    """Signed values, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(x: Tensor, labels: Tensor, *, places: bool = False, **settings: object) -> Vectors:
    vectors = Vectors(ModelConfig(**settings), x.shape[1], places=places).double()
    vectors.fit(x, labels)
    return vectors


def covariance(x: Array, labels: list[int]) -> Array:
    """The mean of the classes' scatter, divided by images less classes, one image after the other."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for label in set(labels):
        own = np.array([row for row, name in zip(x, labels, strict=True) if name == label])
        for row in own:
            total += np.outer(row - own.mean(0), row - own.mean(0))
    return total / (len(x) - len(set(labels)))


def test_by_default_a_map_is_flattened() -> None:
    x = maps(2, 3, 4, 2, 2)
    vectors = Vectors(ModelConfig(), 4)
    assert torch.equal(vectors(x), x.reshape(2, 3, 16))
    assert (vectors.needs_statistics, vectors.state_dict()) == (False, {})


@pytest.mark.parametrize(("pool", "windows"), [(1, [(0, 4)]), (2, [(0, 2), (2, 4)]), (3, [(0, 2), (1, 3), (2, 4)])])
def test_pooling_of_4_x_4_against_means_over_windows(pool: int, windows: list[tuple[int, int]]) -> None:
    x = maps(2, 3, 5, 4, 4)
    expected = [x[..., a:b, c:d].mean((3, 4)) for a, b in windows for c, d in windows]  # each (2, 3, 5)
    found = Vectors(ModelConfig(pool=pool), 5)(x)
    torch.testing.assert_close(found, torch.stack(expected, -1).flatten(2))
    of_places = Vectors(ModelConfig(pool=pool), 5, places=True)(x)
    torch.testing.assert_close(of_places, torch.stack(expected, 2))


def test_the_power_keeps_the_sign_and_has_a_finite_gradient_at_zero() -> None:
    x = torch.tensor([[[4.0, -9.0, 0.0, 0.25]]], requires_grad=True)
    found = Vectors(ModelConfig(power=0.5), 4)(x)
    assert found.tolist() == [[[2.0, -3.0, 0.0, 0.5]]]
    found.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[0.25, 1 / 6, 0.0, 1.0]]]))


def test_centring_subtracts_the_mean_of_powered_images() -> None:
    x, labels = maps(12, 3, 4, 4), torch.arange(12) % 3
    vectors = fitted(x, labels, pool=1, power=2.0, centre=True)
    pooled = np.array([[image[g].mean() for g in range(3)] for image in x.numpy()])  # (n, G)
    powered = np.sign(pooled) * pooled**2
    query = maps(1, 5, 3, 4, 4, seed=1)
    expected = [np.sign(q) * q**2 - powered.mean(0) for q in query[0].numpy().mean((2, 3))]
    np.testing.assert_allclose(vectors(query)[0].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("shrinkage", [1e-3, 0.3, 0.9])
@pytest.mark.parametrize("centre", [True, False])
def test_distances_of_whitened_vectors_are_mahalanobis_distances(shrinkage: float, centre: bool) -> None:
    """By the shrunk covariance within classes whose sizes differ, up to the scale that makes its mean eigenvalue 1."""
    x, labels = maps(40, 2, 2, 2), torch.tensor([0] * 20 + [1] * 15 + [3] * 5)
    x = x + 5 * labels[:, None, None, None]
    vectors = fitted(x, labels, pool=2, shrinkage=shrinkage, centre=centre)
    c = covariance(x.flatten(1).numpy(), labels.tolist())
    scale = np.trace(c) / 8
    inverse = np.linalg.inv((1 - shrinkage) * c + shrinkage * scale * np.eye(8)) * scale
    pair = maps(1, 2, 2, 2, 2, seed=1)
    difference = (pair[0, 0] - pair[0, 1]).flatten().numpy()
    found = vectors(pair)[0]
    assert float((found[0] - found[1]).square().sum()) == pytest.approx(difference @ inverse @ difference, rel=1e-9)
    if centre:
        np.testing.assert_allclose(vectors(x[None])[0].mean(0).numpy(), np.zeros(8), atol=1e-12)


def test_statistics_over_places_are_those_of_all_places_as_images() -> None:
    x, labels = maps(12, 3, 2, 2), torch.arange(12) % 4
    vectors = fitted(x, labels, places=True, centre=True, shrinkage=0.5)
    flat = x.permute(0, 2, 3, 1).reshape(48, 3, 1, 1)
    as_images = fitted(flat, labels.repeat_interleave(4), pool=1, centre=True, shrinkage=0.5)
    for name, tensor in vectors.state_dict().items():
        torch.testing.assert_close(tensor, as_images.state_dict()[name])


def test_constant_maps_are_left_as_they_are() -> None:
    vectors = fitted(torch.ones(6, 2, 2, 2).double(), torch.arange(6) % 2, pool=1, shrinkage=0.5)
    assert vectors(maps(1, 3, 2, 2, 2)).isfinite().all()


@pytest.mark.parametrize("head", ["class_means", "cosine", "cnaps", "logistic"])
@pytest.mark.parametrize("settings", [{"centre": True}, {"shrinkage": 0.5}])
def test_statistics_of_maps_of_unknown_size_are_refused(head: str, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^model\.pool \(0\) must be 1, 2, 3 or 4 for .*; use --model\.pool 2$"):
        build_model(ModelConfig(**SMALL, head=head, **settings))
    build_model(ModelConfig(**SMALL, head="ridge", **settings))


def test_statistics_belong_to_the_learner() -> None:
    config = ModelConfig(**SMALL, head="class_means", pool=2, centre=True, shrinkage=0.5)
    model, other = build_model(config), build_model(config)
    model.head.vectors.fit(maps(20, 4, 4, 4).float(), torch.arange(20) % 5)
    other.load_state_dict(model.state_dict())
    x = maps(1, 6, 4, 4, 4).float(), maps(1, 3, 4, 4, 4, seed=1).float()
    assert torch.equal(model.head(*x, 3), other.head(*x, 3))
    assert not torch.allclose(model.head(*x, 3), build_model(config).head(*x, 3))


def test_another_head_keeps_what_is_learned_and_shares_the_rest() -> None:
    model = build_model(ModelConfig(**SMALL, head="class_means"))
    with torch.no_grad():
        model.head.temperature.fill_(3.0)
    other: LGMNet = model.with_head(ModelConfig(**SMALL, head="class_means", pool=2, centre=True))
    assert other.backbone is model.backbone
    assert other.head is not model.head
    assert (other.head.temperature.item(), model.head.temperature.item()) == (3.0, 3.0)
    assert other.config.pool == 2
    with torch.no_grad():
        other.head.temperature.fill_(4.0)
    assert model.head.temperature.item() == 3.0
    assert model.with_head(ModelConfig(**SMALL, head="ridge")).head.temperature.item() == 3.0


def test_each_rotation_is_whitened_by_itself_and_weighs_the_same() -> None:
    x, labels = maps(60, 8, 4, 4).abs(), torch.arange(60) % 5
    together = fitted(x, labels, pool=2, centre=True, shrinkage=0.3, rotations=4)
    found = together(x[None])[0]  # (60, 32)
    for r in range(4):
        alone = fitted(x[:, 2 * r : 2 * r + 2], labels, pool=2, centre=True, shrinkage=0.3)(
            x[None, :, 2 * r : 2 * r + 2]
        )[0]
        expected = alone / alone.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[:, 8 * r : 8 * r + 8], expected)


def test_the_maps_of_four_rotations_are_those_of_rotated_images() -> None:
    model = build_model(ModelConfig(**SMALL, rotations=4, head="class_means"), seed=0).eval()  # type: ignore[arg-type]
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    turned = [torch.from_numpy(np.rot90(images.numpy(), r, (2, 3)).copy()) for r in range(4)]
    expected = torch.cat([model.backbone(x, 1) for x in turned], 1)
    torch.testing.assert_close(model.embed(images)[0], expected)
    assert model.embed(images)[0].shape == (3, 16, 2, 2)


def test_rotations_of_a_network_can_be_switched_unless_a_generator_was_trained_for_them() -> None:
    model = build_model(ModelConfig(**SMALL, head="class_means"), seed=0).eval()  # type: ignore[arg-type]
    turned = model.with_head(replace(model.config, rotations=4, pool=1, centre=True))
    support, query = (torch.randn(2, n, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (6, 4))
    assert turned(support, query, 3).shape == (2, 4, 3)
    own = build_model(ModelConfig(filters=4, noise_size=2), seed=0)
    with pytest.raises(
        ValueError, match=r"model.rotations \(4\) and model.blocks \(1\) must be 1 and 1, for which the generator 'lgm'"
    ):
        own.with_head(replace(own.config, rotations=4))


def test_the_maps_of_two_blocks_are_those_before_and_after_the_last_convolution() -> None:
    model = build_model(ModelConfig(**SMALL, blocks=2, head="class_means"), seed=0).eval()  # type: ignore[arg-type]
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    third, last = model.embed(images)[0].chunk(2, 1)  # (3, 4, 2, 2) each
    backbone: Any = model.backbone
    expected = backbone.norms[3](backbone.convs[3](third), 1).relu()
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(last, backbone(images, 1))
    with pytest.raises(ValueError, match=r"^model.blocks \(2\) needs the backbone conv4, not 'resnet12'"):
        build_model(ModelConfig(backbone="resnet12", filters=4, blocks=2))
