"""The cells of the ways × shots table: checked together, trained one after the other, evaluated on each other's episodes."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lgm_dist.cluster import connection as ray_cluster
from lgm_dist.cluster import fit as ray_train
from lgm_dist.config import Config
from lgm_dist.data import ImageBank, open_bank
from lgm_dist.data.prepare import ensure_manifest
from lgm_dist.errors import RunFailed
from lgm_dist.runs.checkpoint import best, load_model
from lgm_dist.runs.files import read_json, write_json
from lgm_dist.runs.folder import CONFIG, RESULT, read_result
from lgm_dist.runs.job import device_of, make_job, open_banks, threads_of
from lgm_dist.sweeps.spaces import images_per_step
from lgm_dist.training.evaluation import evaluate
from lgm_dist.training.loop import total_steps
from lgm_dist.training.worker import Worker

CROSS = "cross.json"
"""In a cell's run: {"step" of the evaluated checkpoint, "scores": {cell: {"accuracy", "ci95", "episodes"}}}."""


def run_of(cell: Config) -> Path:
    """Folder of a cell's run."""
    return Path(cell.run.storage) / cell.run.name


def finished(cell: Config) -> bool:
    """Return True if the cell's run has trained to its last step and was evaluated."""
    run = run_of(cell)
    return (run / RESULT).exists() and bool(read_result(run)["train/steps"] == total_steps(cell))


def check(cells: list[Config]) -> None:
    """Check all cells, then make their folders.

    Raises ValueError for the first cell for which the data set is too small, or that was started with other settings.
    """
    folder = Path(cells[0].run.storage)
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} is the folder of a single run; give the table another --name")
    manifest = ensure_manifest(cells[0].data.name, cells[0].data.root, cells[0].data.source)
    for cell in cells:
        try:
            open_banks(cell, manifest)
        except ValueError as error:
            raise ValueError(f"cell {cell.run.name}: {error}") from None
    for cell in cells:
        make_job(cell)


def train(cells: list[Config]) -> None:
    """Train the cells that are not finished. Raises RunFailed with the name of the first cell that fails."""
    first = cells[0].episodes.steps * images_per_step(cells[0])
    with _one_ray(cells):
        for number, cell in enumerate(cells, 1):
            sys.stdout.write(f"cell {number} of {len(cells)}: {cell.run.name}, ")
            if finished(cell):
                sys.stdout.write("already finished\n")
                continue
            cost = cell.episodes.steps * images_per_step(cell) / first
            sys.stdout.write(f"{cell.episodes.steps:,} steps, {cost:.2f} times the training images of the first cell\n")
            sys.stdout.flush()
            try:
                ray_train.fit(cell, group=Path(cell.run.storage).name)
            except (ValueError, OSError, RunFailed) as error:
                raise RunFailed(f"cell {cell.run.name}: {error}") from error


@contextmanager
def _one_ray(cells: list[Config]) -> Iterator[None]:
    """One Ray for all cells, so that it starts once; none if all cells are finished or train in this process."""
    config = cells[0]
    if not config.run.workers or all(finished(cell) for cell in cells):
        yield
        return
    cpus = max(os.cpu_count() or 1, (config.run.max_workers or config.run.workers) * threads_of(config))
    started = ray_cluster.connect(cpus)
    try:
        yield
    finally:
        if started:
            ray_cluster.disconnect()


def cross_evaluate(cells: list[Config]) -> None:
    """Evaluate the network of each cell on the test episodes of all others. Each score is kept in the run's folder."""
    manifest = ensure_manifest(cells[0].data.name, cells[0].data.root, cells[0].data.source)
    bank = open_bank(manifest, "test", cells[0].data.cache)
    for cell in cells:
        missing = [other for other in cells if other.run.name not in cross_scores(cell)]
        if missing:
            _evaluate_on(cell, missing, bank)


def _evaluate_on(cell: Config, others: list[Config], bank: ImageBank) -> None:
    device = device_of(cell)
    model, trained, state = load_model(best(run_of(cell)))
    model.to(device)
    for other in others:
        sys.stdout.write(f"{cell.run.name} on the episodes of {other.run.name}\n")
        sys.stdout.flush()
        episodes = trained.replace(ways=other.episodes.ways, shot=other.episodes.shot)
        result = evaluate(model, bank, episodes, "test", cell.episodes.test_episodes, worker=Worker(device=device))
        score = dataclasses.asdict(result.score) | {"episodes": result.episodes}
        scores = _kept(cell, state.step) | {other.run.name: score}
        write_json(run_of(cell) / CROSS, {"step": state.step, "scores": scores})


def cross_scores(cell: Config) -> dict[str, dict[str, Any]]:
    """Scores of a finished cell's network on the test episodes of the cells, by cell name. Its own is that of result.json."""
    if not finished(cell):
        return {}
    result = read_result(run_of(cell))
    own = {name: result[f"test/{name}"] for name in ("accuracy", "ci95", "episodes")}
    return _kept(cell, result["step"]) | {cell.run.name: own}


def _kept(cell: Config, step: int) -> dict[str, dict[str, Any]]:
    """The scores that were kept for the checkpoint of this step."""
    path = run_of(cell) / CROSS
    kept = read_json(path) if path.exists() else {}
    return dict(kept["scores"]) if kept.get("step") == step else {}
