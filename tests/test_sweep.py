"""Sweeps end to end, with real processes: stopped, exploited, killed and resumed; and what is refused before Ray starts."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.offline_runs import folders, history, inspect, of_type
from helpers.waiting import LIMIT, wait_for

from lgm_dist.cli.sweep import main
from lgm_dist.config import SPLITS, Config
from lgm_dist.console import run_command
from lgm_dist.data import open_bank
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.sweep_folder import Sweep, read_sweep

ROOT = Path(__file__).parents[1]
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


def words_of(place: Path, **flags: Any) -> list[str]:
    """Flags as words; the storage is `place`."""
    words = [f"--{name}={value}" for name, value in ({"storage": place} | flags).items() if value is not True]
    return words + [f"--{name}" for name, value in flags.items() if value is True]


def command(place: Path, **flags: Any) -> list[str]:
    return [sys.executable, str(ROOT / "tune/sweep.py"), *words_of(place, **flags)]


def sweep(place: Path, data: Path, environment: dict[str, str] | None = None, **flags: Any) -> Any:
    """Runs a small sweep to its end in a process of its own; returns the finished process."""
    return subprocess.run(
        command(place, **(SMALL | {"data": data} | flags)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=place,
        env=os.environ | (environment or {}),
    )


@pytest.fixture(autouse=True, scope="module")
def _decoded(tiny: Path) -> None:
    """The images are decoded, so that a command does not say that it decodes them."""
    for split in SPLITS:
        open_bank(str(tiny), split)


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """Four combinations."""
    path = tmp_path / "four.py"
    path.write_text(
        "from lgm_dist.sweeps.spaces import Choice\n"
        "SPACE = {'model.weight_norm': Choice((True, False)), 'noise': Choice(('sample', 'mean'))}\n"
    )
    return path


def on_wandb(run: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The steps of all rows in W&B's offline files of a run, and the run record of each start.

    The file of a start that was killed within its first 32 KiB has no record.
    """
    records = [inspect(folder) for folder in folders(run)]
    steps = [row["step"] for part in records for row in history(part)]
    return steps, [runs[0] for part in records if (runs := of_type(part, "run"))]


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run)]


# Refused before Ray starts


@pytest.fixture
def refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process, with a cluster that does not exist; returns the one sentence of its error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")

    def run(**flags: Any) -> str:
        words = words_of(tmp_path, **(SMALL | {"data": tiny} | flags))
        monkeypatch.setattr(sys, "argv", ["tune/sweep.py", *words])
        assert run_command(main) == 1
        out, error = capsys.readouterr()
        assert error.startswith("sweep.py: ")
        assert (out, error.count("\n")) == ("", 1), error
        return error.removeprefix("sweep.py: ").removesuffix("\n")

    return run


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"space": "norms"},
            "space ('norms') must be one of ways_shots, optim, normalization, full, generator, or a Python file",
        ),
        ({"target-ways": 20}, "20 ways need 20 classes, split val of 'tiny' has 6; set ways to 6 or less"),
        ({"target-shot": 22}, "shot (22) + eval_query (3) = 25 images a class, but class 'val0' of split val"),
        ({"space": "ways_shots"}, "10 ways need 10 classes, split train of 'tiny' has 6"),
        ({"scheduler": "pbt", "search": "tpe"}, "search (tpe) cannot be used with pbt"),
        ({"scheduler": "pbt", "space": "optim"}, "space key 'meta_batch' changes the work of a step, but pbt compares"),
        ({"search": "grid", "space": "optim"}, "space key 'lr' has infinitely many values"),
        ({"stages": "pretraining"}, "stages (pretraining): a sweep does not train stage pretraining; train it once"),
        ({"space": "generator"}, "space key 'classes' needs stage generator; give --stages generator --start RUN"),
        ({"samples": 0}, "samples (0) must be at least 1"),
        ({"max-concurrent": -1}, "max_concurrent (-1) must be at least 0"),
        ({"workers": "1:2"}, "workers (1:2) must be one number; trials are not elastic"),
        ({"lr": 0}, "lr (0.0) must be positive"),
        ({"resume": True}, "is not a sweep (sweep.json is missing)"),
        (
            {"storage": "/proc/nowhere"},
            "storage (/proc/nowhere) cannot be written (No such file or directory); name another",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    flags: dict[str, Any], sentence: str, refused: Any, tmp_path: Path
) -> None:
    assert sentence in refused(**flags)
    assert not list(tmp_path.iterdir())


