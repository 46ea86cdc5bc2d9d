"""Training under Ray Train: `fit` checks everything, starts the workers, and each runs `train_fn`."""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lgm_dist.cluster.collectives import make_worker
from lgm_dist.cluster.connection import RayEnded, Watch, connect, disconnect, on_cluster, prepare_for_ray
from lgm_dist.config import Config
from lgm_dist.console import notify
from lgm_dist.data import open_bank
from lgm_dist.errors import RunFailed
from lgm_dist.extras import need
from lgm_dist.runs import checkpoint
from lgm_dist.runs.announce import describe
from lgm_dist.runs.facts import is_finished
from lgm_dist.runs.folder import RESULT, lock_run, retry_writes
from lgm_dist.runs.job import Job, device_of, make_job
from lgm_dist.runs.metrics import METRICS
from lgm_dist.runs.progress import Progress
from lgm_dist.runs.record import train_fn
from lgm_dist.runs.stop import STOP, stop_on_signals
from lgm_dist.tracking.mirror import Mirror
from lgm_dist.training.loop import NotFinite, Report, total_steps
from lgm_dist.training.memory import ONE_ARENA, keep_freed_memory
from lgm_dist.training.worker import Worker

_FOR_EVER = 10**6  # seconds


def fit(config: Config, group: str = "") -> Path:
    """Trains as configured, resuming the run if its folder exists, and returns that folder; `group` is W&B's.

    It then holds config.json, facts.json, metrics.jsonl, checkpoints/, result.json (test accuracy of the checkpoint that was
    best on val), analysis.json and pictures. Raises ValueError for what a user can mend, before Ray starts, OSError for a
    storage that failed for too long, and RunFailed where the workers kept dying, the loss was not finite, or SIGTERM or
    Ctrl-C has ended the run after a checkpoint.
    """
    job = make_job(config)
    run = Path(job.run)
    with lock_run(run):
        if is_finished(run, config):
            notify(
                f"run {run.name!r} is finished after {total_steps(config):,} steps; a larger --epochs trains it further"
            )
            with Mirror(run, config, group):  # sends what an earlier start could not send
                if not is_drawn(run):
                    draw(job)
            return run
        for line in describe(job):
            notify(line)
        with Mirror(run, config, group), stop_on_signals(run):
            with Progress(run, config):
                if config.run.workers:
                    notify("starting Ray Train")
                train(job)
            _check_finished(run)
            draw(job)
    return run


def train(job: Job, report: Report | None = None) -> None:
    """Trains to the end in this process, or in Ray Train workers; only in this process does `report` hear of evaluations."""
    config = Config.from_dict(job.config)
    for name in (STOP, RESULT):  # of an earlier start, which may have had fewer epochs to do
        (Path(job.run) / name).unlink(missing_ok=True)
    with stop_on_signals(Path(job.run)) as listen:
        if config.run.workers:
            _train_with_ray(job, config, listen)
        else:
            keep_freed_memory()
            torch.set_num_threads(job.threads)
            train_fn(job, Worker(device=device_of(config)), report)


def _check_finished(run: Path) -> None:
    """Raise RunFailed if a signal has stopped the run before its last step."""
    if (run / RESULT).exists():
        return
    kept = checkpoint.states_of(run)
    if not kept:
        raise RunFailed("stopped before its first checkpoint; the same command begins again")
    step = list(kept.values())[-1].step
    raise RunFailed(f"stopped with a checkpoint of step {step}; the same command goes on from it")


def is_drawn(run: Path) -> bool:
    """Return True if the pictures are those of the run's result."""
    last = run / "weights.png"
    return last.exists() and last.stat().st_mtime >= (run / RESULT).stat().st_mtime


def draw(job: Job) -> None:
    """Analyse the best checkpoint of a finished run and draw its pictures, or say what is not installed for that."""
    try:
        need("matplotlib", "report", "to draw pictures")
        need("sklearn", "report", "to draw pictures")
    except ValueError as error:
        notify(str(error))
        return
    notify("drawing pictures")
    from lgm_dist.report import plots  # here, because matplotlib takes a second to import
    from lgm_dist.report.analysis import analyse

    run, bank = Path(job.run), open_bank(job.manifest, "val", job.cache)
    analyse(run, bank)
    plots.curves(run)
    plots.episode(run, bank)
    plots.confusion(run)
    plots.weights(run)


def _train_with_ray(job: Job, config: Config, listen: Callable[[], None]) -> None:
    """Trains in a Ray of our own or a cluster's; once more, and in a new Ray of our own, where all but the workers failed."""
    # Ray Train's own limit is for workers that do not even answer it, such as stopped ones; 0 would be none at all
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.run.hang_seconds or _FOR_EVER)
    what = ""
    for attempt in range(config.run.max_failures + 1):
        if attempt:
            notify(f"{what}; training starts again from the last checkpoint")
        what = _fit_with_ray(job, config, listen)
        if not what or (Path(job.run) / STOP).exists():
            return
    raise RunFailed(f"{what}, as often before; the same command goes on from the last checkpoint")


