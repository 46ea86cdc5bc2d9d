"""Confusion and generated weights against loops over single episodes and support sets, figures by hand."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.steps import train_step

from lgm_dist.config import Config, Protocol
from lgm_dist.data import ImageBank, open_bank, sample_episodes
from lgm_dist.data.episodes import draw_noise, draw_rows, load_images
from lgm_dist.model import LGMNet
from lgm_dist.report import analysis
from lgm_dist.report.analysis import analyse, read_analysis
from lgm_dist.runs import checkpoint
from lgm_dist.training.evaluation import evaluate
from lgm_dist.training.schedule import make_optimizer


def trained(config: Config, run: Path, steps: int = 15) -> Path:
    """A run with two checkpoints, of which the first, of `steps` steps, is the best on val."""
    torch.manual_seed(0)
    model, bank = LGMNet(replace(config.model, norm_decay=0.5)), open_bank(config.data.name, "train")
    optimizer = make_optimizer(model, config)
    for step in range(steps):
        batch = sample_episodes(bank, config, "train", step * config.episodes.meta_batch, config.episodes.meta_batch)
        train_step(model.train(), optimizer, batch, config, step)
    checkpoint.save(run, checkpoint.TrainState(steps, 0.9), model, optimizer, config)
    checkpoint.save(run, checkpoint.TrainState(steps + 1, 0.1), LGMNet(config.model), optimizer, config)
    return run


@pytest.fixture(scope="module", params=["standard", "paper"])
def run(request: pytest.FixtureRequest, small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    protocol: Protocol = request.param
    config = small.replace(protocol=protocol, eval_ways=4, eval_shot=1, eval_episodes=25)
    run = trained(config, tmp_path_factory.mktemp(protocol))
    analyse(run, open_bank(config.data.name, "val"))
    return run


@pytest.fixture
def found(run: Path) -> dict[str, Any]:
    return read_analysis(run)


def parts(run: Path) -> tuple[LGMNet, Config, ImageBank]:
    model, config, _ = checkpoint.load_model(checkpoint.best(run))
    return model, config, open_bank(config.data.name, "val")


def test_what_it_was_asked(run: Path, found: dict[str, Any]) -> None:
    _, config, bank = parts(run)
    expected = {"split": "val", "step": 15, "episodes": 25, "ways": 4, "shot": 1, "chance": 0.25}
    assert found.items() >= (expected | {"protocol": config.episodes.protocol}).items()
    assert found["classes"] == list(bank.classes) == [f"val{c}" for c in range(6)]
    assert found["groups"] == [""] * 6


def test_confusion_against_a_loop_over_episodes(run: Path, found: dict[str, Any]) -> None:
    """Each episode by itself through the network's forward pass, each query by itself counted."""
    model, config, bank = parts(run)
    confusion, met = np.zeros((6, 6), int), np.zeros((6, 6), int)
    hits: dict[int, list[list[bool]]] = {c: [] for c in range(6)}
    for i in range(25):
        batch = sample_episodes(bank, config, "val", i, 1)
        with torch.no_grad():
            log_p = model(batch.support, batch.query, 4, batch.noise if config.episodes.protocol == "paper" else None)[
                0
            ]  # (T, N)
        classes, here = draw_rows(bank, config, "val", i, 1).classes[0].tolist(), {}
        for label, p in zip(batch.labels[0].tolist(), log_p.tolist(), strict=True):
            true, taken = classes[label], classes[p.index(max(p))]
            confusion[true, taken] += 1
            here.setdefault(true, []).append(true == taken)
            for other in classes:
                met[true, other] += 1
        for c, right in here.items():
            hits[c].append(right)
    assert found["confusion"] == confusion.tolist()
    assert found["met"] == met.tolist()
    assert confusion.sum() == 25 * (12 if config.episodes.protocol == "standard" else 1)
    for c, (entry, episodes) in enumerate(zip(found["per_class"], hits.values(), strict=True)):
        shares = [sum(right) / len(right) for right in episodes]
        assert (entry["class"], entry["group"]) == (f"val{c}", "")
        assert (entry["queries"], entry["episodes"]) == (met[c, c], len(shares))
        assert entry["accuracy"] == pytest.approx(statistics.mean(shares), rel=1e-12)
        assert entry["ci95"] == pytest.approx(1.96 * statistics.stdev(shares) / math.sqrt(len(shares)), rel=1e-12)


