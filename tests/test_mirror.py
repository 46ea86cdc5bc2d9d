"""The mirror of a run on W&B, read back from W&B's own offline files: each row once, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.mirrored import (
    DRIVER,
    OFFLINE,
    ROOT,
    figures,
    isolate,
    run_of,
    steps,
    write,
    write_all,
)
from helpers.offline_runs import folders, history, inspect, merged, of_type
from helpers.waiting import wait_for

from lgm_dist.runs.metrics import MetricsLog, read_metrics
from lgm_dist.tracking import mirror as mirror_module
from lgm_dist.tracking.mirror import Mirror


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    isolate(monkeypatch, tmp_path_factory)
    monkeypatch.setattr(mirror_module, "POLL_SECONDS", 0.02)


def test_rows_come_as_they_are_written_and_a_later_start_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    with Mirror(tmp_path, OFFLINE, "a-sweep", "trial") as mirror:
        write(log, 1, 3)
        wait_for(lambda: mirror.logged == 3, "the mirror follows")
        (tmp_path / "facts.json").write_text(json.dumps({"world_size": 2}))
        wait_for(lambda: mirror._facts == {"world_size": 2}, "the mirror follows")
    (tmp_path / "facts.json").write_text(json.dumps({"world_size": 1}))
    with Mirror(tmp_path, OFFLINE, "a-sweep", "trial") as later:
        write(log, 4, 5)
    assert later.logged == 2
    assert mirror.failure == later.failure == ""

    first, second = (inspect(folder) for folder in folders(tmp_path))
    assert history(first) + history(second) == read_metrics(tmp_path), "all keys as they are, seconds too"
    assert [row["step"]["num"] for row in of_type(first + second, "history")] == [1, 2, 3, 4, 5]
    assert of_type(first, "exit")[0]["exit_code"] == of_type(second, "exit")[0]["exit_code"] == 0
    assert run_of(first)["run_id"] == run_of(second)["run_id"] == (tmp_path / "wandb-id").read_text().strip()
    run = run_of(first)
    named = ("display_name", "project", "run_group", "job_type")
    assert [run[key] for key in named] == ["a-run", "lgm_dist", "a-sweep", "trial"]
    config = run["config"]["update"]
    flat = {key: list(v) if isinstance(v, tuple) else v for key, v in OFFLINE.flat().items() if "." not in key}
    assert {key: config[key] for key in flat} == flat
    assert merged(first, "config")["world_size"] == 2
    assert run_of(second)["config"]["update"]["world_size"] == 1
    metrics = {m.get("name", m.get("glob_name")): m for m in of_type(first, "metric")}
    for name in ("train/*", "val/*", "optim/*", "speed/*", "memory/*", "seconds", "val/accuracy"):
        assert metrics[name]["step_metric"] == "step", name
    assert "step_metric" not in metrics["step"]
    assert metrics["val/accuracy"]["summary"] == {"max": True}
    assert merged(first, "summary")["val/accuracy"] == {"max": 0.4}


def test_a_line_is_sent_when_it_is_whole(tmp_path: Path) -> None:
    write_all(tmp_path, 2)
    with Mirror(tmp_path, OFFLINE) as mirror:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "train/lo')
            file.flush()
            wait_for(lambda: mirror.logged == 2, "the mirror follows")
            time.sleep(0.2)
            assert mirror.logged == 2
            file.write('ss": 0.5}\n{"step": 4')
        wait_for(lambda: mirror.logged == 3, "the mirror follows")
    assert mirror.failure == ""
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_come_again_are_not_sent_again(tmp_path: Path, in_place: bool) -> None:
    """Workers that went back to the checkpoint of step 3 put another file in its place, perhaps with the same inode."""
    log = MetricsLog(tmp_path, 0)
    write(log, 1, 6)
    with Mirror(tmp_path, OFFLINE) as mirror:
        wait_for(lambda: mirror.logged == 6, "the mirror follows")
        if in_place:  # the mirror finds itself in the middle of a line
            longer = [{"step": s, "more": "x" * s, **figures(s)} for s in range(1, 9)]
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
        else:
            log = MetricsLog(tmp_path, 3)
            write(log, 4, 5)
            time.sleep(0.1)
            write(log, 6, 8)
        wait_for(lambda: mirror.logged == 8, "the mirror follows")
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_killed_driver_loses_no_row(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import wandb

    wandb.teardown()  # a service of earlier tests, whose environment they have taken back
    write_all(other := tmp_path_factory.mktemp("other"), 1)
    with Mirror(other, OFFLINE):
        pass
    assert "WANDB_SERVICE" in os.environ, "this process's service, which the driver would share"
    command = [sys.executable, "-c", DRIVER, str(tmp_path), "300", "0.001", "offline"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert driver.stdout
    assert driver.stdout.readline() == "300 rows logged\n"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    held = steps(tmp_path)
    assert held == list(range(1, len(held) + 1))
    assert 0 < len(held) < 300, "W&B has lost what it had in memory, else this test shows nothing"

    log = MetricsLog(tmp_path, 290)  # as rank 0 does: ten rows will come again
    with Mirror(tmp_path, OFFLINE) as mirror:
        write(log, 291, 320)
    assert mirror.logged == 320 - len(held)
    assert steps(tmp_path) == list(range(1, 321))
    assert len(folders(tmp_path)) == 2


def test_a_start_that_was_killed_before_its_file_was_made(tmp_path: Path) -> None:
    with Mirror(tmp_path, OFFLINE) as mirror:
        write_all(tmp_path, 2)
    wandb_id = (tmp_path / "wandb-id").read_text().strip()
    (tmp_path / f"wandb/offline-run-29990101_000000-{wandb_id}").mkdir()
    write_all(tmp_path, 3)
    with Mirror(tmp_path, OFFLINE) as mirror:
        pass
    assert (mirror.logged, mirror.failure) == (1, "")
    assert steps(tmp_path) == [1, 2, 3]


def test_two_at_once(tmp_path: Path) -> None:
    runs = [tmp_path / "trial-000", tmp_path / "trial-001"]
    for run in runs:
        run.mkdir()
    one, two = (Mirror(run, OFFLINE.replace(name=run.name), "a-sweep", "trial") for run in runs)
    with one, two:
        logs = [MetricsLog(run, 0) for run in runs]
        write(logs[0], 1, 3)
        write(logs[1], 1, 2)
        wait_for(lambda: (one.logged, two.logged) == (3, 2), "the mirror follows")
        write(logs[1], 3, 4)
    for run, last in zip(runs, (3, 4), strict=True):
        (folder,) = folders(run)
        records = inspect(folder)
        assert history(records) == read_metrics(run)
        assert len(history(records)) == last
        assert [run_of(records)[key] for key in ("display_name", "run_group")] == [run.name, "a-sweep"]
        assert run_of(records)["run_id"] == (run / "wandb-id").read_text().strip()


def test_a_run_is_sent_by_one_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path, 3)
    with Mirror(tmp_path, OFFLINE) as mirror:
        wait_for(lambda: mirror.logged == 3, "the mirror follows")
        with Mirror(tmp_path, OFFLINE) as other:
            pass
    assert (mirror.failure, other.failure) == ("", "RuntimeError: another process is sending it")
    assert "another process is sending it" in capfd.readouterr().err
    assert steps(tmp_path) == [1, 2, 3]
