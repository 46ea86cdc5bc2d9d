"""The mirror of a run on W&B, read back from W&B's own offline files: each row once whatever dies, and which mode is taken."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabricated import FACTS, PNG, write_state
from offline_runs import Records, folders, history, inspect, merged, of_type

from lgm_dist.config import Config
from lgm_dist.runs.checkpoint_files import TrainState
from lgm_dist.runs.metrics import MetricsLog, read_metrics
from lgm_dist.tracking import mirror as tracking
from lgm_dist.tracking.mirror import Mirror, log_evaluation
from lgm_dist.tracking.wandb_process import wandb_mode

SILENT = Config.of(wandb="disabled")
OFFLINE = Config.of(wandb="offline", name="a-run", ways=7)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The variables that would change what W&B does are unset, its caches are elsewhere, and the mirror looks often."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("wandb")))
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.02)


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


def until(true: Callable[[], bool]) -> None:
    """Waits for the mirror's thread."""
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit, "the mirror does not follow"
        time.sleep(0.01)


def steps(run: Path) -> list[int]:
    """Of all rows that W&B's files hold, oldest folder first."""
    return [row["step"] for folder in folders(run) for row in history(inspect(folder))]


def run_of(records: Records) -> dict[str, Any]:
    (run,) = of_type(records, "run")
    return run


# Rows


def test_rows_come_as_they_are_written_and_a_later_start_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    with Mirror(tmp_path, OFFLINE, "a-sweep", "trial") as mirror:
        write(log, 1, 3)
        until(lambda: mirror.logged == 3)
        (tmp_path / "facts.json").write_text(json.dumps({"world_size": 2}))
        until(lambda: mirror._facts == {"world_size": 2})
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
            until(lambda: mirror.logged == 2)
            time.sleep(0.2)
            assert mirror.logged == 2
            file.write('ss": 0.5}\n{"step": 4')
        until(lambda: mirror.logged == 3)
    assert mirror.failure == ""
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_come_again_are_not_sent_again(tmp_path: Path, in_place: bool) -> None:
    """Workers that went back to the checkpoint of step 3 put another file in its place, perhaps with the same inode."""
    log = MetricsLog(tmp_path, 0)
    write(log, 1, 6)
    with Mirror(tmp_path, OFFLINE) as mirror:
        until(lambda: mirror.logged == 6)
        if in_place:  # the mirror finds itself in the middle of a line
            longer = [{"step": s, "more": "x" * s, **figures(s)} for s in range(1, 9)]
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
        else:
            log = MetricsLog(tmp_path, 3)
            write(log, 4, 5)
            time.sleep(0.1)
            write(log, 6, 8)
        until(lambda: mirror.logged == 8)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


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
    one, two = (Mirror(run, replace(OFFLINE, name=run.name), "a-sweep", "trial") for run in runs)
    with one, two:
        logs = [MetricsLog(run, 0) for run in runs]
        write(logs[0], 1, 3)
        write(logs[1], 1, 2)
        until(lambda: (one.logged, two.logged) == (3, 2))
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
        until(lambda: mirror.logged == 3)
        with Mirror(tmp_path, OFFLINE) as other:
            pass
    assert (mirror.failure, other.failure) == ("", "RuntimeError: another process is sending it")
    assert "another process is sending it" in capfd.readouterr().err
    assert steps(tmp_path) == [1, 2, 3]


# The end of a run

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


def test_the_end_joins_the_last_row_and_is_sent_once(tmp_path: Path, tiny: Path) -> None:
    with Mirror(tmp_path, OFFLINE):
        write_all(tmp_path, 3)
        finish(tmp_path, tiny)
    (folder,) = folders(tmp_path)
    records = inspect(folder)
    assert [row["step"] for row in history(records)] == [1, 2, 3], "no row of its own"
    last = history(records)[-1]
    assert (last["step"], last["train/loss"]) == (3, 1 / 3)
    assert (folder / "files" / last["pictures/curves.path"]).read_bytes() == PNG
    assert (last["weights/layer1.bins"], last["weights/layer1.values"]) == ([-1, 0, 1], [7, 9])
    assert last["weights/silhouette"] == 0.25
    assert table(folder, last["classes/accuracy.path"]) == [
        ["class", "group", "accuracy", "ci95", "queries", "episodes"],
        ["ant", "six legs", 0.75, 0.1, 4, 2],
        ["bee", "six legs", 1, None, 4, 2],
    ]
    pairs = [["ant", "ant", 3], ["ant", "bee", 1], ["bee", "bee", 4]]
    assert table(folder, last["classes/confusion_table.path"]) == [["Actual", "Predicted", "nPredictions"], *pairs]
    points = [[0.5, 1.5, "ant, bee", "mean"], [2.5, 3.5, "ant, bee", "drawn"]]
    assert table(folder, last["weights/embedding.path"]) == [["x", "y", "classes", "noise"], *points]

    summary = merged(records, "summary")
    best = {"best/step": 2, "best/accuracy": 0.4, "best/ci95": 0.01}
    expected = {"step": 3, "test/accuracy": 0.375, "test/ci95": 0.02, "protocol": "standard", "train/steps": 3, **best}
    assert {key: summary[key] for key in expected} == expected
    assert summary["val/accuracy"] == {"max": 0.4}

    with Mirror(tmp_path, OFFLINE):
        pass
    assert folders(tmp_path) == [folder], "W&B holds everything"
    with Mirror(tmp_path, OFFLINE):  # one that is given more epochs
        write(MetricsLog(tmp_path, 3), 4, 6)
        finish(tmp_path, tiny, {"train/steps": 6})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    more = inspect(folders(tmp_path)[1])
    assert "pictures/curves.path" in history(more)[-1]
    assert merged(more, "summary")["train/steps"] == 6