def test_accuracy_is_the_evaluations(run: Path, found: dict[str, Any]) -> None:
    model, config, bank = parts(run)
    score = evaluate(model, bank, config, "val", 25).score
    assert (found["accuracy"], found["ci95"]) == (score.accuracy, score.ci95)
    assert 0.3 < score.accuracy < 1, "something was learnt"


def test_a_class_by_hand(small: Config) -> None:
    """1 of 1, 0 of 3 and 2 of 4 right: 50 %, where 3 of 8 queries would be 37.5 %; the standard deviation is 0.5."""
    bank = replace(open_bank(small.data.name, "val"), groups=tuple("abcdef"))
    entry = analysis._class(bank, 2, np.array([1, 0, 3, 4]), np.array([1, 0, 0, 2]))
    assert entry == {
        "class": "val2",
        "group": "c",
        "accuracy": 0.5,
        "queries": 8,
        "episodes": 3,
        "ci95": pytest.approx(1.96 * 0.5 / math.sqrt(3), rel=1e-12),
    }
    one, none = (analysis._class(bank, 0, np.array([n, 0]), np.array([n, 0])) for n in (2, 0))
    assert (one["accuracy"], one["ci95"], one["episodes"]) == (1.0, None, 1)
    assert (none["accuracy"], none["ci95"], none["episodes"]) == (None, None, 0)


# Generated weights


@pytest.mark.parametrize(("ways", "shot", "supports"), [(3, 2, 11), (4, 1, 20), (2, 20, 1), (3, 7, 3)])
def test_tasks_are_different_sets_of_classes_and_supports_share_no_image(
    small: Config, ways: int, shot: int, supports: int
) -> None:
    """Of 24 images a class; `supports` by hand: (24 - 1) // shot, at most 20."""
    config, bank = small.replace(ways=ways, shot=shot), open_bank(small.data.name, "val")
    classes, rows = analysis._tasks(bank, config)
    assert classes.shape == (10, ways)
    assert rows.shape == (10, supports, ways * shot)
    assert len({frozenset(c) for c in classes.tolist()}) == 10
    assert classes[0].tolist() == draw_rows(bank, config, "val", 0, 1).classes[0].tolist()
    for chosen, of_task in zip(classes, rows, strict=True):
        assert len(set(of_task.ravel().tolist())) == of_task.size
        for support in of_task:
            assert (np.searchsorted(bank.offsets, support, side="right") - 1).tolist() == chosen.repeat(shot).tolist()


def test_weights_against_a_loop_over_support_sets(run: Path, found: dict[str, Any]) -> None:
    model, config, bank = parts(run)
    weights = found["weights"]
    classes, rows = analysis._tasks(bank, config)
    assert weights["tasks"] == [[f"val{c}" for c in chosen] for chosen in classes]
    assert (weights["supports"], len(weights["xy"])) == (20, 400)
    assert weights["task_of"] == [*itertools.chain(*([task] * 20 for task in range(10)))] * 2
    assert weights["noise"] == ["mean"] * 200 + ["drawn"] * 200
    noise = draw_noise(config, "val", 0, 200, 1)[0]
    kernels: dict[tuple[str, str], list[Any]] = {}
    flat = []
    for i, support in enumerate(rows.reshape(200, -1)):
        with torch.no_grad():
            codes = model.embed(load_images(bank, config, support))[1][None]  # (1, S, 2Z)
            draws = {"counts": None, "drawn": noise[i : i + 1]}
            made = {kind: model.generator.generate(codes, config.episodes.ways, draw) for kind, draw in draws.items()}
        for kind, layers in made.items():
            for layer, (kernel, _) in zip(("layer1", "layer2"), layers, strict=True):
                kernels.setdefault((layer, kind), []).append(kernel.numpy())
        flat.append(np.concatenate([part.numpy().ravel() for layer in made["counts"] for part in layer]))
    for (layer, kind), values in kernels.items():
        histogram = weights["histogram"][layer]
        expected = np.histogram(np.stack(values), histogram["edges"])[0]
        assert sum(histogram[kind]) == 200 * 9 * 8 * 8
        assert np.abs(expected - histogram[kind]).sum() < 100, "but for rounding at the edges of bins"
    centre = np.mean(flat, 0)
    spread = math.sqrt(np.mean([np.sum((w - centre) ** 2) for w in flat]))
    assert weights["variation"] == pytest.approx(spread / np.linalg.norm(centre), rel=1e-3)
    assert weights["variation"] > 0.01