def _fit_with_ray(job: Job, config: Config, listen: Callable[[], None]) -> str:
    """Returns how Ray or Ray Train's controller failed, "" where they did not. Raises RunFailed where the workers did."""
    prepare_for_ray()
    import ray
    from ray.train import ControllerError, WorkerGroupError

    cpus, started = max(os.cpu_count() or 1, (config.run.max_workers or config.run.workers) * job.threads), True
    try:
        started = connect(cpus, dashboard=False)
        listen()  # Ray has set handlers of its own by now
        watch = Watch(partial(_sign_of_life, Path(job.run)), _patience(config))
        failure = _trainer(job, config, started and not on_cluster(), watch).fit().return_value
    except WorkerGroupError as error:
        raise RunFailed(_first_failure(error.worker_failures)) from error
    except (ControllerError, ray.exceptions.RayActorError) as error:
        return f"Ray Train's controller failed ({_one_line(error)})"
    except RayEnded as error:
        started = True  # whoever did: it is over
        return str(error)
    finally:
        if started:
            disconnect()
    if failure:
        raise RunFailed(failure)
    return ""


def _sign_of_life(run: Path) -> object:
    """Changes with each row and each start of workers."""
    try:
        record = (run / METRICS).stat()
    except OSError:
        return None
    return record.st_ino, record.st_size


def _patience(config: Config) -> float:
    """Most seconds between two signs of life of a run whose hung workers are replaced: a step and an evaluation are given
    hang_seconds each, and so is a worker that has been stopped before Ray Train misses it."""
    return 3 * config.run.hang_seconds + 60 if config.run.hang_seconds else 0


def _trainer(job: Job, config: Config, alone: bool, watch: Callable[[], None]) -> Any:
    """`alone`: in a Ray of its own, which ends with it."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback

    from lgm_dist.cluster.rendezvous import OwnAddress
    from lgm_dist.cluster.trainer import Trainer

    class Failures(UserCallback):
        """Says in the controller's output that workers are replaced."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            notify(f"{_first_failure(worker_exceptions)}; the workers start again from the last checkpoint")

    # Ray Train reads it at a start, and fails where a checkpoint that it lists is no longer kept; `restore` needs it not.
    # A storage that is away is waited for here: in its place, Ray Train would make the run's folder anew.
    listed = Path(job.run) / "checkpoints" / "checkpoint_manager_snapshot.json"
    retry_writes(Path(job.run), config.run.storage_seconds, listed.unlink, missing_ok=True)
    gpu = device_of(config) == "cuda"
    return Trainer(
        _ray_worker,
        alone=alone,
        watch=watch,
        train_loop_config=dataclasses.asdict(job),
        scaling_config=ScalingConfig(
            num_workers=(config.run.workers, config.run.max_workers) if config.run.max_workers else config.run.workers,  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker={"CPU": job.threads, **({"GPU": 1} if gpu else {})},
        ),
        # for a worker to meet the others, too, for which it has to load torch
        torch_config=OwnAddress("nccl" if gpu else "gloo", timeout_s=max(60, config.run.hang_seconds or _FOR_EVER)),
        run_config=RunConfig(  # type: ignore[call-arg]  # Ray's annotations show the old class, without logging_config
            name="checkpoints",  # Ray Train's own files lie beside the checkpoints that it is told of
            storage_path=job.run,
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[Failures()],  # type: ignore[list-item]  # as above
            worker_runtime_env={"env_vars": ONE_ARENA},
        ),
    )


def _ray_worker(values: dict[str, Any]) -> str | None:
    """What Ray Train runs in each worker. Returns why the run must not go on, if so."""
    import ray.train
    import ray.train.torch
    from ray.train.v2._internal.execution import context as reporting

    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)  # else a line for each report of each worker
    job, context = Job(**values), ray.train.get_context()
    keep_freed_memory()
    torch.set_num_threads(job.threads)  # Ray starts workers with OMP_NUM_THREADS=1
    heartbeat = partial(_heartbeat, Config.from_dict(job.config).run.hang_seconds)
    device = str(ray.train.torch.get_device())
    try:
        train_fn(job, make_worker(context.get_world_rank(), context.get_world_size(), device, heartbeat), _report)
    except NotFinite as error:  # it would come again
        return str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def _heartbeat(hang_seconds: int) -> None:
    """End this process, after showing where it is, unless it is here again within `hang_seconds` (0: no limit)."""
    if hang_seconds:
        faulthandler.dump_traceback_later(hang_seconds, exit=True, file=2)


def _report(_: int, metrics: dict[str, float], folder: Path | None) -> None:
    import ray.train

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,  # it lies in the run's folder already
    )


def _first_failure(failures: dict[int, Exception]) -> str:
    rank, failure = min(failures.items())
    return f"worker {rank} failed: {_one_line(failure)}"


def _one_line(error: Exception) -> str:
    """The sentence of a text that goes on with details, or comes after a traceback."""
    for cause in ("controller_failure", "health_check_failure"):
        error = getattr(error, cause, error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].startswith("Traceback") else 0]