def test_the_data_and_the_best_checkpoint_are_artifacts_with_lineage(tmp_path: Path, tiny: Path) -> None:
    with Mirror(tmp_path, OFFLINE):
        write_all(tmp_path, 3)
        finish(tmp_path, tiny)
    data, model = of_type(inspect(folders(tmp_path)[0]), "artifact")[-2:]
    assert (data["type"], data["name"], data["use_after_commit"]) == ("dataset", "tiny", True), "an input of the run"
    (entry,) = data["manifest"]["contents"]
    assert entry["path"] == "manifest.json"
    assert entry["size"] == str(tiny.stat().st_size), "the manifest and no image"
    assert base64.b64decode(entry["digest"]) == hashlib.md5(tiny.read_bytes()).digest()
    assert json.loads(data["metadata"]) == {"digest": hashlib.sha256(tiny.read_bytes()).hexdigest()}

    name = "a-run-" + (tmp_path / "wandb-id").read_text().strip()
    assert (model["type"], model["name"], "best" in model["aliases"]) == ("model", name, True)
    assert "use_after_commit" not in model, "an output of the run"
    best = tmp_path / "checkpoints" / "step-00000002"
    assert {entry["local_path"] for entry in model["manifest"]["contents"]} == {
        str(best / "state.json"),
        str(best / "state.pt"),
    }
    figures = {"step": 2, "val/accuracy": 0.4, "val/ci95": 0.01, "ways": 5, "shot": 1, "protocol": "standard"}
    assert json.loads(model["metadata"]) == figures


def test_a_manifest_that_is_no_longer_the_same_is_named_by_its_digest(tmp_path: Path) -> None:
    manifest = tmp_path / "birds.json"
    manifest.write_text("{}")
    finish(tmp_path, manifest)
    manifest.write_text('{"another": 1}')
    write_all(tmp_path, 3)
    with Mirror(tmp_path, OFFLINE):
        pass
    data = of_type(inspect(folders(tmp_path)[0]), "artifact")[-2]
    (entry,) = data["manifest"]["contents"]
    assert (data["name"], entry["path"]) == ("birds", "digest.json")
    assert json.loads(Path(entry["local_path"]).read_text()) == {
        "manifest": str(manifest),
        "digest": hashlib.sha256(b"{}").hexdigest(),
    }


def test_an_exception_marks_the_run_as_failed_and_a_later_end_goes_into_the_summary(tmp_path: Path, tiny: Path) -> None:
    """W&B holds the last row by then, and takes no more for it."""
    write_all(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt), Mirror(tmp_path, OFFLINE):
        raise KeyboardInterrupt
    failed = inspect(folders(tmp_path)[0])
    assert [row["step"] for row in history(failed)] == [1, 2, 3]
    assert of_type(failed, "exit")[0]["exit_code"] == 1
    assert "train/steps" not in merged(failed, "summary")

    with Mirror(tmp_path, OFFLINE) as mirror:
        finish(tmp_path, tiny)
    folder = folders(tmp_path)[1]
    records = inspect(folder)
    assert (mirror.logged, mirror.failure, history(records)) == (0, "", [])
    summary = merged(records, "summary")
    assert summary["test/accuracy"] == 0.375
    assert (folder / "files" / summary["pictures/curves"]["path"]).read_bytes() == PNG
    pairs = [["ant", "ant", 3], ["ant", "bee", 1], ["bee", "bee", 4]]
    assert table(folder, summary["classes/confusion"]["path"]) == [["Actual", "Predicted", "nPredictions"], *pairs]


