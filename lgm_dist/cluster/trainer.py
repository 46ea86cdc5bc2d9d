"""Ray Train: starts a run's workers, replaces failed ones, and starts again if Ray itself fails."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer

from lgm_dist.cluster.connection import RayEnded, Watch, connect, disconnect, kill_local_ray, on_cluster
from lgm_dist.cluster.ray_internals import LeanTrainer
from lgm_dist.cluster.rendezvous import NoProcessGroup
from lgm_dist.cluster.worker import run_worker
from lgm_dist.config import Config
from lgm_dist.console import notify
from lgm_dist.errors import RunFailed
from lgm_dist.runs.folder import retry_writes
from lgm_dist.runs.job import Job, device_of
from lgm_dist.runs.metrics import METRICS
from lgm_dist.runs.stop import STOP
from lgm_dist.training.memory import ONE_ARENA

_NO_LIMIT_S = 10**6
_POLL_S = 0.5
_UNBLOCK_S = 20.0
"""Seconds in which Ray's calls should fail after all its processes have been killed."""


def train_with_ray(job: Job, listen: Callable[[], None]) -> None:
    """Train in Ray Train workers, in a local Ray or on a cluster.

    If Ray or Ray Train's controller fails, training starts again from the last checkpoint, up to `max_failures` times.
    `listen` sets the signal handlers again after Ray has set its own. Raises RunFailed if the workers fail too often, if
    they cannot go on, or if Ray does.
    """
    config = Config.from_dict(job.config)
    # This limit of Ray Train is for workers that do not answer at all, such as stopped ones. 0 would mean no time.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.run.hang_seconds or _NO_LIMIT_S)
    failure = ""
    for attempt in range(config.run.max_failures + 1):
        if attempt:
            notify(f"{failure}; training starts again from the last checkpoint")
        failure = _train_once(job, config, listen)
        if not failure or (Path(job.run) / STOP).exists():
            return
    raise RunFailed(f"{failure}, as often before; the same command goes on from the last checkpoint")


def _train_once(job: Job, config: Config, listen: Callable[[], None]) -> str:
    """Return how Ray or Ray Train's controller failed, or "" if they did not. Raises RunFailed if the workers failed."""
    cpus, ours = max(os.cpu_count() or 1, (config.run.max_workers or config.run.workers) * job.threads), True
    try:
        ours = connect(cpus, dashboard=False)
        listen()
        watch = Watch(partial(_progress, Path(job.run)), _progress_limit(config))
        result = _fit(_trainer(job, config, alone=ours and not on_cluster()), watch)
    except WorkerGroupError as error:
        raise RunFailed(_first_failure(error.worker_failures)) from error
    except (ControllerError, ray.exceptions.RayActorError) as error:
        return f"Ray Train's controller failed ({_one_line(error)})"
    except RayEnded as error:
        ours = True  # whoever started it, it has ended
        return str(error)
    finally:
        if ours:
            disconnect()
    failure: str | None = result.return_value
    if failure:
        raise RunFailed(failure)
    return ""


def _fit(trainer: TorchTrainer, watch: Callable[[], None]) -> Any:
    """Return trainer.fit(), called in a thread: there it leaves SIGINT alone, and this thread can `watch` Ray meanwhile."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        while not wait([future], timeout=_POLL_S).done:
            watch()
    except BaseException:
        if kill_local_ray():
            wait([future], timeout=_UNBLOCK_S)  # ray.shutdown() should not run under a call of another thread
        raise
    return future.result()


def _trainer(job: Job, config: Config, alone: bool) -> TorchTrainer:
    """Make the trainer. `alone`: in a local Ray that ends with this training."""
    _forget_listed_checkpoints(job, config)
    gpu = device_of(config) == "cuda"
    return LeanTrainer(
        run_worker,
        alone=alone,
        train_loop_config=dataclasses.asdict(job),
        scaling_config=ScalingConfig(
            num_workers=(config.run.workers, config.run.max_workers) if config.run.max_workers else config.run.workers,  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker={"CPU": job.threads, **({"GPU": 1} if gpu else {})},
        ),
        torch_config=NoProcessGroup(),
        run_config=RunConfig(  # type: ignore[call-arg]  # Ray's annotations show the old class, without logging_config
            name="checkpoints",  # Ray Train's own files go beside the checkpoints that are reported to it
            storage_path=job.run,
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[_TellFailures()],  # type: ignore[list-item]  # as above
            worker_runtime_env={"env_vars": ONE_ARENA},
        ),
    )


def _forget_listed_checkpoints(job: Job, config: Config) -> None:
    """Remove Ray Train's list of checkpoints: it fails at the start if one of them is no longer kept.

    Training resumes without the list. If the storage is away, this waits: Ray Train would make the run's folder anew.
    """
    listed = Path(job.run) / "checkpoints" / "checkpoint_manager_snapshot.json"
    retry_writes(Path(job.run), config.run.storage_seconds, listed.unlink, missing_ok=True)


class _TellFailures(UserCallback):
    """Says in the controller's output that the workers are replaced."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        notify(f"{_first_failure(worker_exceptions)}; the workers start again from the last checkpoint")


def _progress(run: Path) -> object:
    """Return a value that changes with each row of metrics.jsonl and with each start of the workers."""
    try:
        record = (run / METRICS).stat()
    except OSError:
        return None
    return record.st_ino, record.st_size


def _progress_limit(config: Config) -> float:
    """Return the longest time in seconds without progress, 0 for no limit.

    A step and an evaluation may take hang_seconds each, and so long it takes Ray Train to notice a stopped worker.
    """
    return 3 * config.run.hang_seconds + 60 if config.run.hang_seconds else 0


def _first_failure(failures: dict[int, Exception]) -> str:
    rank, failure = min(failures.items())
    return f"worker {rank} failed: {_one_line(failure)}"


def _one_line(error: Exception) -> str:
    """Return the first line of an error's text or, if it is a traceback, the last."""
    for cause in ("controller_failure", "health_check_failure"):
        error = getattr(error, cause, error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].startswith("Traceback") else 0]
