"""What goes wrong in a training, really: a loss that is not finite, and storage that is full, away for a while, or gone."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steps import explain, train_step
from test_train import config, digests, history
from worker_processes import run_workers

from lgm_dist.cluster.fit import train
from lgm_dist.config import Config
from lgm_dist.data import open_bank, sample_episodes
from lgm_dist.errors import RunFailed
from lgm_dist.runs.checkpoint_files import read_meta
from lgm_dist.runs.job import make_job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.record import train_fn
from lgm_dist.runs.stop import STOP, stop_on_signals
from lgm_dist.training.loop import NotFinite, build_network
from lgm_dist.training.schedule import make_optimizer
from lgm_dist.training.worker import Worker


def trained(config: Config) -> Path:
    """The run's folder; `fit` would draw pictures too, which takes longer."""
    job = make_job(config)
    train(job)
    return Path(job.run)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config(tiny, tmp_path_factory.mktemp("whole")))


# Rows that a GPU's worker writes a step late, as one whose device is not called cpu does


def test_late_rows_are_the_rows_also_of_a_run_that_is_stopped_and_resumed(
    whole: Path, tiny: Path, tmp_path: Path
) -> None:
    late, looked = Worker(device="cpu:0"), iter(range(1000))
    job = make_job(config(tiny, tmp_path))
    run = Path(job.run)

    def stop_at_the_third() -> None:
        if next(looked) == 2:
            (run / STOP).touch()

    train_fn(job, replace(late, heartbeat=stop_at_the_third))
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000003"]
    (run / STOP).unlink()
    train_fn(job, late)
    assert history(run) == history(whole)


def test_the_row_before_a_loss_that_is_not_finite_is_there(tiny: Path, tmp_path: Path) -> None:
    job = make_job(config(tiny, tmp_path, lr=1e30))
    with pytest.raises(NotFinite, match="at step 2 "):
        train_fn(job, Worker(device="cpu:0"))
    assert [row["step"] for row in read_metrics(Path(job.run))] == [1]


# A loss that is not finite


