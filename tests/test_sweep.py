"""Sweeps end to end, with real processes: stopped, exploited, killed and resumed; and what is refused before Ray starts."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from offline_runs import folders, history, inspect, of_type

from lgm_dist.config import Config
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.sweep_folder import read_sweep

ROOT = Path(__file__).parents[1]
LIMIT = 240
"""Seconds after which a sweep counts as hung."""
SMALL = {
    "ways": 3,
    "query": 2,
    "epochs": 1,
    "steps-per-epoch": 12,
    "eval-every": 4,
    "meta-batch": 4,
    "eval-episodes": 20,
    "eval-query": 3,
    "test-episodes": 30,
    "target-ways": 4,
    "target-shot": 2,
    "model.filters": 8,
    "name": "sweep",
}


def command(place: Path, **flags: Any) -> list[str]:
    words = [f"--{name}={value}" for name, value in ({"storage": place} | flags).items() if value is not True]
    words += [f"--{name}" for name, value in flags.items() if value is True]
    return [sys.executable, str(ROOT / "tune/sweep.py"), *words]


def sweep(place: Path, data: Path, environment: dict[str, str] | None = None, **flags: Any) -> Any:
    """Runs a small sweep to its end; returns the finished process."""
    return subprocess.run(
        command(place, **(SMALL | {"data": data} | flags)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=place,
        env=os.environ | (environment or {}),
    )


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """Four combinations."""
    path = tmp_path / "four.py"
    path.write_text(
        "from spaces import Choice\n"
        "SPACE = {'model.weight_norm': Choice((True, False)), 'noise': Choice(('sample', 'mean'))}\n"
    )
    return path


def on_wandb(run: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The steps of all rows that W&B's offline files of a run hold, and what each start called itself.

    Of a start that was killed within its first 32 KiB the file holds nothing.
    """
    records = [inspect(folder) for folder in folders(run)]
    steps = [row["step"] for part in records for row in history(part)]
    return steps, [runs[0] for part in records if (runs := of_type(part, "run"))]


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run)]


# Refused before Ray starts


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"space": "norms"}, "space ('norms') must be one of ways_shots, optim, normalization, full, or a Python file"),
        ({"target-ways": 20}, "20 ways need 20 classes, split val of 'tiny' has 6; set ways to 6 or less"),
        ({"target-shot": 22}, "shot (22) + eval_query (3) = 25 images a class, but class 'val0' of split val"),
        ({"space": "ways_shots"}, "10 ways need 10 classes, split train of 'tiny' has 6"),
        ({"scheduler": "pbt", "search": "tpe"}, "search (tpe) cannot be used with pbt"),
        ({"scheduler": "pbt", "space": "optim"}, "space key 'meta_batch' makes steps unlike, but pbt compares trials"),
        ({"search": "grid", "space": "optim"}, "space key 'lr' has infinitely many values"),
        ({"samples": 0}, "samples (0) must be at least 1"),
        ({"workers": "1:2"}, "workers (1:2) of a trial must be one number"),
        ({"lr": 0}, "lr (0.0) must be positive"),
        ({"resume": True}, "holds no sweep (sweep.json is missing)"),
        (
            {"storage": "/proc/nowhere"},
            "storage (/proc/nowhere) cannot be written (No such file or directory); name another",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    flags: dict[str, Any], sentence: str, tiny: Path, tmp_path: Path
) -> None:
    done = sweep(tmp_path, tiny, {"RAY_ADDRESS": "127.0.0.1:1"}, **flags)
    assert done.returncode == 1
    assert done.stderr.startswith("sweep.py: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_keys_of_a_users_space_are_named(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from spaces import Choice\nSPACE = {'model.nrom': Choice(('batch',))}\n")
    done = sweep(tmp_path, tiny, space=path)
    assert done.returncode == 1
    assert done.stderr == "sweep.py: space key 'model.nrom' is no config path; did you mean model.norm?\n"


def test_a_cluster_that_is_not_there_is_one_sentence_and_the_sweep_can_be_resumed(tiny: Path, tmp_path: Path) -> None:
    done = sweep(tmp_path, tiny, {"RAY_ADDRESS": "127.0.0.1:1"}, space="normalization")
    assert done.returncode == 1
    assert "RAY_ADDRESS (127.0.0.1:1): no Ray cluster answers there" in done.stderr
    assert done.stderr.count("\n") == 1
    assert read_sweep(tmp_path / "sweep").spec["samples"] == 8
    again = sweep(tmp_path, tiny, {"RAY_ADDRESS": "127.0.0.1:1"}, space="normalization")
    assert "sweep 'sweep' exists" in again.stderr


# Real sweeps


