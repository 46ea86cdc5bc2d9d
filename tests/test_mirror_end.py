"""What W&B has at the end of a run: panels, summary, artifacts, and evaluations as runs of their own."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from helpers.fabricated import PNG
from helpers.mirrored import (
    OFFLINE,
    RESULT,
    finish,
    isolate,
    run_of,
    steps,
    table,
    write,
    write_all,
)
from helpers.offline_runs import folders, history, inspect, merged, of_type

from lgm_dist.runs.metrics import MetricsLog
from lgm_dist.tracking import mirror as mirror_module
from lgm_dist.tracking.evaluations import log_evaluation
from lgm_dist.tracking.mirror import Mirror


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    isolate(monkeypatch, tmp_path_factory)
    monkeypatch.setattr(mirror_module, "POLL_SECONDS", 0.02)


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
