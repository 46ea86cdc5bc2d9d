"""A run goes on if its local Ray loses a server or hangs, and ends with a checkpoint if all its processes get SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_processes import state
from test_train import config, digests, history

from lgm_dist.cluster import connection
from lgm_dist.cluster.connection import RayEnded, Watch
from lgm_dist.cluster.fit import fit
from lgm_dist.cluster.processes import descendants, open_pidfds
from lgm_dist.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def once(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    """Wait for so many rows."""
    while process.poll() is None and len(read_metrics(run)) < steps:
        time.sleep(0.01)


def server(process: subprocess.Popen[str], name: str) -> int:
    """The pid of a server of the process's Ray."""
    (pid,) = (pid for pid, command in descendants(process.pid).items() if f"/{name} " in command)
    return pid


@pytest.fixture
def raylet(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that a Watch takes for the only server of its Ray."""
    process = subprocess.Popen(["sleep", "1000"])
    (pidfd,) = open_pidfds([process.pid])
    monkeypatch.setattr(connection, "_servers", {"raylet": pidfd})
    yield process
    process.kill()
    process.wait()
    os.close(pidfd)


def test_a_server_that_has_ended_is_noticed(raylet: subprocess.Popen[bytes]) -> None:
    watch = Watch(time.monotonic, 0)
    watch()
    raylet.kill()
    raylet.wait()
    with pytest.raises(RayEnded, match=r"^Ray's raylet has ended$"):
        watch()


def watched(monkeypatch: pytest.MonkeyPatch, letters: str, seconds: float) -> int:
    """After how many of these letters, one a second, a Watch raises RayEnded; their number if it does not."""
    now = 0
    monkeypatch.setattr(connection.time, "monotonic", lambda: float(now))
    watch = Watch(lambda: letters[now], seconds)
    try:
        for now in range(1, len(letters)):  # noqa: B007
            watch()
    except RayEnded as error:
        return now if str(error) == f"nothing has happened for {seconds:g} s" else -1
    return len(letters)


@pytest.mark.usefixtures("raylet")
@pytest.mark.parametrize(
    ("letters", "seconds", "seen"),
    [
        ("abbbbbbbb", 3, 5),  # since the 1st second
        ("abbbcccccc", 3, 8),  # since the 4th
        ("aaaaaaaaaaaa", 3, 12),  # it has not begun
        ("abcdefghijkl", 3, 12),  # it goes on
        ("abbbbbbbbbbb", 0, 12),  # there is no limit
    ],
)
def test_a_run_that_has_begun_and_makes_no_progress_is_ended(
    letters: str, seconds: float, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watched(monkeypatch, letters, seconds) == seen


def test_a_clusters_ray_is_left_to_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, "abbbbbbbbbbb", 3) == 12


@pytest.mark.ray
class TestUnderRay:
    def test_a_run_goes_on_without_a_lost_row_in_a_new_ray_and_ends_with_a_checkpoint_when_all_are_told_to(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        """SIGTERM goes to the whole process group, as `timeout`, systemd and Slurm send it."""
        flags: dict[str, Any] = {"ways": 3, "query": 2, "epochs": 1, "steps-per-epoch": 1000, "meta-batch": 4}
        flags["eval-every"] = 50
        flags |= {"workers": 1, "cpus-per-worker": 1, "eval-episodes": 10, "test-episodes": 20, "eval-query": 3}
        flags |= {"data": tiny, "storage": tmp_path, "name": "run", "model.filters": 8, "wandb": "disabled"}
        command = [sys.executable, str(ROOT / "scripts/train.py"), *(f"--{k}={v}" for k, v in flags.items())]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True, cwd=tmp_path
        )
        run, started = tmp_path / "run", dict[int, str]()
        for steps, name in ((120, "gcs_server"), (320, "raylet")):
            once(process, run, steps)
            started |= descendants(process.pid)
            os.kill(server(process, name), signal.SIGKILL)
            time.sleep(1)  # until the rows after its last checkpoint have been written again
        once(process, run, 520)
        started |= descendants(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 1, error
        steps = len(read_metrics(run))
        assert 520 <= steps < 1000
        sentences = [line for line in error.splitlines() if line.endswith(("last checkpoint", "goes on from it"))]
        assert sentences == [
            "Ray's gcs_server has ended; training starts again from the last checkpoint",
            "Ray's raylet has ended; training starts again from the last checkpoint",
            f"train.py: stopped with a checkpoint of step {steps}; the same command goes on from it",
        ]
        assert len(started) > 20
        assert {name for pid, name in started.items() if state(pid)} == set(), "none of its processes is left"
        alone = fit(config(tiny, tmp_path / "alone", epochs=1, steps_per_epoch=steps, eval_every=50))
        assert history(run)[:-1] == history(alone)[:-1]
        assert history(alone)[-1].items() >= history(run)[-1].items()  # the last row, which has no evaluation
        assert digests(run)[f"step-{steps:08d}"] == digests(alone)[f"step-{steps:08d}"]
