"""The mirror against a server: what W&B holds is asked of it, so that each row comes once whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.fabricated import row, write_run
from helpers.waiting import LIMIT, wait_for
from helpers.wandb_server import Server

from lgm_dist.config import Config

ROOT = Path(__file__).parents[1]
DRIVER = """
import sys, time
from pathlib import Path
from lgm_dist.tracking import mirror as tracking
from lgm_dist.config import Config
from lgm_dist.runs.metrics import MetricsLog
tracking.POLL_SECONDS = 0.02
run, rows, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
log = MetricsLog(run, 0)
with tracking.Mirror(run, Config.of(wandb="online", name="a-run"), "a-sweep", "trial") as mirror:
    for step in range(1, rows + 1):
        log.write(step, {"train/loss": 1 / step})
        time.sleep(pause)
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server that the environment names, which W&B's own process tells of new rows several times a second."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.2")
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            monkeypatch.setenv(name, str(tmp_path / "wandb"))
        yield server
        server.shutdown()


def drive(run: Path, rows: int, pause: float) -> subprocess.Popen[str]:
    run.mkdir(exist_ok=True)
    command = [sys.executable, "-c", DRIVER, str(run), str(rows), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def children_of(parent: int) -> list[int]:
    """The processes that a process has started."""
    children = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for file in children for pid in file.read_text().split()]


def alive(pid: int) -> bool:
    """A process that has ended and that nobody has waited for is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_driver_loses_no_row(server: Server, tmp_path: Path) -> None:
    driver = drive(tmp_path / "run", 100_000, 0.01)
    wait_for(lambda: len(server.rows) >= 20, "rows are on the server", driver)
    services = children_of(driver.pid)
    assert services, "W&B's own process"
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    wait_for(lambda: not any(map(alive, services)), "W&B's own process ends with it")
    held = [row["step"] for row in server.rows]
    assert held == list(range(1, len(held) + 1))
    last = len(held) + 50

    again = drive(tmp_path / "run", last, 0)  # from step 1, so that what W&B holds comes again
    said = again.communicate(timeout=LIMIT)[1]
    assert again.returncode == 0
    assert "W&B does not have" not in said
    assert [row["step"] for row in server.rows] == list(range(1, last + 1))
    assert [row["_step"] for row in server.rows] == list(range(1, last + 1))
    assert [row["train/loss"] for row in server.rows] == [1 / step for step in range(1, last + 1)]
    assert server.exit_codes == [0]
    named = {"displayName": "a-run", "groupName": "a-sweep", "jobType": "trial"}
    assert {key: server.run[key] for key in named} == named
    assert server.run["name"] == (tmp_path / "run" / "wandb-id").read_text().strip()


def test_replay_asks_the_server_what_is_there(server: Server, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Config.of(name="a-run"), [row(step) for step in range(1, 6)])
    (run / "facts.json").unlink()  # and so no artifacts, which this server does not keep
    result = {"step": 5, "val/accuracy": 0.5, "val/ci95": 0.1, "train/steps": 5, "test/accuracy": 0.375}
    (run / "result.json").write_text(json.dumps(result))
    said = []
    for _ in range(2):
        command = [sys.executable, "scripts/wandb_replay.py", run]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        rows = [{key: value for key, value in line.items() if not key.startswith("_")} for line in server.rows]
        assert rows == [row(step) for step in range(1, 6)]
        assert (server.summary["test/accuracy"], server.summary["train/steps"]) == (0.375, 5)
    assert said == [f"{run}: 5 rows sent, 0 already there\n", f"{run}: 0 rows sent, 5 already there\n"]