def test_silhouette_by_hand() -> None:
    """On a line, tasks at 0, 1 and at 10, 11: (10.5 - 1) / 10.5 for the outer, (9.5 - 1) / 9.5 for the inner points."""
    line, task = np.array([[0.0], [1], [10], [11]], np.float32), np.array([0, 0, 1, 1])
    found = analysis._silhouettes(line, line[[0, 2, 1, 3]], task)
    assert found["silhouette"] == pytest.approx((9.5 / 10.5 + 8.5 / 9.5) / 2, rel=1e-6)
    # Drawn: tasks at 0, 10 and at 1, 11. Of the point 0: a = 10, b = 6, so -0.4; of 10: a = 10, b = 5, so -0.5; likewise 11, 1.
    assert found["silhouette_drawn"] == pytest.approx(-0.45, rel=1e-6)
    # Shuffled, the three ways to pair: the first two above, and 0, 11 with 1, 10: a = 11, b = 5.5, and a = 9, b = 5, so -0.472.
    assert found["shuffled_highest"] == found["silhouette"]
    assert found["shuffled_mean"] == pytest.approx((0.8998 - 0.45 - 0.4722) / 3, abs=0.15)


def test_clusters_stay_clusters_in_two_dimensions() -> None:
    random = np.random.default_rng(0)
    centres = 5 * random.standard_normal((4, 300)).astype(np.float32)
    weights = centres.repeat(20, 0) + random.standard_normal((80, 300)).astype(np.float32)
    xy = analysis._in_two_dimensions(weights)
    assert xy.shape == (80, 2)
    distances = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(80)
    assert (distances.argmin(1) // 20 == np.arange(80) // 20).all()


@pytest.mark.parametrize(("ways", "shot"), [(6, 1), (6, 20)])
def test_one_set_of_classes_has_no_silhouette(small: Config, tmp_path: Path, ways: int, shot: int) -> None:
    """All 6 classes in every episode; with 20 shots of 24 images there is but one support set, two points in all."""
    config = small.replace(eval_ways=ways, eval_shot=shot)
    weights = analyse(trained(config, tmp_path, 1), open_bank(config.data.name, "val"))["weights"]
    assert len(weights["tasks"]) == 1
    assert len(weights["xy"]) == 2 * weights["supports"] == 2 * (20 if shot == 1 else 1)
    assert [weights[key] for key in ("silhouette", "silhouette_drawn", "shuffled_mean", "shuffled_highest")] == [
        None
    ] * 4


def test_a_network_that_has_diverged_has_no_weights(small: Config, tmp_path: Path) -> None:
    run = trained(small, tmp_path, 1)
    model, config, state = checkpoint.load_model(checkpoint.best(run))
    model.generator.layers[1].w1.data[0, 0] = float("nan")
    checkpoint.save(run, state, model, make_optimizer(model, config), config)
    found = analyse(run, open_bank(config.data.name, "val"))
    assert found["weights"] is None
    assert sum(map(sum, found["confusion"])) == 6 * 9


# The file


def test_the_file_is_strict_json_and_the_same_whatever_the_global_generators_say(run: Path) -> None:
    before = (run / "analysis.json").read_bytes()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  the point: the analysis must not read it
    again = analyse(run, parts(run)[2])
    assert (run / "analysis.json").read_bytes() == before
    assert json.loads(before, parse_constant=pytest.fail) == again
    assert sorted(path.name for path in run.iterdir()) == ["analysis.json", "checkpoints"]


def test_a_failed_analysis_leaves_the_one_before_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "analysis.json").read_bytes()
    for part in ("_decisions", "_weights"):
        monkeypatch.setattr(analysis, part, lambda *_: {"accuracy": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        analyse(run, parts(run)[2])
    assert (run / "analysis.json").read_bytes() == before


def test_test_is_analysed_where_its_bank_is_given(small: Config, tmp_path: Path) -> None:
    found = analyse(trained(small, tmp_path, 1), open_bank(small.data.name, "test"))
    assert (found["split"], found["classes"][0]) == ("test", "test0")


def test_what_is_missing(small: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no analysis\.json; lgm-dist train writes it at the end of the run$"):
        read_analysis(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint"):
        analyse(tmp_path, open_bank(small.data.name, "val"))
