"""metrics.jsonl: rows at once, whole after a kill, none twice after going back to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lgm_dist.runs.metrics import MetricsLog, read_metrics


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl by plain reading."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests set: clock[0], in seconds."""
    now = [1000.0]
    monkeypatch.setattr("lgm_dist.runs.metrics.time.monotonic", lambda: now[0])
    return now


def test_rows(tmp_path: Path, clock: list[float]) -> None:
    log = MetricsLog(tmp_path, 0)
    clock[0] += 0.5
    log.write(1, {"train/loss": 1.25, "train/accuracy": 1 / 3})
    assert rows(tmp_path) == [{"step": 1, "train/loss": 1.25, "train/accuracy": 1 / 3, "seconds": 0.5}], "at once"
    clock[0] += 2.25
    log.write(2, {"train/loss": 1.0, "val/accuracy": 0.5})
    log.close()
    assert rows(tmp_path)[1:] == [{"step": 2, "train/loss": 1.0, "val/accuracy": 0.5, "seconds": 2.75}]
    assert read_metrics(tmp_path) == rows(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_no_rows_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    MetricsLog(tmp_path, 0).close()
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
    log = MetricsLog(tmp_path, step)
    assert rows(tmp_path) == [before[s] for s in kept]
    log.write(step + 1, {"train/loss": 7.0})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [*kept, step + 1]
    assert rows(tmp_path)[-1]["train/loss"] == 7.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_seconds_go_on_from_the_rows_that_stay(tmp_path: Path, clock: list[float]) -> None:
    write_rows(tmp_path, 5)
    clock[0] = 50_000
    log = MetricsLog(tmp_path, 3)
    clock[0] += 0.25
    log.write(4, {})
    log.close()
    assert [row["seconds"] for row in rows(tmp_path)] == [2.0, 4.0, 6.0, 6.25]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"train/loss": 1.0}', '{"step": "3"}', ""])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    write_rows(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(damage + '\n{"step": 4}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged at line 3; "):
        read_metrics(tmp_path)
