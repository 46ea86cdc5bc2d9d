"""W&B fails: the training goes on, one sentence says so, and another start sends the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.mirrored import (
    OFFLINE,
    ROOT,
    drive,
    isolate,
    steps,
    write_all,
)
from helpers.offline_runs import folders, inspect, of_type
from helpers.waiting import wait_for

from lgm_dist.runs.metrics import read_metrics
from lgm_dist.tracking import mirror as mirror_module
from lgm_dist.tracking.mirror import Mirror


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    isolate(monkeypatch, tmp_path_factory)
    monkeypatch.setattr(mirror_module, "POLL_SECONDS", 0.02)


@pytest.mark.parametrize(("mode", "said"), [("auto", 0), ("offline", 1)])
def test_a_wandb_that_cannot_be_imported_ends_no_training(tmp_path: Path, mode: str, said: int) -> None:
    """Under auto, a W&B that is not installed is not used."""
    write_all(tmp_path, 3)
    code = f"""import sys
sys.modules["wandb"] = sys.modules["wandb.sdk"] = None
from pathlib import Path
from helpers.mirrored import OFFLINE
from lgm_dist.tracking.mirror import Mirror
with Mirror(Path({str(tmp_path)!r}), OFFLINE.replace(wandb={mode!r})):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentences = done.stderr.splitlines()
    assert len(sentences) == said
    for sentence in sentences:
        assert sentence.startswith(f"W&B does not have all of {tmp_path} (")
        assert "lgm-dist replay" in sentence


def mended(run: Path, rows: int) -> bool:
    """Whether another start sends what is not there."""
    with Mirror(run, OFFLINE) as mirror:
        pass
    return mirror.failure == "" and sorted(steps(run)) == list(range(1, rows + 1))


def test_a_network_that_is_gone(tmp_path: Path) -> None:
    gone = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "k" * 40, "WANDB_INIT_TIMEOUT": "1"}
    done = drive(tmp_path, 5, "online", **gone)
    assert (done.returncode, done.stdout) == (0, "0 rows logged\n"), "nothing happened to the process that trains"
    (said,) = [line for line in done.stderr.splitlines() if "metrics.jsonl" in line]
    assert f"W&B does not have all of {tmp_path} (" in said
    assert f"`lgm-dist replay {tmp_path}`" in said
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert mended(tmp_path, 5)


def test_a_run_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    log = wandb.Run.log

    def breaks(self: Any, row: dict[str, Any], step: int) -> None:
        if step == 3:
            raise ConnectionResetError("Connection lost")
        log(self, row, step=step)

    with monkeypatch.context() as patch, Mirror(tmp_path, OFFLINE) as mirror:
        patch.setattr(wandb.Run, "log", breaks)
        write_all(tmp_path, 5)
        wait_for(lambda: mirror.failure != "", "the mirror follows")
    assert (mirror.logged, mirror.failure) == (2, "ConnectionResetError: Connection lost")
    assert of_type(inspect(folders(tmp_path)[-1]), "exit")[0]["exit_code"] == 1
    assert mended(tmp_path, 5)


def test_a_start_of_wandb_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a busy machine, where its own process did not answer in time, twice."""
    import wandb

    real, calls = wandb.init, []

    def init(**more: Any) -> Any:
        calls.append(more["id"])
        if len(calls) in (1, 2):
            raise wandb.Error("Failed to read port info after 30.0 seconds")
        return real(**more)

    monkeypatch.setattr(wandb, "init", init)
    with Mirror(tmp_path, OFFLINE) as mirror:
        write_all(tmp_path, 3)
        wait_for(lambda: mirror.logged == 3, "the mirror follows")
    assert mirror.failure == ""
    assert len(calls) == 3
    assert steps(tmp_path) == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


SERVICE_ENDS = """
import os, signal, sys, time
from pathlib import Path
from lgm_dist.config import Config
from lgm_dist.runs.metrics import MetricsLog
from lgm_dist.tracking.mirror import Mirror
run = Path(sys.argv[1])
log, start = MetricsLog(run, 0), "start" in sys.argv
with Mirror(run, Config.of(wandb="offline")) as mirror:
    for first in (1, 11, 21):
        for step in range(first, first + 10):
            log.write(step, {})
        while first + 9 not in (mirror._held or ()) and not mirror.failure:
            time.sleep(0.01)
        if mirror.failure:
            break
        if not start and first > 1:
            sys.modules["wandb"].init = lambda **_: 1 / 0  # it does not start again
        os.kill(int(os.environ["WANDB_SERVICE"].rsplit("/", 1)[0].split("-")[-2]), signal.SIGKILL)
print("the run goes on")
"""


def test_wandbs_own_process_is_replaced_where_it_ended_and_no_row_is_lost(tmp_path: Path) -> None:
    """Three times, at last when there is no row to come."""
    done = subprocess.run(
        [sys.executable, "-c", SERVICE_ENDS, str(tmp_path), "start"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "the run goes on\n")
    assert done.stderr == ""
    assert steps(tmp_path) == list(range(1, 31))
    assert len({path.name[-12:] for path in folders(tmp_path)}) == 1


def test_the_end_of_wandbs_own_process_is_one_sentence_where_it_does_not_start_again(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SERVICE_ENDS, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "the run goes on\n")
    assert done.stderr.count(f"W&B does not have all of {tmp_path} (ZeroDivisionError") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk(tmp_path: Path) -> None:
    """W&B's own process may write 20,000 bytes to a file, and says nothing when it cannot write more."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    done = drive(tmp_path, 150, "offline", limit)
    assert done.returncode == 0
    held = steps(tmp_path)
    assert 0 < len(held) < 150
    assert f"{150 - len(held)} of 150 rows are missing in its files; is the disk full?" in done.stderr
    assert mended(tmp_path, 150)
