"""Calibration error, AUROC, intervals and temperatures, against scikit-learn, scipy and numbers computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from sklearn import calibration as sk_calibration
from sklearn import metrics

from lgm_dist.config import Config
from lgm_dist.data import ImageBank, open_bank
from lgm_dist.data.episodes import draw_rows, load_images
from lgm_dist.model import LGMNet, build_model
from lgm_dist.training.calibration import (
    RATES,
    SCORES,
    Calibration,
    Cell,
    calibrate,
    fit_temperature,
    measure,
    score_of,
)
from lgm_dist.training.reliability import auroc, reliability, wilson

RNG = np.random.default_rng(3)


def test_reliability_by_hand() -> None:
    found = reliability([0.05, 0.10, 0.25, 1.0, 1.0, 0.0], [False, True, True, True, False, False], bins=5)
    assert found.counts.tolist() == [3, 1, 0, 0, 2]  # 0 is in the first bin, 1 in the last
    np.testing.assert_allclose(found.confidence, [0.05, 0.25, 0, 0, 1])
    np.testing.assert_allclose(found.accuracy, [1 / 3, 1, 0, 0, 0.5])
    assert found.error == pytest.approx((3 * (1 / 3 - 0.05) + 0.75 + 2 * 0.5) / 6)
    assert reliability([0.2, 0.4], [True, True], bins=5).counts.tolist() == [1, 1, 0, 0, 0]  # a bin has its upper edge
    assert reliability([], []).error == 0.0


def test_calibration_error_against_scikit_learn() -> None:
    p = RNG.uniform(0, 1, 5000)
    right = RNG.uniform(0, 1, 5000) < p**1.5
    found = reliability(p, right)
    accuracy, confidence = sk_calibration.calibration_curve(right, p, n_bins=15, strategy="uniform")
    counts = np.histogram(p, 15, (0, 1))[0]
    np.testing.assert_allclose(found.accuracy, accuracy)
    np.testing.assert_allclose(found.confidence, confidence)
    assert found.error == pytest.approx((counts * np.abs(accuracy - confidence)).sum() / 5000)


def test_auroc_against_scikit_learn() -> None:
    inside, outside = RNG.integers(2, 12, 300), RNG.integers(0, 10, 200)  # with many ties
    labels = np.repeat([1, 0], [300, 200])
    assert auroc(inside, outside) == pytest.approx(metrics.roc_auc_score(labels, np.concatenate([inside, outside])))
    assert (auroc([2, 3], [0, 1]), auroc([0], [1]), auroc([1], [1])) == (1, 0, 0.5)


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (4, 5), (37, 50), (1, 1)])
def test_wilson_against_scipy(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


def likelihood(beta: float, logits: np.ndarray, labels: np.ndarray) -> float:
    """Negative, mean."""
    return -float(special.log_softmax(beta * logits, 1)[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("scale", [0.2, 1, 30])
def test_the_temperature_against_scipy(scale: float) -> None:
    logits = RNG.standard_normal((2000, 5)) * 2
    labels = np.array([RNG.choice(5, p=p) for p in special.softmax(logits, 1)])  # right at temperature 1
    found = fit_temperature(torch.from_numpy(scale * logits), torch.from_numpy(labels))
    best = optimize.minimize_scalar(lambda b: likelihood(np.exp(b), scale * logits, labels), (-1, 1), tol=1e-10)
    assert found == pytest.approx(np.exp(-best.x), rel=1e-4)
    assert found == pytest.approx(scale, rel=0.15)


def test_the_temperature_has_bounds() -> None:
    perfect, wrong = torch.eye(4), torch.arange(4).roll(1)
    assert fit_temperature(perfect, torch.arange(4)) == pytest.approx(1e-3)
    assert fit_temperature(perfect, wrong) == pytest.approx(1e3)


def test_scores_against_scipy() -> None:
    z = RNG.standard_normal((50, 4))
    ordered = np.sort(z, 1)
    expected = {
        "probability": special.softmax(z / 0.3, 1).max(1),
        "similarity": ordered[:, -1],
        "margin": ordered[:, -1] - ordered[:, -2],
        "energy": 0.3 * special.logsumexp(z / 0.3, 1),
    }
    assert expected.keys() == set(SCORES)
    for name, values in expected.items():
        np.testing.assert_allclose(score_of(name, torch.from_numpy(z), 0.3).numpy(), values)


@pytest.fixture(scope="module")
def bank(tiny: Path) -> ImageBank:
    return open_bank(tiny, "val")


@pytest.fixture(scope="module")
def config(small: Config) -> Config:
    return small.replace(model=replace(small.model, generator="none", head="class_means"), eval_flips=True)


@pytest.fixture(scope="module")
def model(config: Config) -> LGMNet:
    return build_model(config.model, seed=1).eval()


@torch.no_grad()
def by_loop(model: LGMNet, bank: ImageBank, config: Config, shot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits inside (n, 3), labels (n,), logits outside (m, 3): 10 times the cosines, image by image."""

    def vector(row: int) -> np.ndarray:
        image = load_images(bank, config, np.array([row]))
        views = [model.embed(view)[0][0] for view in (image, image.flip(3))]
        return torch.stack(views).mean(0).flatten().double().numpy()

    wide = draw_rows(bank, config.replace(eval_ways=6, eval_shot=shot), "val", 0, 4)  # tiny has 6 classes
    inside, labels, outside = [], [], []
    for support, query in zip(wide.support, wide.query, strict=True):
        means = np.stack([np.mean([vector(row) for row in rows], 0) for rows in support.reshape(6, shot)[:3]])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        for label, rows in enumerate(query.reshape(6, 3)):
            asked = np.stack([vector(row) for row in rows])
            logits = 10 * asked / np.linalg.norm(asked, axis=1, keepdims=True) @ means.T
            (inside if label < 3 else outside).extend(logits)
            labels += [label] * 3 if label < 3 else []
    return np.array(inside), np.array(labels), np.array(outside)