def test_wrong_keys_of_a_users_space_are_named(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from lgm_dist.sweeps.spaces import Choice\nSPACE = {'model.nrom': Choice(('batch',))}\n")
    assert refused(space=path) == "space key 'model.nrom' is not a setting; did you mean model.norm?"


def test_a_cluster_that_is_not_there_is_one_sentence_and_the_sweep_can_be_resumed(tiny: Path, tmp_path: Path) -> None:
    """tune/sweep.py as a user runs it, with a space of tune/spaces.py."""
    done = sweep(tmp_path, tiny, {"RAY_ADDRESS": "127.0.0.1:1"}, space="normalization")
    assert done.returncode == 1
    assert "RAY_ADDRESS (127.0.0.1:1): no Ray cluster answers there" in done.stderr
    assert done.stderr.count("\n") == 1
    spec = read_sweep(tmp_path / "sweep").spec
    assert (spec["samples"], len(spec["drawn"])) == (8, 8)
    assert spec["command"].startswith("lgm-dist sweep --storage=")
    again = sweep(tmp_path, tiny, {"RAY_ADDRESS": "127.0.0.1:1"}, space="normalization")
    assert "sweep 'sweep' exists" in again.stderr


# Real sweeps


@pytest.mark.ray
class TestRealSweeps:
    @pytest.mark.slow
    def test_trials_of_two_workers_take_turns_and_one_that_is_stopped_frees_its_cores(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        """Otherwise two trials wait for each other's cores, or the third for those of the second: LIMIT.

        The second trial hardly learns. At its first evaluation it is worse than the first trial and is stopped, with 768 of its
        1,024 small steps to do: as many images as in the 32 steps of the first trial.
        """
        path = tmp_path / "sizes.py"
        path.write_text(
            "from lgm_dist.sweeps.spaces import Choice\n"
            "small = Choice((1e-6,), when={'meta_batch': (2,)})\n"
            "SPACE = {'meta_batch': Choice((64, 2, 32)), 'lr': small}\n"
        )
        flags = {
            "meta-batch": 64,
            "steps-per-epoch": 32,
            "eval-every": 8,
            "lr": 0.01,
            "model.norm-decay": 0.5,
            "workers": 2,
        }
        done = sweep(tmp_path, tiny, space=path, search="grid", scheduler="asha", **flags)
        assert done.returncode == 0, done.stderr
        first, second, third = read_sweep(tmp_path / "sweep").trials
        assert (first.status, second.status) == ("finished", "stopped")
        assert third.status in ("finished", "stopped")
        for trial, whole in ((first, 32), (second, 1024), (third, 64)):
            steps = steps_of(trial.run)
            assert steps == list(range(1, len(steps) + 1))
            assert (steps[-1] == whole) == (trial.status == "finished")
            assert json.loads((trial.run / "facts.json").read_text())["world_size"] == 2

    @pytest.mark.slow
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
            sample = trial.sample_at()
            config = Config.from_dict(json.loads((trial.run / "config.json").read_text()))
            assert (config.optim.lr, config.optim.weight_decay) == (sample["lr"], sample["weight_decay"])
            rates = {row["step"]: row["optim/lr"] for row in trial.rows}
            assert rates[40] == pytest.approx(sample["lr"]), "training went on with it"
        assert not list(tmp_path.glob("sweep/trials/*/exploitable"))

    def test_a_killed_trial_is_retried_and_a_stopped_or_killed_driver_resumed_to_the_same_end(
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
        wait_for(lambda: len(read_metrics(first)) > 60, "the first trial trains", driver)
        os.killpg(driver.pid, signal.SIGTERM)
        assert driver.wait(LIMIT) == 1
        again = re.escape(f"`lgm-dist sweep --storage {tmp_path} --name sweep --resume`")
        last = (tmp_path / "log").read_text().splitlines()[-1]
        assert re.fullmatch(rf"sweep\.py: stopped with [0-3] of 4 trials ended; resume with {again}", last), last
        assert not (folder / "winner.json").exists(), "test is for the winner of all trials"

        driver = subprocess.Popen(command(tmp_path, name="sweep", resume=True), **outputs)
        wait_for(lambda: _kill_a_trial(folder), "a trial is killed", driver)
        wait_for(lambda: len(steps_of(first)) == 240, "the first trial is at its end", driver)
        assert steps_of(first) == list(range(1, 241))
        wait_for(lambda: len(read_metrics(folder / "trials/trial-002")) > 60, "the third trial trains", driver)
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
        assert (first / "metrics.jsonl").read_bytes() == before, "what was finished is not touched"
        found = read_sweep(folder)
        _check_trials(found, 240)
        _check_wandb(found, 240)
        _check_results(found, done.stdout)
        _check_best(tmp_path, found)


def _check_trials(found: Sweep, steps: int) -> None:
    """Every trial has its own settings and one whole history, and was compared on the target, never on test."""
    assert [trial.status for trial in found.trials] == ["finished"] * 4
    assert [trial.sample for trial in found.trials] == found.spec["drawn"]
    for trial in found.trials:
        config = Config.from_dict(json.loads((trial.run / "config.json").read_text()))
        e = config.episodes
        assert (e.ways, e.shot, e.eval_ways, e.eval_shot) == (3, 1, 4, 2)
        assert config.model.weight_norm == trial.sample["model.weight_norm"]
        assert config.episodes.noise == trial.sample["noise"]
        assert steps_of(trial.run) == list(range(1, steps + 1))
        accuracies = trial.accuracies()
        assert accuracies is not None
        assert len(accuracies) == 20
        assert trial.best is not None
        assert accuracies.mean() == pytest.approx(trial.best.val_accuracy)
        hits = accuracies * 4 * 3
        assert hits == pytest.approx(hits.round()), "a 4-way episode has 12 queries"
        assert "test/accuracy" not in json.loads((trial.run / "result.json").read_text())


def _check_wandb(found: Sweep, steps: int) -> None:
    """W&B has a run for each trial, with every row once."""
    ids = set()
    for trial in found.trials:
        logged, starts = on_wandb(trial.run)
        assert logged == list(range(1, steps + 1)), "none missing, none twice"
        assert len({start["run_id"] for start in starts}) == 1
        for run in starts:
            assert (run["run_group"], run["job_type"], run["display_name"]) == ("sweep", "trial", trial.run.name)
        ids.add(starts[0]["run_id"])
    assert len(ids) == 4


def _check_results(found: Sweep, printed: str) -> None:
    """The winner alone was evaluated on test, and the leaderboard and the table have every trial."""
    best = max(found.trials, key=lambda trial: trial.best.val_accuracy if trial.best else -1)
    assert (found.winner["trial"], found.winner["sample"]) == (best.number, best.sample)
    assert found.winner["test/episodes"] == 30
    assert f"winner: trial {best.number}, test accuracy" in printed
    rows = [line for line in printed.splitlines() if re.match(r"\| trial-\d", line)]
    assert len(rows) == 4
    assert rows[0].startswith(f"| trial-{best.number:03d} | finished |")
    with (found.folder / "results.csv").open() as file:
        assert {int(row["trial"]) for row in csv.DictReader(file)} == {0, 1, 2, 3}
    written = [Path(line.strip()) for line in printed.splitlines() if line.startswith("  /")]
    names = ["best.json", "winner.json", "results.csv", "parallel.png", "importance.png", "time.png", "report.html"]
    assert [path.name for path in written] == names
    assert all(path.exists() for path in written)


def _check_best(storage: Path, found: Sweep) -> None:
    """best.json trains the winner's settings as an ordinary run."""
    script = [sys.executable, str(ROOT / "scripts/train.py"), f"--config={storage / 'sweep/best.json'}"]
    done = subprocess.run(
        [*script, "--workers=0", "--steps-per-epoch=4"], capture_output=True, text=True, timeout=LIMIT, cwd=storage
    )
    assert done.returncode == 0, done.stderr
    config = Config.from_dict(json.loads((storage / "sweep-best/config.json").read_text()))
    sample = found.ranked[0].sample
    assert config.episodes.noise == sample["noise"]
    assert config.model.weight_norm == sample["model.weight_norm"]


def _kill_a_trial(folder: Path) -> bool:
    """Kill the process of a trial that trains, if there is one now."""
    for links in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # processes come and go
            held = {Path(os.readlink(link)) for link in links.iterdir()}
            if any(path.match(f"{folder}/trials/*/.lock") and len(read_metrics(path.parent)) > 100 for path in held):
                os.kill(int(links.parent.name), signal.SIGKILL)
                return True
    return False


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