def damage(folder: Path, name: str, value: float) -> None:
    """Sets a single weight of a checkpoint, as a run that diverges or a bad memory cell would."""
    state = torch.load(folder / "state.pt", weights_only=True)
    weights = state["model"][name]
    weights[(0,) * weights.dim()] = value
    torch.save(state, folder / "state.pt")
    meta = read_meta(folder)
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    replace(meta, files=meta.files | {"state.pt": digest}).write(folder)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_layer_and_keeps_the_checkpoints(
    whole: Path, tiny: Path, tmp_path: Path
) -> None:
    run = trained(config(tiny, tmp_path, steps_per_epoch=4))
    good = tmp_path / "good"
    shutil.copytree(run / "checkpoints", good)
    damage(run / "checkpoints/step-00000004", "backbone.convs.2.weight", float("inf"))
    before, rows = digests(run), history(run)
    what = r"^at step 5 the output of backbone\.convs\.2 is not finite for train episodes 16 to 19; "
    with pytest.raises(RunFailed, match=what + "the checkpoints step-00000004 are kept; another --name can"):
        trained(config(tiny, tmp_path, steps_per_epoch=4, epochs=3))
    assert digests(run) == before
    assert history(run) == rows

    shutil.rmtree(run / "checkpoints")
    good.rename(run / "checkpoints")
    assert history(trained(config(tiny, tmp_path, steps_per_epoch=4, epochs=3))) == history(whole)
    assert digests(run) == digests(whole)


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("backbone.convs.0.bias", "backbone.convs.0"),
        ("backbone.norms.0.weight", "backbone.norms.0"),
        ("generator.encoder.norms.1.bias", "generator.encoder.norms.1"),
        ("generator.layers.1.w1", "generator.layers.1"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(parameter: str, layer: str, small: Config) -> None:
    model = build_network(small, Worker())
    weights = model.get_parameter(parameter)
    with torch.no_grad():
        weights[(0,) * weights.dim()] = float("nan")
    batch = sample_episodes(open_bank(small.data.name, "train"), small, "train", 0, small.episodes.meta_batch)
    said = explain(model, batch, small, 0, Worker())
    assert said == f"at step 1 the output of {layer} is not finite for train episodes 0 to 3"


def test_a_learning_rate_that_is_far_too_high_ends_the_run(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunFailed, match=r"^at step 2 the output of .* is not finite for train episodes 4 to 7; there is no"
    ):
        trained(config(tiny, tmp_path, lr=1e30))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1]


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(small: Config) -> None:
    model = build_network(small, Worker())
    optimizer, bank = make_optimizer(model, small), open_bank(small.data.name, "train")
    batch = sample_episodes(bank, small, "train", 0, small.episodes.meta_batch)
    train_step(model, optimizer, batch, small, 0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")

    model.generator.encoder.convs[1].weight.register_hook(spoil)  # type: ignore[attr-defined]
    figures = train_step(model, optimizer, batch, small, 1)
    assert torch.isfinite(figures).tolist() == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(torch.equal(v, moments[p][k]) for p, s in optimizer.state.items() for k, v in s.items())
    said = explain(model, batch, small, 1, Worker())
    assert said == "at step 2 the gradient of generator.encoder.convs.1.weight is not finite for train episodes 4 to 7"


def spoiled_slice(worker: Worker, small: Config) -> dict[str, str]:
    """Two of the meta-batch's four episodes are the second worker's; one image of its second is no number."""
    model = build_network(small, worker)
    first, count, _ = worker.slice_of(12 * small.episodes.meta_batch, small.episodes.meta_batch)
    batch = sample_episodes(open_bank(small.data.name, "train"), small, "train", first, count)
    images = batch.images.clone()
    if worker.rank == worker.world_size - 1:
        images[-1, 3, 0, 5, 5] = float("nan")
    return {"said": explain(model, replace(batch, images=images), small, 12, worker)}


def test_workers_agree_on_the_episode_that_is_not_finite(small: Config, tmp_path: Path) -> None:
    expected = {"said": "at step 13 the output of backbone.convs.0 is not finite for train episode 51"}
    assert run_workers(2, tmp_path / "two", spoiled_slice, small) == [expected] * 2
    assert spoiled_slice(Worker(), small) == expected


# Storage


def test_a_stop_that_the_storage_does_not_take_is_asked_for_again(tmp_path: Path) -> None:
    run = tmp_path / "away"
    with stop_on_signals(run):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        run.mkdir()
        end = time.monotonic() + 10
        while not (run / STOP).exists() and time.monotonic() < end:
            time.sleep(0.05)
    assert (run / STOP).exists()


def in_a_process(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Started as `work`, whose OSError is its last words, in the file `said` in the folder that is its first argument."""
    (arguments[0] / "said").touch()
    process = multiprocessing.get_context("fork").Process(target=_speaking, args=(work, *arguments), daemon=True)
    process.start()
    return process


def _speaking(work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    with (folder / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    import sys

    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        work(folder, *arguments)
    except OSError as error:
        sys.stderr.write(f"ended: {error}\n")
        os._exit(1)
    os._exit(0)


def limited(folder: Path, tiny: Path, most: int, seconds: float = math.inf) -> None:
    """From the start of the training on no file gets larger than `most` bytes, as on a disk that is full for `seconds`."""
    job = make_job(config(tiny, folder / "runs", storage_seconds=1 if seconds == math.inf else 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    if seconds < math.inf:
        free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, free)).start()
    train(job)


@pytest.mark.parametrize(
    ("most", "sentence", "rows"),
    [
        (1_000, "File too large", [1, 2, 3]),  # metrics.jsonl
        (
            50_000,
            "the checkpoint of step 4 cannot be written: File too large; the checkpoints before it are whole",
            [4],
        ),
    ],
)
def test_a_full_disk_ends_the_run_in_a_sentence_and_damages_nothing(
    most: int, sentence: str, rows: list[int], whole: Path, tiny: Path, tmp_path: Path
) -> None:
    process = in_a_process(limited, tmp_path, tiny, most)
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1, said
    assert "trying again for 1 s" in said
    assert sentence in said.splitlines()[-1]
    run = tmp_path / "runs/run"
    assert len(read_metrics(run)) in rows
    assert not (run / "result.json").exists()
    assert history(trained(config(tiny, tmp_path / "runs"))) == history(whole)
    assert digests(run) == digests(whole)


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_time(whole: Path, tiny: Path, tmp_path: Path) -> None:
    """The row that it took half of is written on from there."""
    process = in_a_process(limited, tmp_path, tiny, 1_000, 2.0)
    run = tmp_path / "runs/run"
    while process.is_alive() and "trying again" not in (tmp_path / "said").read_text():
        time.sleep(0.01)
    assert not (run / "metrics.jsonl").read_bytes().endswith(b"\n"), "else this shows less"
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert history(run) == history(whole)
    assert digests(run) == digests(whole)


def long(tiny: Path, storage: Path, seconds: int) -> Config:
    return config(tiny, storage, steps_per_epoch=60, eval_every=4, storage_seconds=seconds)


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(long(tiny, tmp_path_factory.mktemp("alone"), 0))


def train_long(folder: Path, tiny: Path, seconds: int) -> None:
    trained(long(tiny, folder / "runs", seconds))


def away_after(process: multiprocessing.process.BaseProcess, storage: Path, steps: int) -> Path:
    """Takes the storage away, as an unmounted disk, once the run has logged so many steps."""
    while process.is_alive() and len(read_metrics(storage / "run")) < steps:
        time.sleep(0.005)
    return storage.rename(storage.with_name("away"))


def test_a_storage_that_is_away_for_a_while_costs_nothing_but_time(alone: Path, tiny: Path, tmp_path: Path) -> None:
    process = in_a_process(train_long, tmp_path, tiny, 30)
    away = away_after(process, tmp_path / "runs", 10)
    time.sleep(2)
    assert process.is_alive()
    assert not (tmp_path / "runs").exists(), "nothing is made where the storage was"
    away.rename(tmp_path / "runs")
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said
    assert "the run's folder has gone" in said
    assert history(tmp_path / "runs/run") == history(alone)
    assert digests(tmp_path / "runs/run") == digests(alone)


def test_a_storage_that_stays_away_ends_the_run_in_a_sentence(alone: Path, tiny: Path, tmp_path: Path) -> None:
    process = in_a_process(train_long, tmp_path, tiny, 1)
    away = away_after(process, tmp_path / "runs", 10)
    process.join(60)
    assert process.exitcode == 1
    said = (tmp_path / "said").read_text().splitlines()
    assert "the run's folder has gone; nothing is made in its place" in said[-1]
    assert not (tmp_path / "runs").exists()
    away.rename(tmp_path / "runs")
    assert history(trained(long(tiny, tmp_path / "runs", 0))) == history(alone)
    assert digests(tmp_path / "runs/run") == digests(alone)