def test_calibrate_against_a_loop(model: LGMNet, bank: ImageBank, config: Config) -> None:
    found = calibrate(model, bank, config, shots=(1, 2), episodes=4)
    aurocs = []
    for cell, shot in zip(found.cells, (1, 2), strict=True):
        inside, labels, outside = by_loop(model, bank, config, shot)
        assert (cell.ways, cell.shot, cell.episodes) == (3, shot, 4)
        best = optimize.minimize_scalar(lambda b: likelihood(np.exp(b), inside, labels), (-1, 1), tol=1e-10)  # noqa: B023
        temperature = float(np.clip(np.exp(-best.x), 1e-3, 1e3))
        assert cell.temperature == pytest.approx(temperature, rel=1e-3)
        for t, error in ((temperature, cell.error), (1.0, cell.error_before)):
            p = special.softmax(inside / t, 1)
            assert error == pytest.approx(reliability(p.max(1), p.argmax(1) == labels).error, abs=1e-3)
        scores = [score_of(found.score, torch.from_numpy(x), temperature).numpy() for x in (inside, outside)]
        np.testing.assert_allclose(cell.thresholds, np.quantile(scores[0], RATES), atol=1e-3)
        truth = np.repeat([1, 0], [len(inside), len(outside)])
        assert cell.auroc[found.score] == pytest.approx(metrics.roc_auc_score(truth, np.concatenate(scores)), abs=0.01)
        aurocs.append(cell.auroc)
    assert found.score == max(SCORES, key=lambda name: sum(a[name] for a in aurocs))
    assert calibrate(model, bank, config, shots=(1, 2), episodes=4) == found
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_measure_on_other_episodes(model: LGMNet, bank: ImageBank, config: Config) -> None:
    fitted = calibrate(model, bank, config, shots=(1, 2), episodes=4)
    again = measure(fitted, model, bank, config, shots=(1, 2), episodes=4, rate=0.25)  # on those that it was fitted to
    for found, cell in zip(again, fitted.cells, strict=True):
        assert (found.ways, found.shot, found.auroc) == (cell.ways, cell.shot, cell.auroc)
        assert (found.reliability.error, found.error_before) == pytest.approx((cell.error, cell.error_before))
        assert found.reliability.counts.sum() == 4 * 3 * 3
        assert found.false_alarms == pytest.approx(0.25, abs=0.5 / 9)
    other = config.replace(eval_seed=5)
    (found,) = measure(fitted, model, bank, other, shots=(2,), episodes=4)
    inside, labels, outside = by_loop(model, bank, other, 2)
    p = special.softmax(inside / fitted.temperature(3, 2), 1)
    assert found.reliability.error == pytest.approx(reliability(p.max(1), p.argmax(1) == labels).error, abs=1e-3)
    scores = score_of(fitted.score, torch.from_numpy(outside), fitted.temperature(3, 2)).numpy()
    assert found.found == pytest.approx((scores < fitted.threshold(3, 2)).mean())


def test_without_other_classes_there_is_no_threshold(model: LGMNet, bank: ImageBank, config: Config) -> None:
    found = calibrate(model, bank, config, shots=(1,), ways=(6,), episodes=3)
    assert (found.score, found.cells[0].thresholds, found.threshold(6, 1)) == ("", (), None)
    assert found.temperature(6, 1) == found.cells[0].temperature
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_shots_that_the_classes_are_too_small_for_are_left_out(model: LGMNet, bank: ImageBank, config: Config) -> None:
    found = calibrate(model, bank, config, shots=(2, 22), episodes=3)  # 22 + 3 queries of 24 images
    assert [cell.shot for cell in found.cells] == [2]
    found = calibrate(model, bank, config, shots=(22,), episodes=3)
    assert [cell.shot for cell in found.cells] == [2]  # the config's own


def test_the_paper_protocol_has_no_calibration(model: LGMNet, bank: ImageBank, config: Config) -> None:
    with pytest.raises(ValueError, match=r"^calibration needs protocol standard: paper leaks the label"):
        calibrate(model, bank, config.replace(protocol="paper", eval_flips=False))


def test_between_the_cells() -> None:
    def cell(ways: int, shot: int, temperature: float, low: float) -> Cell:
        return Cell(ways, shot, 9, temperature, 0.0, 0.0, tuple(low + rate for rate in RATES), {})

    found = Calibration("energy", (cell(5, 1, 0.1, 0), cell(5, 4, 0.4, 2), cell(20, 1, 0.7, 7)))
    assert found.temperature(5, 1) == pytest.approx(0.1)
    assert found.temperature(6, 2) == pytest.approx(0.2)  # midway in log(shot), geometric mean
    assert found.temperature(5, 100) == pytest.approx(0.4)
    assert found.temperature(100, 3) == pytest.approx(0.7)
    assert found.threshold(5, 2, 0.25) == pytest.approx(1.25)
    assert found.threshold(20, 1, 0.005) == pytest.approx(7.005)