def test_a_run_without_analysis_checkpoint_or_facts_ends_too(tmp_path: Path) -> None:
    with Mirror(tmp_path, OFFLINE) as mirror:
        write_all(tmp_path, 3)
        (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert mirror.failure == ""
    records = inspect(folders(tmp_path)[0])
    assert merged(records, "summary")["test/accuracy"] == 0.375
    assert of_type(records, "artifact") == []


def test_an_evaluation_is_a_run_of_its_own_that_uses_the_checkpoint(tmp_path: Path, tiny: Path) -> None:
    write_all(tmp_path, 3)
    finish(tmp_path, tiny)
    with Mirror(tmp_path, OFFLINE):
        pass
    scores = {"single draw": {"accuracy": 0.5, "ci95": 0.1}, "vote": {"accuracy": 0.75, "ci95": 0.2}}
    found = {"split": "test", "protocol": "paper", "ways": 5, "shot": 1, "episodes": 20, "draws": 2, "scores": scores}
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    log_evaluation(OFFLINE, checkpoint, "birds", [found])

    trained, evaluated = (inspect(folder) for folder in folders(tmp_path))
    run = run_of(evaluated)
    assert (run["job_type"], run["run_group"], run["display_name"]) == ("evaluate", "a-run", "a-run")
    assert run["run_id"] != run_of(trained)["run_id"]
    assert run["config"]["update"]["ways"] == 7
    (row,) = history(evaluated)
    lines = [["birds", "test", "paper", 5, 1, 20, 2, "single draw", 0.5, 0.1]]
    lines += [["birds", "test", "paper", 5, 1, 20, 2, "vote", 0.75, 0.2]]
    header = ["data", "split", "protocol", "ways", "shot", "episodes", "draws", "noise", "accuracy", "ci95"]
    assert table(folders(tmp_path)[1], row["evaluation.path"]) == [header, *lines]
    summary = merged(evaluated, "summary")
    assert (summary["test/paper/5w1s/accuracy"], summary["test/paper/5w1s/ci95"]) == (0.5, 0.1)
    output, used = (of_type(records, "artifact")[-1] for records in (trained, evaluated))
    assert used["use_after_commit"] is True
    assert [used[key] for key in ("name", "digest")] == [output[key] for key in ("name", "digest")]


# W&B fails


@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_a_wandb_that_cannot_be_imported_ends_no_training(tmp_path: Path, mode: str) -> None:
    """As where one of its own requirements is missing."""
    write_all(tmp_path, 3)
    code = f"""import sys
sys.modules["wandb"] = sys.modules["wandb.sdk"] = None
from pathlib import Path
from dataclasses import replace
from test_tracking import OFFLINE
from lgm_dist.tracking.mirror import Mirror
with Mirror(Path({str(tmp_path)!r}), replace(OFFLINE, wandb={mode!r})):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"W&B does not hold all of {tmp_path} (")
    assert "wandb_replay.py" in sentence


def mended(run: Path, rows: int) -> bool:
    """Whether another start sends what is not there."""
    with Mirror(run, OFFLINE) as mirror:
        pass
    return mirror.failure == "" and sorted(steps(run)) == list(range(1, rows + 1))


def drive(run: Path, rows: int, mode: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """DRIVER in a process of its own, to its end."""
    command = [sys.executable, "-c", before + DRIVER, str(run), str(rows), "0", mode]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


def test_a_network_that_is_gone(tmp_path: Path) -> None:
    gone = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "k" * 40, "WANDB_INIT_TIMEOUT": "1"}
    done = drive(tmp_path, 5, "online", **gone)
    assert (done.returncode, done.stdout) == (0, "0 rows logged\n"), "nothing happened to the process that trains"
    (said,) = [line for line in done.stderr.splitlines() if "metrics.jsonl" in line]
    assert f"W&B does not hold all of {tmp_path} (" in said
    assert f"`python scripts/wandb_replay.py {tmp_path}`" in said
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
        until(lambda: mirror.failure != "")
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
        until(lambda: mirror.logged == 3)
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
    assert done.stderr.count(f"W&B does not hold all of {tmp_path} (ZeroDivisionError") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk(tmp_path: Path) -> None:
    """W&B's own process may write 20,000 bytes to a file, and says nothing when it cannot write more."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    done = drive(tmp_path, 150, "offline", limit)
    assert done.returncode == 0
    held = steps(tmp_path)
    assert 0 < len(held) < 150
    assert f"{150 - len(held)} of 150 rows are not in its files; is the disk full?" in done.stderr
    assert mended(tmp_path, 150)


# Modes


def test_disabled_loads_and_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["wandb"] = None
from pathlib import Path
from lgm_dist.config import Config
from lgm_dist.tracking.mirror import Mirror, log_evaluation
with Mirror(Path({str(tmp_path)!r}), Config.of(wandb="disabled")):
    Path({str(tmp_path)!r}, "metrics.jsonl").write_text('{{"step": 1}}\\n')
log_evaluation(Config.of(wandb="disabled"), Path("nowhere"), "fc100", [])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


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
