"""results.csv of fabricated sweeps, whose numbers are worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from helpers.swept import BASE, add, begin, same, winner_and_second

from lgm_dist.config import Config
from lgm_dist.runs.sweep_folder import read_sweep
from lgm_dist.sweeps.ranking import levels
from lgm_dist.sweeps.results import write_csv


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folder of the sweep `swept`, still without trials."""
    return begin(tmp_path / "swept")


def cells(sweep: Path) -> list[dict[str, str]]:
    """The rows of results.csv."""
    assert write_csv(read_sweep(sweep)) == sweep / "results.csv"
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv(sweep: Path) -> None:
    """Differences -.25, 0, -.25, -.25: mean -.1875, s = .125, 1.96 * .125 / sqrt(4) = .1225. 4 * 5 * (1 + 1) images a step."""
    winner_and_second(sweep)
    first, second = cells(sweep)
    assert first == {
        "trial": "0",
        "status": "finished",
        "protocol": "standard",
        "lr": "0.001",
        "model.norm": "batch",
        "model.norm_scope": "global",
        "val_accuracy": "50.0",
        "val_ci95": "1.0",
        "best_step": "20",
        "best_images": "800",
        "last_step": "20",
        "last_images": "800",
        "seconds": "60.0",
        "difference": "0.0",
        "difference_ci95": "0.0",
        "exploits": "",
        "error": "",
    }
    assert second == first | {
        "trial": "1",
        "status": "stopped",
        "lr": "0.01",
        "model.norm": "group",
        "model.norm_scope": "",
        "val_accuracy": "31.25",
        "best_step": "10",
        "best_images": "400",
        "difference": "-18.75",
        "difference_ci95": "12.25",
    }


@pytest.mark.parametrize(
    ("base", "own", "images"),
    [
        (BASE, {"ways": 10, "shot": 2, "meta_batch": 2}, 10 * 2 * 10 * (2 + 1)),
        (BASE, {"query": 4}, 10 * 4 * 5 * (1 + 4)),
        (Config.of(protocol="paper", query=4), {"meta_batch": 4}, 10 * 4 * (5 * 1 + 1)),
    ],
)
def test_images_are_those_of_the_trials_own_configuration(
    sweep: Path, base: Config, own: dict[str, Any], images: int
) -> None:
    begin(sweep, base)
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.5), config=own)
    assert cells(sweep)[0]["best_images"] == str(images)


def test_a_trial_without_an_evaluation(sweep: Path) -> None:
    winner_and_second(sweep)
    add(sweep, {"lr": 1e-4, "model.norm": "group"}, status="failed", error="OutOfMemoryError: no room")
    failed = cells(sweep)[2]
    assert (failed["trial"], failed["status"], failed["error"]) == ("2", "failed", "OutOfMemoryError: no room")
    assert failed["lr"] == "0.0001"
    names = (
        "val_accuracy",
        "val_ci95",
        "best_step",
        "best_images",
        "last_step",
        "last_images",
        "seconds",
        "difference",
    )
    assert {failed[name] for name in names} == {""}


def test_the_best_evaluation_is_that_of_the_best_checkpoint_left(sweep: Path) -> None:
    """The evaluation at step 10 was better; at step 20 -.25, 0, -.5, -.25 to the winner: s = .20412, / 2 * 1.96 = .20004."""
    winner_and_second(sweep)
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.375), same(0.25), kept=1)
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.375), kept=0, status="stopped")
    *_, third, fourth = cells(sweep)
    names = ("val_accuracy", "best_step", "best_images", "difference", "difference_ci95")
    assert [third[name] for name in names] == ["25.0", "20", "800", "-25.0", "20.004166"]
    assert [fourth[name] for name in names] == [""] * 5
    assert [trial.number for trial in read_sweep(sweep).ranked] == [0, 1, 2]


def test_no_difference_without_the_accuracies_of_the_episodes(sweep: Path) -> None:
    winner_and_second(sweep)
    (sweep / "trials/trial-001/checkpoints/step-00000010/val.npy").unlink()
    second = cells(sweep)[1]
    assert (second["val_accuracy"], second["difference"], second["difference_ci95"]) == ("31.25", "", "")


@pytest.mark.parametrize(("accuracies", "lr"), [((0.3, 0.4), "0.02"), ((0.4, 0.3), "0.001")])
def test_exploits(sweep: Path, accuracies: tuple[float, float], lr: str) -> None:
    """The sample is the one in force at the best evaluation; perturbed values may lie outside the space."""
    exploits = [{"step": 10, "from": 0, "sample": {"lr": 0.02, "model.norm": "group"}}]
    add(sweep, {"lr": 1e-4, "model.norm": "group"}, same(0.5))
    sample = {"lr": 1e-3, "model.norm": "group"}
    add(sweep, sample, *(same(a) for a in accuracies), exploits=exploits)
    row = cells(sweep)[1]
    assert (row["lr"], row["exploits"]) == (lr, "step 10 from trial 0")
    assert sum(len(level.accuracies) for level in levels(read_sweep(sweep))["lr"]) == 2


def test_protocol_paper_says_that_it_leaks(sweep: Path) -> None:
    begin(sweep, Config.of(protocol="paper"))
    winner_and_second(sweep)
    assert cells(sweep)[0]["protocol"] == "paper (LEAKS the label)"
