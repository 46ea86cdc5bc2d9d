"""What a sweep tells about its parameters, from fabricated sweeps whose numbers are worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.swept import LR, NOISE, NORM, SCOPE, WEIGHT_DECAY, add, begin, same, winner_and_second

from lgm_dist.runs.sweep_folder import read_sweep
from lgm_dist.sweeps.ranking import Importance, importances, levels, sample_of
from lgm_dist.training.evaluation import Score


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folder of the sweep `swept`, still without trials."""
    return begin(tmp_path / "swept")


def test_difference_is_paired(sweep: Path) -> None:
    """.25 .25 .5 .25 less .5 .25 .75 .5: mean -.1875, s = .125, 1.96 * .125 / sqrt(4) = .1225."""
    winner_and_second(sweep)
    winner, second = read_sweep(sweep).trials
    assert second.difference(winner) == Score(pytest.approx(-0.1875), pytest.approx(0.1225))
    assert winner.checkpoint
    (winner.checkpoint / "val.npy").unlink()
    assert read_sweep(sweep).trials[1].difference(winner) is None


@pytest.mark.parametrize(("best", "lr"), [(10, 1e-3), (20, 0.02), (30, 0.02), (40, 5e-5)])
def test_sample_and_levels_after_exploits(sweep: Path, best: int, lr: float) -> None:
    """The sample is the one in force at the best evaluation; perturbed values beyond the space widen it."""
    taken = [
        {"step": step, "from": 0, "sample": {"lr": lr, "model.norm": "group"}} for step, lr in ((10, 0.02), (30, 5e-5))
    ]
    evaluations = [same(0.4 if step == best else 0.3) for step in (10, 20, 30, 40)]
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, *evaluations, exploits=taken)
    found = read_sweep(sweep)
    assert sample_of(found.trials[0]) == {"lr": lr, "model.norm": "group"}
    by_third = levels(found)["lr"]
    assert [len(level.accuracies) for level in by_third].index(1) == {5e-5: 0, 1e-3: 1, 0.02: 2}[lr]
    assert (by_third[0].name.split()[0], by_third[2].name.split()[2]) == {
        5e-5: ("5e-05", "0.01"),
        1e-3: ("0.0001", "0.01"),
        0.02: ("0.0001", "0.02"),
    }[lr]


def test_thirds_of_a_uniform_range(tmp_path: Path) -> None:
    begin(tmp_path, weight_decay=WEIGHT_DECAY)
    for value in (0.0, 0.09, 0.15, 0.3):
        add(tmp_path, {"weight_decay": value}, same(0.5))
    found = [(level.name, len(level.accuracies)) for level in levels(read_sweep(tmp_path))["weight_decay"]]
    assert found == [("0 to 0.1", 2), ("0.1 to 0.2", 1), ("0.2 to 0.3", 1)]


def test_mean_and_interval_of_each_value(sweep: Path) -> None:
    """50 % and 30 %: mean 40 %, s = 14.142, 1.96 * 14.142 / sqrt(2) = 19.6. A third of the range of lr is 2/3 of a decade."""
    add(sweep, {"lr": 3e-4, "model.norm": "batch", "model.norm_scope": "global"}, same(0.5))
    add(sweep, {"lr": 5e-3, "model.norm": "batch", "model.norm_scope": "global"}, same(0.3))
    add(sweep, {"lr": 1e-4, "model.norm": "group"}, same(0.25))
    by_setting = levels(read_sweep(sweep))
    batch, group = by_setting["model.norm"]
    assert (batch.name, group.name) == ("batch", "group")
    assert batch.score == Score(pytest.approx(40), pytest.approx(19.6))
    assert (group.score, list(group.accuracies)) == (None, [25])
    used, unused = by_setting["model.norm_scope"]
    assert (used.name, used.score, unused.name, len(unused.accuracies)) == ("global", batch.score, "episode", 0)
    low, middle, high = by_setting["lr"]
    assert [low.name, middle.name, high.name] == ["0.0001 to 0.000464", "0.000464 to 0.00215", "0.00215 to 0.01"]
    assert low.score == Score(pytest.approx(37.5), pytest.approx(24.5))
    assert ([*middle.accuracies], [*high.accuracies]) == ([], pytest.approx([30]))


# Importance


def factorial(sweep: Path, accuracy: Callable[[float, str], float], repeats: int = 8) -> dict[str, Importance]:
    """Importances over all combinations of 8 learning rates, equally far apart in logarithm, and two noises."""
    begin(sweep, lr=LR, noise=NOISE)
    places = [10 ** (-4 + 2 * (i + 0.5) / repeats) for i in range(repeats)]
    for lr, noise in itertools.product(places, ("sample", "mean")):
        add(sweep, {"lr": lr, "noise": noise}, same(accuracy(lr, noise)))
    return {found.path: found for found in importances(read_sweep(sweep))}


def test_a_setting_that_decides_everything_comes_before_one_that_does_nothing(tmp_path: Path) -> None:
    found = factorial(tmp_path, lambda _, noise: 0.5 if noise == "mean" else 0.3)
    assert list(found) == ["noise", "lr"]
    assert found["noise"].share > 0.98
    assert found["lr"].share < 0.02
    assert found["noise"].trials == found["lr"].trials == 16


def test_shares_are_those_of_the_analysis_of_variance(tmp_path: Path) -> None:
    """Two halves of the range, 6 points apart, and two noises, 8 apart: shares 36 / 100 and 64 / 100.

    On the linear scale of lr the lower half of its logarithmic range would be 9 % of it, and its share below 20 %.
    """
    found = factorial(tmp_path, lambda lr, noise: 0.3 + 0.06 * (lr < 1e-3) + 0.08 * (noise == "mean"))
    assert found["lr"].share == pytest.approx(0.36, abs=0.06)
    assert found["noise"].share == pytest.approx(0.64, abs=0.06)
    assert 0 < found["lr"].spread < 0.1


def test_conditional_settings_are_judged_by_the_trials_that_have_them(sweep: Path) -> None:
    """norm_scope decides among the trials of batch, whose mean is that of the trials of group."""
    begin(sweep, model__norm=NORM, model__norm_scope=SCOPE, noise=NOISE)
    for noise, scope in itertools.product(("sample", "mean"), ("global", "episode") * 3):
        sample = {"model.norm": "batch", "model.norm_scope": scope, "noise": noise}
        add(sweep, sample, same(0.5 if scope == "global" else 0.3))
        add(sweep, {"model.norm": "group", "noise": noise}, same(0.4))
    found = {importance.path: importance for importance in importances(read_sweep(sweep))}
    assert {path: importance.trials for path, importance in found.items()} == {
        "model.norm": 24,
        "model.norm_scope": 12,
        "noise": 24,
    }
    assert next(iter(found)) == "model.norm_scope"
    assert found["model.norm_scope"].share > 0.98


def test_equal_trials_leave_nothing_to_explain(sweep: Path) -> None:
    for lr in (1e-3, 2e-3, 3e-3):
        add(sweep, {"lr": lr, "model.norm": "group"}, same(0.5))
    assert [found[1:] for found in importances(read_sweep(sweep))] == [(3, 0.0, 0.0)] * 2
