"""What W&B shows of a run besides its rows: pictures, tables, histograms, the summary, and artifacts with their lineage."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lgm_dist.config import Config
from lgm_dist.runs.files import read_json

DONE = "train/steps"
"""Key of the summary that is sent last: the number of steps that the finished run had."""
UPLOAD_SECONDS = 300.0
"""Longest time that the end of a run waits for an upload."""


def panels(run: Path, analysis: dict[str, Any], charts: bool = True) -> dict[str, Any]:
    """The pictures in a finished run's folder, and the tables and histograms of its analysis.json.

    Without `charts`, the confusion matrix is a plain table, because a summary cannot hold a chart.
    """
    import wandb

    shown: dict[str, Any] = {f"pictures/{p.stem}": wandb.Image(str(p)) for p in sorted(run.glob("*.png"))}
    if analysis:
        shown |= {
            "classes/confusion": _confusion(analysis, charts),
            "classes/accuracy": _table(analysis["per_class"]),
            **_weights(analysis["weights"] or {}),
        }
    return shown


def evaluation(data: str, results: list[dict[str, Any]]) -> tuple[Any, dict[str, float]]:
    """A table of evaluations, and their accuracies for the summary.

    The table has a line for each way to use the noise draws. The summary has only the protocol's own way, and of a comparison
    only the first row.
    """
    lines: list[dict[str, Any]] = []
    cells: dict[str, float] = {}
    for result in results:
        shown = {"data": data} | {key: value for key, value in result.items() if key != "scores"}
        lines += [shown | {"noise": noise} | score for noise, score in result["scores"].items()]
        cell = f"{result['split']}/{result['protocol']}/{result['ways']}w{result['shot']}s"
        cells = {f"{cell}/{name}": value for name, value in next(iter(result["scores"].values())).items()} | cells
    return _table(lines), cells


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """result.json for the summary. Keys that the rows have too are renamed, and DONE comes last."""
    chosen = {"step": "best/step", "val/accuracy": "best/accuracy", "val/ci95": "best/ci95"}
    renamed = {chosen.get(key, key): value for key, value in result.items() if key not in ("ways", "shot", DONE)}
    return renamed | {DONE: result[DONE]}


def data_artifact(facts: dict[str, Any]) -> Any:
    """The manifest that the run was trained with, or its path and digest if the file has changed. Never images."""
    import wandb

    path, digest = Path(facts["manifest"]), facts["manifest_digest"]
    artifact = wandb.Artifact(_name(path.stem), type="dataset", metadata={"digest": digest})
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        artifact.add_file(str(path), name="manifest.json")
    else:
        with artifact.new_file("digest.json") as file:
            json.dump({"manifest": facts["manifest"], "digest": digest}, file)
    return artifact


def model_artifact(wandb_id: str, config: Config, checkpoint: Path, result: dict[str, Any]) -> Any:
    """The files of a checkpoint, not copied. Equal files are the same version of the artifact in all W&B runs."""
    import wandb

    figures = {key: result[key] for key in ("step", "val/accuracy", "val/ci95", "ways", "shot") if key in result}
    name = f"{_name(config.run_name)}-{wandb_id}"
    artifact = wandb.Artifact(name, type="model", metadata=figures | {"protocol": config.episodes.protocol})
    for file in sorted(checkpoint.iterdir()):
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
    return artifact


def use(tracked: Any, artifact: Any) -> None:
    """Make the artifact an input of the W&B run, and log it if W&B does not have it.

    `use_artifact` would do that, but it refuses to work offline.
    """
    wait(tracked, tracked._log_artifact(artifact, is_user_created=True, use_after_commit=True))


def wait(tracked: Any, artifact: Any) -> None:
    """Wait until the artifact is uploaded."""
    if not tracked.offline:
        artifact.wait(timeout=UPLOAD_SECONDS)


def read_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist or is damaged."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return {}


def _weights(weights: dict[str, Any]) -> dict[str, Any]:
    """The embedding of the generated weights and their histograms; empty if the analysis has no weights."""
    import wandb

    if not weights:
        return {}
    points = [
        {"x": x, "y": y, "classes": ", ".join(weights["tasks"][task]), "noise": noise}
        for (x, y), task, noise in zip(weights["xy"], weights["task_of"], weights["noise"], strict=True)
    ]
    histograms = {
        f"weights/{layer}": wandb.Histogram(np_histogram=(histogram["counts"], histogram["edges"]))
        for layer, histogram in weights["histogram"].items()
    }
    return {"weights/embedding": _table(points), "weights/silhouette": weights["silhouette"], **histograms}


def _confusion(analysis: dict[str, Any], charts: bool) -> Any:
    import wandb

    names, counts = analysis["classes"], analysis["confusion"]
    pairs = [(a, b, counts[i][j]) for i, a in enumerate(names) for j, b in enumerate(names) if counts[i][j]]
    columns = ("Actual", "Predicted", "nPredictions")  # the names that the chart needs
    table = _table([dict(zip(columns, pair, strict=True)) for pair in pairs])
    return wandb.plot_table("wandb/confusion_matrix/v1", table, {c: c for c in columns}) if charts else table


def _table(lines: list[dict[str, Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(lines[0]), data=[list(line.values()) for line in lines])


def _name(words: str) -> str:
    """`words` as a valid name of an artifact."""
    return re.sub(r"[^\w.-]", "-", words, flags=re.ASCII)[:100]
