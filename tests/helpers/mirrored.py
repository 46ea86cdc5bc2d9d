"""Runs that a Mirror follows, for the tests of what W&B then has."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.fabricated import FACTS, PNG, write_state
from helpers.offline_runs import Records, folders, history, inspect, of_type
from helpers.waiting import LIMIT

from lgm_dist.config import Config
from lgm_dist.runs.checkpoint_files import TrainState
from lgm_dist.runs.metrics import MetricsLog

OFFLINE = Config.of(wandb="offline", name="a-run", ways=7)
ROOT = Path(__file__).parents[2]


def isolate(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Unset the W&B variables of the caller, hide a login, and put W&B's caches into a folder of their own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("wandb")))
    monkeypatch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))


def figures(step: int) -> dict[str, float]:
    """The metrics of a row; the best val accuracy is that of step 2."""
    return {
        "train/loss": 1 / step,
        "val/accuracy": [0.1, 0.4, 0.2, 0.3, 0.25][step % 5 - 1],
        "speed/episodes_per_s": 9.0,
    }


def write(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write(step, figures(step))


def write_all(run: Path, steps: int) -> None:
    log = MetricsLog(run, 0)
    write(log, 1, steps)
    log.close()


def steps(run: Path) -> list[int]:
    """Of all rows that W&B's files hold, oldest folder first."""
    return [row["step"] for folder in folders(run) for row in history(inspect(folder))]


def run_of(records: Records) -> dict[str, Any]:
    (run,) = of_type(records, "run")
    return run


DRIVER = """
import sys, time
from pathlib import Path
from lgm_dist.tracking import mirror as tracking
from lgm_dist.config import Config
from lgm_dist.runs.metrics import MetricsLog
tracking.POLL_SECONDS = 0.02
run, rows, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
log = MetricsLog(run, 0)
with tracking.Mirror(run, Config.of(wandb=sys.argv[4], name="a-run")) as mirror:
    for step in range(1, rows + 1):
        log.write(step, {"train/loss": 1 / step})
        time.sleep(pause)
    while mirror.logged < rows and not mirror.failure:
        time.sleep(0.01)
    print(mirror.logged, "rows logged", flush=True)
    if pause:
        time.sleep(60)
"""


def drive(run: Path, rows: int, mode: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """DRIVER in a process of its own, to its end."""
    command = [sys.executable, "-c", before + DRIVER, str(run), str(rows), "0", mode]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=LIMIT)


RESULT = {
    "protocol": "standard",
    "ways": 5,
    "shot": 1,
    "val/accuracy": 0.4,
    "val/ci95": 0.01,
    "step": 2,
    "train/steps": 3,
    "train/episodes": 24,
    "memory/peak_bytes": 123.0,
    "test/accuracy": 0.375,
    "test/ci95": 0.02,
}
ANALYSIS = {
    "classes": ["ant", "bee"],
    "confusion": [[3, 1], [0, 4]],
    "per_class": [
        {"class": "ant", "group": "six legs", "accuracy": 0.75, "ci95": 0.1, "queries": 4, "episodes": 2},
        {"class": "bee", "group": "six legs", "accuracy": 1.0, "ci95": None, "queries": 4, "episodes": 2},
    ],
    "weights": {
        "tasks": [["ant", "bee"]],
        "task_of": [0, 0],
        "noise": ["mean", "drawn"],
        "xy": [[0.5, 1.5], [2.5, 3.5]],
        "silhouette": 0.25,
        "histogram": {"layer1": {"edges": [-1.0, 0.0, 1.0], "counts": [7, 9], "drawn": [8, 8]}},
    },
}


def finish(run: Path, manifest: Path, result: dict[str, Any] | None = None) -> None:
    """What a run leaves at its end; the manifest is any file."""
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (run / "facts.json").write_text(json.dumps(FACTS | {"manifest": str(manifest), "manifest_digest": digest}))
    (run / "analysis.json").write_text(json.dumps(ANALYSIS))
    (run / "curves.png").write_bytes(PNG)
    for step, accuracy in ((2, 0.4), (3, 0.2)):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.pt").write_bytes(b"tensors")
        write_state(checkpoint, TrainState(step, accuracy, 0.01), OFFLINE)
    (run / "result.json").write_text(json.dumps(RESULT | (result or {})))


def table(folder: Path, path: str) -> Any:
    """A table's columns and lines, read from the file that W&B would upload."""
    content = json.loads((folder / "files" / path).read_text())
    return [content["columns"], *content["data"]]
