"""The one reader of a sweep's folder: what it gives, and what it does with damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.swept import add, begin, same, winner_and_second

from lgm_dist.runs.sweep_folder import Trial, read_sweep, read_trial, run_of_trial, write_trial

GARBAGE = [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe\x00"]
WRONG = b'{"number": 1, "sample": {}, "status": "stopped", "error": "", "exploits": [{"step": "1"}]}'


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folder of a sweep with two trials."""
    folder = begin(tmp_path / "swept")
    winner_and_second(folder)
    return folder


def test_trials_come_in_the_order_of_their_numbers_and_ranked_by_accuracy(sweep: Path) -> None:
    """Trial 1000 comes after trial 999, although its folder is the first by name."""
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.75)).rename(run_of_trial(sweep, 1000))
    write_trial(Trial(1000, run_of_trial(sweep, 1000), {}, "finished", "", []))
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.25)).rename(run_of_trial(sweep, 999))
    write_trial(Trial(999, run_of_trial(sweep, 999), {}, "running", "", []))
    read = read_sweep(sweep)
    assert [trial.number for trial in read.trials] == [0, 1, 999, 1000]
    assert [trial.run.name for trial in read.trials] == ["trial-000", "trial-001", "trial-999", "trial-1000"]
    assert [trial.number for trial in read.ranked] == [1000, 0, 1, 999]
    assert (read.name, read.winner) == ("swept", {})


def test_the_best_evaluation_is_that_of_the_best_checkpoint(sweep: Path) -> None:
    first, second = read_sweep(sweep).trials
    assert first.best is not None
    assert first.checkpoint == sweep / "trials/trial-000/checkpoints/step-00000020"
    assert (first.best.step, first.best.val_accuracy, first.best.val_ci95) == (20, 0.5, 0.01)
    accuracies = second.accuracies()
    assert accuracies is not None
    assert accuracies.tolist() == [0.25, 0.25, 0.5, 0.25]
    fresh = Trial(2, sweep / "trials/trial-002", {}, "running", "", [])
    assert (fresh.checkpoint, fresh.best, fresh.accuracies(), fresh.rows) == (None, None, None, [])
    assert fresh.difference(first) is None


def test_a_trial_survives_its_file(tmp_path: Path) -> None:
    exploits = [{"step": 10, "from": 3, "sample": {"lr": 0.5}}]
    trial = Trial(7, tmp_path, {"lr": 0.1, "model.norm": "batch"}, "stopped", "", exploits)
    write_trial(trial)
    assert read_trial(tmp_path) == trial
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"]
    assert [trial.sample_at(step)["lr"] for step in (0, 10, 11)] == [0.1, 0.1, 0.5]
    assert trial.sample_at() == {"lr": 0.5}


def test_a_folder_that_is_not_a_sweep(tmp_path: Path) -> None:
    for damage in (None, []):
        with pytest.raises(ValueError, match=r"is not a sweep \(sweep.json is missing\); name the folder of a sweep$"):
            read_sweep(tmp_path, damage)


@pytest.mark.parametrize(
    ("name", "garbage"),
    [(name, garbage) for name in ("sweep.json", "winner.json") for garbage in GARBAGE]
    + [("trials/trial-001/trial.json", garbage) for garbage in (*GARBAGE, b'{"number": 1, "sample": []}', WRONG)],
)
def test_a_damaged_file_is_named_by_an_error_or_by_a_note(sweep: Path, name: str, garbage: bytes) -> None:
    (sweep / name).write_bytes(garbage)
    with pytest.raises(ValueError, match=f"{Path(name).name} is damaged") as error:
        read_sweep(sweep)
    assert "\n" not in str(error.value)
    damage: list[str] = []
    read = read_sweep(sweep, damage)
    assert len(damage) == 1
    assert Path(name).name in damage[0]
    statuses = {"trials/trial-001/trial.json": "unreadable"}
    assert [(trial.number, trial.status) for trial in read.trials] == [
        (0, "finished"),
        (1, statuses.get(name, "stopped")),
    ]
    assert (read.spec == {}) == (name == "sweep.json")
    assert read.winner == {}


def test_a_run_without_its_trial_file_is_not_left_out_silently(sweep: Path) -> None:
    (sweep / "trials/trial-001/trial.json").unlink()
    with pytest.raises(ValueError, match=r"trial\.json is damaged"):
        read_sweep(sweep)
    (sweep / "trials/trial-002").mkdir()  # of a trial that is about to start
    damage: list[str] = []
    assert [trial.status for trial in read_sweep(sweep, damage).trials] == ["finished", "unreadable"]
    assert len(damage) == 1


def test_the_winner_is_read(sweep: Path) -> None:
    (sweep / "winner.json").write_text(json.dumps({"trial": 0, "test/accuracy": 0.3}))
    assert read_sweep(sweep).winner == {"trial": 0, "test/accuracy": 0.3}
