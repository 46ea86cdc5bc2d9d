"""The generator base_directions: against a loop in numpy over one episode, and where it stands in the network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lgm_dist import evaluate, fit, load
from lgm_dist.config import Config, ModelConfig
from lgm_dist.data import open_bank
from lgm_dist.model import LGMNet, build_model
from lgm_dist.model.controls import with_other_context
from lgm_dist.training.base_statistics import fit_head, needs_statistics
from lgm_dist.training.comparison import compare

N, K, T, C = 3, 2, 5, 6
PLAIN = ModelConfig(backbone="none", head="class_means", channels=C, filters=C, pool=2, noise_size=4)
STRONG: dict[str, Any] = {"power": 0.5, "centre": True, "shrinkage": 0.4, "rotations": 1}
Array = npt.NDArray[np.float64]


def base(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps (200, C, 4, 4) of 20 base classes that differ, and their labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(20).repeat(10)
    centres = torch.randn(20, C, 4, 4, generator=random, dtype=torch.float64)
    return centres[labels] + 0.5 * torch.randn(200, C, 4, 4, generator=random, dtype=torch.float64), labels


def network(**settings: Any) -> LGMNet:
    """A fitted network whose images are maps."""
    model = build_model(replace(PLAIN, generator="base_directions", **settings)).double().eval()
    model.generator.fit(*base())  # type: ignore[attr-defined]
    return model


def episode(shots: int = K, episodes: int = 2) -> tuple[Tensor, Tensor]:
    """support (B, N * K, C, 4, 4) and query (B, T, C, 4, 4)"""
    random = torch.Generator().manual_seed(3)
    both = torch.randn(episodes, N * shots + T, C, 4, 4, generator=random, dtype=torch.float64)
    return both[:, : N * shots], both[:, N * shots :]


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def wanted(model: LGMNet, support: Tensor, query: Tensor, share: float, centred: float) -> Array:
    """Cosines of one episode (T, N), written down from the definition."""
    vectors = model.generator.vectors  # type: ignore[attr-defined]
    x, labels = base()
    v = vectors(x[None])[0].numpy()
    means = np.stack([v[labels.numpy() == c].mean(0) for c in range(20)])
    variances, found = np.linalg.eigh(np.cov(means.T, bias=True))
    order = np.argsort(-variances)[:16]
    s, q = (vectors(images[None])[0].numpy() for images in (support, query))
    shots = len(s) // N
    weights = []
    for c in range(N):
        m = unit(s[c * shots : (c + 1) * shots].mean(0))
        moved = sum((variances[j] / variances[order[0]]) ** 0.5 * (m @ found[:, j]) * found[:, j] for j in order)
        weights.append(m + share / shots * unit(moved))
    centre = centred * np.mean(weights, 0)
    return unit(unit(q) - centre) @ unit(np.stack(weights) - centre).T


@pytest.mark.parametrize("settings", [{}, STRONG])
@pytest.mark.parametrize("shots", [1, 2, 5])
@pytest.mark.parametrize(("share", "centred"), [(0.2, 0.3), (0.0, 0.3), (0.7, 0.0)])
def test_it_is_what_its_definition_says(settings: dict[str, Any], shots: int, share: float, centred: float) -> None:
    model = network(base_share=share, episode_share=centred, **settings)
    support, query = episode(shots)
    with torch.no_grad():
        found = model(support, query, N)
    for b in range(2):
        cosines = torch.from_numpy(wanted(model, support[b], query[b], share, centred))
        torch.testing.assert_close(found[b], (10 * cosines).log_softmax(-1))


@pytest.mark.parametrize("settings", [{}, STRONG])
def test_without_it_the_network_is_that_of_class_means(settings: dict[str, Any]) -> None:
    model, (support, query) = network(**settings), episode()
    plain = build_model(replace(PLAIN, generator="none", **settings)).double().eval()
    plain.head.vectors.fit(*base())  # type: ignore[attr-defined]
    with torch.no_grad():
        off, none = model.without_generator()(support, query, N), plain(support, query, N)
        shares_of_nothing = network(base_share=0.0, episode_share=0.0, **settings)(support, query, N)
        on, other = model(support, query, N), with_other_context(model)(support, query, N)
    torch.testing.assert_close(off, none)
    torch.testing.assert_close(shares_of_nothing, none)
    assert (on - none).abs().max() > 0.01
    assert (other - on).abs().max() > 0.01


def test_a_network_can_be_given_it_and_keeps_its_temperature() -> None:
    plain = build_model(PLAIN).double().eval().without_generator()
    plain.head.temperature.data.fill_(3.0)  # type: ignore[attr-defined]
    model = plain.with_head(replace(plain.config, generator="base_directions", centre=True)).double()
    assert needs_statistics(model)
    assert model.backbone is plain.backbone
    assert model.head.temperature.item() == 3.0  # type: ignore[attr-defined]
    model.generator.fit(*base())  # type: ignore[attr-defined]
    support, query = episode()
    with torch.no_grad():
        cosines = torch.from_numpy(wanted(model, support[0], query[0], 0.2, 0.3))
        torch.testing.assert_close(model(support, query, N)[0], (3 * cosines).log_softmax(-1))
    again = model.with_head(replace(model.config, episode_share=0.0))
    assert torch.equal(again.generator.directions, model.generator.directions.float())  # type: ignore[attr-defined]


def test_it_refuses_maps_of_unknown_size_and_shares_out_of_range() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.pool \(0\) must be 1, 2, 3 or 4 for model\.generator base_directions"
    ):
        build_model(replace(PLAIN, generator="base_directions", pool=0))
    for name in ("base_share", "episode_share"):
        with pytest.raises(ValueError, match=rf"{name} \(1\.5\)"):
            replace(PLAIN, **{name: 1.5})


def test_a_single_base_class_has_no_directions() -> None:
    model = build_model(replace(PLAIN, generator="base_directions")).double().eval()
    model.generator.fit(base()[0], torch.zeros(200, dtype=torch.int64))  # type: ignore[attr-defined]
    support, query = episode()
    assert not model.generator.directions.any()  # type: ignore[attr-defined]
    assert model(support, query, N).isfinite().all()


def test_a_comparison_fits_it_to_the_base_classes(small: Config, tiny: Any) -> None:
    """The row of the generator, against a network that `fit_head` has fitted."""
    model = build_model(replace(small.model, generator="none", head="class_means", pool=2)).eval()
    bank, train = open_bank(tiny, "val"), open_bank(tiny, "train")
    rows: list[dict[str, Any]] = [{"model.generator": "base_directions", "model.centre": True}]
    found = compare(model, bank, train, [small], rows, 20)[1].evaluations[0]
    fitted = model.with_head(replace(model.config, generator="base_directions", centre=True))
    fit_head(fitted, train, small)
    assert fitted.generator.directions.any()  # type: ignore[attr-defined]
    again = compare(fitted, bank, train, [small], [], 20)[0].evaluations[0]
    assert np.array_equal(found.accuracies["mean noise"], again.accuracies["mean noise"])
    off = compare(fitted, bank, train, [small], [{"model.generator": "none"}], 20)[1].evaluations[0]
    assert not np.array_equal(found.accuracies["mean noise"], off.accuracies["mean noise"])


def test_with_other_context_it_is_fitted_too_and_can_be_switched_off(small: Config, tiny: Any) -> None:
    model = build_model(replace(small.model, generator="none", head="class_means", pool=2)).eval()
    bank, train = open_bank(tiny, "val"), open_bank(tiny, "train")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    settings = {"model.generator": "base_directions", "model.shrinkage": 0.5}
    rows = compare(model, bank, train, [small], [{**settings, "context": "other"}], 20)
    fitted = model.with_head(replace(model.config, generator="base_directions", shrinkage=0.5))
    fit_head(fitted, train, small)
    again = compare(fitted, bank, train, [small], [{"context": "other"}], 20)
    found, expected = (row[1].evaluations[0].accuracies["mean noise"] for row in (rows, again))
    assert np.array_equal(found, expected)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    support, query = torch.randn(2, 6, 3, 16, 16), torch.randn(2, 4, 3, 16, 16)
    with torch.no_grad():
        off = with_other_context(fitted).without_generator()(support, query, 3)
        torch.testing.assert_close(off, fitted.without_generator()(support, query, 3))


def test_pretraining_measures_the_network_with_it(small: Config, tiny: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"pretraining.batch": 12, "pretraining.steps": 4, "pretraining.eval_every": 2}
    model = replace(small.model, generator="base_directions", head="class_means", pool=2, centre=True)
    run = fit(small.replace(stages=("pretraining",), storage=str(tmp_path), name="run", model=model, **settings))
    learner = load(run)
    again = evaluate(learner.model, open_bank(tiny, "test"), learner.config, "test", 6)
    assert json.loads((run / "result.json").read_text())["test/accuracy"] == again.score.accuracy
    off = evaluate(learner.model.without_generator(), open_bank(tiny, "test"), learner.config, "test", 6)
    assert not np.array_equal(off.accuracies["mean noise"], again.accuracies["mean noise"])


def test_dense_matching_is_refused(small: Config) -> None:
    with pytest.raises(ValueError, match=r"^model\.head \('ridge'\) compares the places of maps"):
        build_model(replace(small.model, generator="base_directions", head="ridge", pool=2))


@pytest.mark.parametrize("generator", ["none", "base_directions"])
@pytest.mark.parametrize("head", ["class_means", "cnaps", "logistic"])
@pytest.mark.parametrize("settings", [{}, STRONG])
@torch.no_grad()
def test_the_network_on_vectors_gives_the_same_answers(generator: str, head: str, settings: dict[str, Any]) -> None:
    model = build_model(replace(PLAIN, generator=generator, head=head, **settings)).double().eval()
    for part in (model.generator, getattr(model.head, "vectors", None)):
        if getattr(part, "needs_statistics", False):
            part.fit(*base())  # type: ignore[union-attr]
    support, query = episode()
    for network in (model, with_other_context(model) if generator != "none" else model):
        found = network.on_vectors()
        assert found is not None
        vectors, light = found
        s, q = (vectors(x)[..., None, None] for x in (support, query))
        codes = light.generator.encode(s.flatten(0, 1), 2).unflatten(0, s.shape[:2])
        whole = network.generator.encode(support.flatten(0, 1), 2).unflatten(0, support.shape[:2])
        expected = network.classify(torch.cat([support, query], 1), whole, N)
        torch.testing.assert_close(light.double().classify(torch.cat([s, q], 1), codes, N), expected)


def test_networks_that_compare_maps_as_they_are_have_no_vectors() -> None:
    for settings in (
        {"generator": "low_rank"},
        {"generator": "none", "pool": 0},
        {"generator": "none", "head": "ridge"},
    ):
        assert build_model(replace(PLAIN, **settings)).on_vectors() is None  # type: ignore[arg-type]
