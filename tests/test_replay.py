"""lgm-dist replay: what W&B lacks of runs and sweeps is sent, nothing twice; and the flag --wandb of lgm-dist evaluate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fabricated import row, write_run, write_sweep, write_trial
from helpers.mirrored import isolate
from helpers.offline_runs import folders, history, inspect, of_type
from helpers.waiting import LIMIT

from lgm_dist.config import Config
from lgm_dist.tracking.mirror import Mirror

ROOT = Path(__file__).parents[1]
CONFIG = Config.of(name="a-run")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No W&B variable of the caller's, no login, and W&B's caches elsewhere."""
    isolate(monkeypatch, tmp_path_factory)


def script(name: str, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / name, *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)


def steps(run: Path) -> list[list[int]]:
    """Of the rows that each of W&B's folders holds, oldest first."""
    return [[line["step"] for line in history(inspect(folder))] for folder in folders(run)]


def test_what_is_missing_is_sent_and_nothing_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CONFIG, [row(s) for s in range(1, 4)])
    with Mirror(run, CONFIG.replace(wandb="offline")):
        pass
    whole = [row(s) for s in range(1, 8)]
    write_run(tmp_path / "longer", CONFIG, whole)
    (tmp_path / "longer" / "metrics.jsonl").replace(run / "metrics.jsonl")
    assert steps(run) == [[1, 2, 3]]

    done = script("wandb_replay.py", run)
    assert (done.returncode, done.stdout) == (0, f"{run}: 4 rows sent, 3 already there\n"), done.stderr
    assert steps(run) == [[1, 2, 3], [4, 5, 6, 7]]
    assert [line for folder in folders(run) for line in history(inspect(folder))] == whole

    again = script("wandb_replay.py", "--wandb", "offline", run)
    assert (again.returncode, again.stdout) == (0, f"{run}: 0 rows sent, 7 already there\n")
    assert len(folders(run)) == 2, "and no empty one"


def test_a_sweep_stands_for_its_trials(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", {"name": "optim-1"})
    trials = [
        write_trial(sweep, number, CONFIG.replace(name=f"trial-{number}"), [row(s) for s in range(1, 3 + number)], {})
        for number in (0, 1)
    ]
    write_trial(sweep, 2, CONFIG, [], {}, status="failed")
    done = script("wandb_replay.py", sweep)
    lines = [f"{trials[0]}: 2 rows sent, 0 already there\n", f"{trials[1]}: 3 rows sent, 0 already there\n"]
    assert (done.returncode, done.stdout) == (0, "".join(lines)), done.stderr
    assert [steps(run) for run in trials] == [[[1, 2]], [[1, 2, 3]]]
    for number, run in enumerate(trials):
        (record,) = of_type(inspect(folders(run)[0]), "run")
        named = [record[key] for key in ("run_group", "job_type", "display_name")]
        assert named == ["optim-1", "trial", f"trial-{number}"]


def test_nothing_is_sent_where_one_folder_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CONFIG, [row(1)])
    (tmp_path / "empty").mkdir()
    done = script("wandb_replay.py", run, tmp_path / "empty")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"wandb_replay.py: {tmp_path / 'empty'} does not hold a run (")
    assert done.stderr.count("\n") == 1
    assert folders(run) == []


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CONFIG, [row(1), row(2)])
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    done = script("wandb_replay.py", run)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{run / 'metrics.jsonl'} is damaged at line 2" in done.stderr


def test_disabled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = script("wandb_replay.py", write_run(tmp_path / "run", CONFIG, [row(1)]))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "wandb_replay.py: WANDB_MODE (disabled) turns W&B off; give --wandb online or --wandb offline\n"
    )


def test_a_failure_is_said_and_ends_with_status_1(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, CONFIG, [row(1)]) for name in ("first", "second")]
    with Mirror(runs[0], CONFIG.replace(wandb="offline")):  # the first is being sent by this process
        done = script("wandb_replay.py", *runs)
    assert (done.returncode, done.stdout) == (1, f"{runs[1]}: 1 rows sent, 0 already there\n")
    assert done.stderr.splitlines()[-1] == (
        "wandb_replay.py: 1 of 2 runs are incomplete on W&B; the same command sends the rest"
    )
    assert f"W&B does not have all of {runs[0]} (RuntimeError: another process is sending it)" in done.stderr


def test_evaluate_is_a_run_of_its_own(tmp_path: Path, small: Config) -> None:
    from lgm_dist.runs import checkpoint
    from lgm_dist.training.loop import build_network
    from lgm_dist.training.schedule import make_optimizer
    from lgm_dist.training.worker import Worker

    config = small.replace(name="a-run", storage=str(tmp_path), wandb="disabled")
    model = build_network(config, Worker())
    state = checkpoint.TrainState(4, 0.5, 0.1)
    run = write_run(tmp_path / "a-run", config, [row(4)])
    folder = checkpoint.save(run, state, model, make_optimizer(model, config), config)

    argv = [run, "--split", "val", "--ways", "2", "3", "--shot", "1", "--episodes", "4"]
    assert script("evaluate.py", *argv).returncode == 0
    assert folders(run) == [], "disabled, as the run itself"
    done = script("evaluate.py", *argv, "--wandb", "offline")
    assert done.returncode == 0, done.stderr
    records = inspect(folders(run)[0])
    (record,) = of_type(records, "run")
    assert (record["job_type"], record["run_group"]) == ("evaluate", "a-run")
    (line,) = history(records)
    assert line["evaluation.nrows"] == 2
    used = of_type(records, "artifact")[-1]
    assert {Path(entry["local_path"]).parent for entry in used["manifest"]["contents"]} == {folder}
