"""metrics.jsonl, the same rows on W&B read back from its offline file, and which of W&B's modes is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lgm_dist.config import Config
from lgm_dist.tracking import Tracker, read_metrics, wandb_mode

SILENT = Config(wandb="disabled")


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl by plain reading."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests set: clock[0], in seconds."""
    now = [1000.0]
    monkeypatch.setattr("lgm_dist.tracking.time.monotonic", lambda: now[0])
    return now


def test_rows(tmp_path: Path, clock: list[float]) -> None:
    tracker = Tracker(tmp_path, SILENT, 0, {})
    clock[0] += 0.5
    tracker.log(1, {"train/loss": 1.25, "train/accuracy": 1 / 3})
    assert rows(tmp_path) == [{"step": 1, "train/loss": 1.25, "train/accuracy": 1 / 3, "seconds": 0.5}], "at once"
    clock[0] += 2.25
    tracker.log(2, {"train/loss": 1.0, "val/accuracy": 0.5})
    tracker.close({"test/accuracy": 0.4})
    assert rows(tmp_path)[1:] == [{"step": 2, "train/loss": 1.0, "val/accuracy": 0.5, "seconds": 2.75}]
    assert read_metrics(tmp_path) == rows(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_no_rows_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    Tracker(tmp_path, SILENT, 0, {}).close({})
    assert read_metrics(tmp_path) == []


def write_rows(run: Path, count: int, tail: str = "") -> None:
    text = "".join(
        json.dumps({"step": s, "train/loss": 0.1 * s, "seconds": 2.0 * s}) + "\n" for s in range(1, count + 1)
    )
    (run / "metrics.jsonl").write_text(text + tail)


@pytest.mark.parametrize(("step", "kept"), [(3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (0, []), (9, [1, 2, 3, 4, 5])])
@pytest.mark.parametrize("tail", ["", '{"step": 6, "train/lo', "{"])
def test_resuming_drops_rows_that_will_come_again(tmp_path: Path, step: int, kept: list[int], tail: str) -> None:
    """Also the last one, where a killed process left it half-written."""
    write_rows(tmp_path, 5, tail)
    before = {row["step"]: row for row in read_metrics(tmp_path)}
    assert list(before) == [1, 2, 3, 4, 5]
    tracker = Tracker(tmp_path, SILENT, step, {})
    assert rows(tmp_path) == [before[s] for s in kept]
    tracker.log(step + 1, {"train/loss": 7.0})
    tracker.close({})
    assert [row["step"] for row in rows(tmp_path)] == [*kept, step + 1]
    assert rows(tmp_path)[-1]["train/loss"] == 7.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_seconds_go_on_from_the_rows_that_stay(tmp_path: Path, clock: list[float]) -> None:
    write_rows(tmp_path, 5)
    clock[0] = 50_000
    tracker = Tracker(tmp_path, SILENT, 3, {})
    clock[0] += 0.25
    tracker.log(4, {})
    tracker.close({})
    assert [row["seconds"] for row in rows(tmp_path)] == [2.0, 4.0, 6.0, 6.25]


def test_disabled_loads_and_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["wandb"] = None
from pathlib import Path
from lgm_dist.config import Config
from lgm_dist.tracking import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), Config(wandb="disabled"), 0, {{}})
tracker.log(1, {{"train/loss": 1.0}})
tracker.close({{}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# W&B


def inspect(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline run, by W&B's own reader."""
    wandb = shutil.which("wandb", path=str(Path(sys.executable).parent))
    if wandb is None:
        pytest.skip("W&B's command line is not installed")
    done = subprocess.run([wandb, "leet", "inspect", "--json", folder], check=True, capture_output=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that would change what W&B does are unset."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("offline")
def test_an_offline_run_holds_every_row_once_and_goes_on_as_the_same(tmp_path: Path) -> None:
    config = Config(wandb="offline", name="a-run", ways=7)
    spans, folders = [[1, 2, 3], [4, 5]], list[Path]()
    for span in spans:
        tracker = Tracker(tmp_path, config, span[0] - 1, {"world_size": 2})
        for step in span:
            tracker.log(step, {"train/loss": 1 / step, "val/accuracy": [0.1, 0.4, 0.2, 0.3, 0.25][step - 1]})
        tracker.close({"test/accuracy": 0.125})
        folders += sorted(set((tmp_path / "wandb").glob("offline-run-*")) - set(folders))
    assert len(folders) == 2, "one for each start"

    records = [inspect(folder) for folder in folders]
    for found, span in zip(records, spans, strict=True):
        history = of_type(found, "history")
        assert [row["step"]["num"] for row in history] == span
        assert [row["item"]["step"] for row in history] == span
        assert [row["item"]["train/loss"] for row in history] == [1 / step for step in span]
        assert of_type(found, "exit")[0]["exit_code"] == 0
    assert len({of_type(found, "run")[0]["run_id"] for found in records}) == 1
    first = of_type(records[0], "run")[0]
    assert (first["display_name"], first["project"], first["job_type"]) == ("a-run", "lgm_dist", "train")
    tracked = first["config"]["update"]
    assert {key: tracked[key] for key in (*config.to_dict(), "world_size")} == config.to_dict() | {"world_size": 2}
    metrics = {m.get("name", m.get("glob_name")): m for m in of_type(records[0], "metric")}
    assert metrics["*"]["step_metric"] == "step"
    assert metrics["val/accuracy"]["summary"] == {"max": True}
    summary: dict[str, Any] = {}
    for record in of_type(records[0], "summary"):
        summary |= record["update"]
    assert summary["test/accuracy"] == 0.125
    assert summary["val/accuracy"] == {"max": 0.4}


@pytest.mark.parametrize(
    ("configured", "environment", "key", "expected"),
    [
        ("online", None, "", "online"),
        ("offline", None, "k" * 40, "offline"),
        ("disabled", "online", "k" * 40, "disabled"),  # what is asked for by flag goes before the environment
        ("offline", "disabled", "", "offline"),
        ("auto", "disabled", "k" * 40, "disabled"),
        ("auto", "offline", "k" * 40, "offline"),
        ("auto", "online", "", "online"),
        ("auto", None, "k" * 40, "online"),
        ("auto", None, "", "offline"),
        ("auto", "", "", "offline"),
    ],
)
def test_mode(
    configured: Any, environment: str | None, key: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # no login but the one that a test makes
    monkeypatch.setenv("WANDB_API_KEY", key)
    if environment is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_mode(replace(SILENT, wandb=configured)) == expected


def test_a_login_counts_as_an_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "k" * 40 + "\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_mode(Config()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(Config()) == "offline"