@pytest.mark.ray
class TestRealSweeps:
    def test_random_search_compares_all_on_the_target_and_the_winner_alone_on_test(
        self, tiny: Path, space: Path, tmp_path: Path
    ) -> None:
        done = sweep(tmp_path, tiny, {"WANDB_MODE": "offline"}, space=space, samples=3)
        assert done.returncode == 0, done.stderr
        found = read_sweep(tmp_path / "sweep")
        assert [trial.status for trial in found.trials] == ["finished"] * 3
        assert [trial.sample for trial in found.trials] == found.spec["drawn"]
        for trial in found.trials:
            config = Config.from_dict(json.loads((trial.run / "config.json").read_text()))
            assert (
                config.episodes.ways,
                config.episodes.shot,
                config.episodes.eval_ways,
                config.episodes.eval_shot,
            ) == (3, 1, 4, 2)
            assert config.model.weight_norm == trial.sample["model.weight_norm"]
            assert config.episodes.noise == trial.sample["noise"]
            assert steps_of(trial.run) == list(range(1, 13))
            accuracies = trial.accuracies()
            assert accuracies is not None
            assert len(accuracies) == 20
            assert trial.best is not None
            assert accuracies.mean() == pytest.approx(trial.best["val/accuracy"])
            hits = accuracies * 4 * 3
            assert hits == pytest.approx(hits.round()), "a 4-way episode has 12 queries"
            assert not (trial.run / "result.json").exists() or "test/accuracy" not in json.loads(
                (trial.run / "result.json").read_text()
            )
        winner = json.loads((tmp_path / "sweep/winner.json").read_text())
        best = max(found.trials, key=lambda trial: (trial.best or {})["val/accuracy"])
        assert (winner["trial"], winner["sample"]) == (best.number, best.sample)
        assert winner["test/episodes"] == 30
        assert f"winner: trial {best.number}" in done.stdout
        with (tmp_path / "sweep/results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {int(row["trial"]) for row in rows} == {0, 1, 2}
        self._wandb_holds_every_row_once(tmp_path / "sweep")
        self._best_is_trained_by_the_train_script(tmp_path, best.sample)

    def _wandb_holds_every_row_once(self, folder: Path) -> None:
        ids = set()
        for trial in read_sweep(folder).trials:
            steps, (run,) = on_wandb(trial.run)
            assert steps == steps_of(trial.run)
            assert (run["run_group"], run["job_type"], run["display_name"]) == ("sweep", "trial", trial.run.name)
            ids.add(run["run_id"])
        assert len(ids) == 3

    def _best_is_trained_by_the_train_script(self, storage: Path, sample: dict[str, Any]) -> None:
        script = [sys.executable, str(ROOT / "scripts/train.py"), f"--config={storage / 'sweep/best.json'}"]
        done = subprocess.run(
            [*script, "--workers=0", "--steps-per-epoch=4"], capture_output=True, text=True, timeout=LIMIT, cwd=storage
        )
        assert done.returncode == 0, done.stderr
        config = json.loads((storage / "sweep-best/config.json").read_text())
        assert config["noise"] == sample["noise"]
        assert config["model"]["weight_norm"] == sample["model.weight_norm"]

    def test_trials_of_two_workers_take_turns_and_one_that_is_stopped_frees_its_cores(
        self, tiny: Path, space: Path, tmp_path: Path
    ) -> None:
        """Else two trials wait for each other's cores, or the next for a placement group that nobody frees: LIMIT."""
        flags = {"steps-per-epoch": 32, "eval-every": 8, "workers": 2}
        done = sweep(tmp_path, tiny, space=space, samples=3, scheduler="asha", **flags)
        assert done.returncode == 0, done.stderr
        trials = read_sweep(tmp_path / "sweep").trials
        assert len(trials) == 3
        assert all(trial.status in ("finished", "stopped") for trial in trials)
        for trial in trials:
            steps = steps_of(trial.run)
            assert steps == list(range(1, len(steps) + 1))
            assert (steps[-1] == 32) == (trial.status == "finished")
            assert json.loads((trial.run / "facts.json").read_text())["world_size"] == 2

    def test_a_population_takes_over_weights_and_settings(self, tiny: Path, space: Path, tmp_path: Path) -> None:
        flags = {"steps-per-epoch": 40, "eval-every": 8, "lr": 0.01}
        done = sweep(tmp_path, tiny, space=space, samples=4, scheduler="pbt", **flags)
        assert done.returncode == 0, done.stderr
        trials = {trial.number: trial for trial in read_sweep(tmp_path / "sweep").trials}
        assert len(trials) == 4
        exploits = [(trial, exploit) for trial in trials.values() for exploit in trial.exploits]
        assert exploits, "in five exchanges of four trials, the worst takes over from the best"
        for trial, exploit in exploits:
            donor = trials[exploit["from"]]
            at = {t.number: {row["step"]: row for row in t.evaluations}[exploit["step"]] for t in (trial, donor)}
            assert at[donor.number]["val/accuracy"] >= at[trial.number]["val/accuracy"]
            assert exploit["sample"].keys() == trial.sample.keys()
        for trial in trials.values():
            assert trial.status == "finished"
            assert steps_of(trial.run) == list(range(1, 41)), "one history, whatever was taken over"
            sample = (trial.exploits or [{"sample": trial.sample}])[-1]["sample"]
            config = Config.from_dict(json.loads((trial.run / "config.json").read_text()))
            assert (config.optim.lr, config.optim.weight_decay) == (sample["lr"], sample["weight_decay"])
            rates = {row["step"]: row["optim/lr"] for row in trial.rows}
            assert rates[40] == pytest.approx(sample["lr"]), "training went on with it"
        assert not list(tmp_path.glob("sweep/trials/*/exploitable"))

    def test_a_killed_trial_is_retried_and_a_stopped_or_killed_driver_resumed_with_every_history_whole(
        self, tiny: Path, space: Path, tmp_path: Path
    ) -> None:
        """SIGTERM goes to the whole process group, as `timeout`, systemd and Slurm send it."""
        folder = tmp_path / "sweep"
        flags = SMALL | {"data": tiny, "space": space, "samples": 4, "steps-per-epoch": 240, "eval-every": 40}
        environment = os.environ | {"WANDB_MODE": "offline"}
        log = (tmp_path / "log").open("w")
        outputs: dict[str, Any] = {"stderr": log, "stdout": log, "cwd": tmp_path, "env": environment}
        driver = subprocess.Popen(command(tmp_path, **flags), start_new_session=True, **outputs)
        first = folder / "trials/trial-000"
        _wait_for(lambda: len(read_metrics(first)) > 60, driver)
        os.killpg(driver.pid, signal.SIGTERM)
        assert driver.wait(LIMIT) == 1
        words = f"--storage {tmp_path} --name sweep --resume"
        sentence = f"sweep.py: stopped with 0 of 4 trials at their end; `tune/sweep.py {words}` goes on\n"
        assert (tmp_path / "log").read_text().endswith(sentence)
        assert not (folder / "winner.json").exists(), "test is for the winner of all trials"

        driver = subprocess.Popen(command(tmp_path, name="sweep", resume=True), **outputs)
        _wait_for(lambda: len(read_metrics(first)) > 100, driver)
        os.kill(_process_of(first), signal.SIGKILL)
        _wait_for(lambda: len(steps_of(first)) == 240, driver)
        assert steps_of(first) == list(range(1, 241)), "retried from its checkpoint"
        _wait_for(lambda: len(read_metrics(folder / "trials/trial-002")) > 60, driver)
        driver.kill()
        driver.wait()
        before = (first / "metrics.jsonl").read_bytes()
        done = subprocess.run(
            command(tmp_path, name="sweep", resume=True),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        found = read_sweep(folder)
        assert [trial.status for trial in found.trials] == ["finished"] * 4
        for trial in found.trials:
            assert steps_of(trial.run) == list(range(1, 241))
            steps, starts = on_wandb(trial.run)
            assert steps == list(range(1, 241)), "W&B too: none missing, none twice"
            assert len({start["run_id"] for start in starts}) == 1
        assert (first / "metrics.jsonl").read_bytes() == before, "what was finished is not touched"


def _wait_for(condition: Any, driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert driver.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < end, "the sweep hangs"
        time.sleep(0.05)


def _process_of(run: Path) -> int:
    """The process that holds a trial's lock."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(link) == str(run / ".lock") for link in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no process trains {run}")


# A full disk


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few kilobytes."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if not made or made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence(full_disk: Path, tiny: Path, tmp_path: Path) -> None:
    """In this process, without Ray: the checkpoint does not fit."""
    flags = {
        "ways": 3,
        "steps-per-epoch": 4,
        "epochs": 1,
        "eval-every": 2,
        "meta-batch": 4,
        "model.filters": 8,
        "name": "run",
    }
    flags |= {
        "eval-episodes": 5,
        "eval-query": 3,
        "workers": 0,
        "storage-seconds": 1,
        "data": tiny,
        "storage": full_disk,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    script = [sys.executable, str(ROOT / "scripts/train.py"), *words]
    done = subprocess.run(script, capture_output=True, text=True, timeout=LIMIT, cwd=tmp_path)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in read_metrics(full_disk / "run")] == [1, 2]
