"""Training under Ray Train: `fit` checks everything, starts the workers, and each runs `train_fn`."""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lgm_dist import checkpoint, diagnosis
from lgm_dist.cli import RunFailed
from lgm_dist.collectives import SharedMemory, make_all_reduce
from lgm_dist.config import SPLITS, Config
from lgm_dist.data import EpisodeBatch, open_bank, sample_episodes
from lgm_dist.data.device import DeviceSampler
from lgm_dist.engine import Worker, evaluate, make_optimizer, train_step
from lgm_dist.job import RESULT, Job, device_of, make_job, owned, persist, write_facts, write_result
from lgm_dist.memory import ONE_ARENA, keep_freed_memory, peak_memory
from lgm_dist.metrics import MetricsLog
from lgm_dist.model import LGMNet
from lgm_dist.progress import Progress
from lgm_dist.ray_cluster import connect, disconnect, on_cluster
from lgm_dist.tracking import Mirror

STOP = "stop"
"""A file of this name in a run's folder asks its workers to end after their step, with a checkpoint."""

Report = Callable[[int, dict[str, float], Path | None], None]
"""Hears of an evaluation after so many steps and, on rank 0, of its checkpoint's folder."""


def fit(config: Config, group: str = "") -> Path:
    """Trains as configured, resuming the run if its folder exists, and returns that folder; `group` is W&B's.

    It then holds config.json, facts.json, metrics.jsonl, checkpoints/, result.json (test accuracy of the checkpoint that was
    best on val), analysis.json and pictures. Raises ValueError for what a user can mend, before Ray starts, OSError for a
    storage that failed for too long, and RunFailed where the workers kept dying, the loss was not finite, or SIGTERM or
    Ctrl-C has ended the run after a checkpoint.
    """
    job = make_job(config)
    run = Path(job.run)
    with owned(run), Progress(run, config), Mirror(run, config, group):
        train(job)
        if not (run / RESULT).exists():
            state = checkpoint.load_model(checkpoint.newest(run))[2]
            raise RunFailed(f"stopped with a checkpoint of step {state.step}; the same command goes on from it")
        picture(job)
    return run


def train(job: Job, report: Report | None = None) -> None:
    """Trains to the end in this process, or in Ray Train workers; only in this process does `report` hear of evaluations."""
    config = Config.from_dict(job.config)
    for name in (STOP, RESULT):  # of an earlier start, which may have had fewer epochs to do
        (Path(job.run) / name).unlink(missing_ok=True)
    if config.workers:
        _train_with_ray(job, config)
    else:
        keep_freed_memory()
        torch.set_num_threads(job.threads)
        with _stop_on_signals(Path(job.run)):
            train_fn(job, Worker(device=device_of(config)), report)


def picture(job: Job) -> None:
    """Analyses the best checkpoint of a finished run and draws its pictures."""
    from lgm_dist import plots  # here, as matplotlib takes a second of every start
    from lgm_dist.analysis import analyse

    run, bank = Path(job.run), open_bank(job.manifest, "val", job.cache)
    analyse(run, bank)
    plots.curves(run)
    plots.episode(run, bank)
    plots.confusion(run)
    plots.weights(run)


def train_fn(job: Job, worker: Worker, report: Report | None = None) -> None:
    """The training of one worker, top to bottom."""
    config, run = Config.from_dict(job.config), Path(job.run)
    banks = {split: open_bank(job.manifest, split, job.cache) for split in SPLITS}
    model = build_model(config, worker)
    parallel = data_parallel(model, worker)
    sample: Callable[[int, int], EpisodeBatch] = partial(sample_episodes, banks["train"], config, "train")
    if worker.device.startswith("cuda") and config.protocol == "standard":
        sample = DeviceSampler(banks["train"], config, worker.device)
    optimizer = make_optimizer(model, config)
    state = checkpoint.restore(run, model, optimizer)
    written: Callable[..., Any] = partial(persist, run, config.storage_seconds)
    log = written(MetricsLog, run, state.step) if worker.rank == 0 else None
    if log:
        written(write_facts, job, worker, state.step)

    for step in range(state.step, config.steps):
        _not_hung(config)
        start = time.monotonic()
        first, count = worker.slice_of(step * config.meta_batch, config.meta_batch)
        batch = sample(first, count).to(worker.device)
        weight = count * worker.world_size / config.meta_batch  # 1 unless elastic workers have slices of unequal size
        figures = train_step(parallel.train(), optimizer, batch, config, step, weight)
        asked = torch.tensor([float(worker.rank == 0 and (run / STOP).exists())], device=worker.device)
        loss, accuracy, grad_norm, stop = worker.mean(torch.cat([figures, asked])).tolist()
        if not math.isfinite(loss + grad_norm):
            raise NotFinite(diagnosis.explain(model, batch, config, step, worker), run)
        metrics = {"train/loss": loss, "train/accuracy": accuracy, "optim/grad_norm": grad_norm}
        metrics["optim/lr"] = optimizer.param_groups[0]["lr"]
        metrics["speed/episodes_per_s"] = config.meta_batch / (time.monotonic() - start)
        metrics["memory/peak_bytes"] = _peak_memory(worker)
        done, val = step + 1, None
        if done % config.eval_every == 0 or done == config.steps:
            _not_hung(config)
            val = evaluate(model, banks["val"], config.evaluation, "val", config.eval_episodes, worker=worker)
            metrics |= {"val/accuracy": val.score.accuracy, "val/ci95": val.score.ci95}
        if log:  # before the checkpoint: a resumed run drops rows that will come again, but brings no lost one back
            written(log.write, done, metrics)
        if val or stop:
            folder = None
            if worker.rank == 0:
                kept = checkpoint.TrainState.after(done, val)
                folder = written(checkpoint.save, run, kept, model, optimizer, config, val, banks["train"].digest)
            if report:
                report(done, metrics, folder)
        if stop and done < config.steps:
            return

    _not_hung(config)
    test = None
    if config.test_episodes:
        model.load_state_dict(checkpoint.load_model(checkpoint.best(run))[0].state_dict())
        test = evaluate(model, banks["test"], config.evaluation, "test", config.test_episodes, worker=worker)
    memory = worker.gather(_peak_memory(worker))
    if log:
        log.close()
        written(write_result, run, config, test, memory)


class NotFinite(RunFailed):
    """The loss or its gradient is infinite or no number; the weights are those of the last finite step."""

    def __init__(self, what: str, run: Path) -> None:
        kept = [folder.name for folder in checkpoint.states_of(run)]
        where = f"the checkpoints {', '.join(kept)} are kept" if kept else "there is no checkpoint yet"
        super().__init__(f"{what}; {where}; another --name can train with a lower --lr")


def _not_hung(config: Config) -> None:
    """A Ray Train worker that is not here again within config.hang_seconds shows where it is and ends, to be replaced."""
    if config.workers and config.hang_seconds:
        faulthandler.dump_traceback_later(config.hang_seconds, exit=True, file=2)


def build_model(config: Config, worker: Worker) -> LGMNet:
    """The network with the initial weights of config.seed, its normalisation tied to the other workers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LGMNet(config.model)
    model.reduce_over(worker.all_reduce)
    return model.to(worker.device)


def data_parallel(model: LGMNet, worker: Worker) -> nn.Module:
    """The network with its gradients averaged over the workers, if there are several."""
    if worker.world_size == 1:
        return model
    # the buffers are the normalisation's averages, which are equal on all workers by themselves
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
    if isinstance(worker.all_reduce, SharedMemory):
        # torch refuses a hook whose annotations are strings, as they are here
        parallel.register_comm_hook(worker, lambda worker, bucket: _mean(worker, bucket.buffer()))
    return parallel


def _mean(worker: Worker, gradients: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(worker.sum(gradients).div_(worker.world_size))
    return future


def _peak_memory(worker: Worker) -> float:
    """Most bytes that this worker has had in memory so far: on the GPU where it trains on one."""
    on_gpu = worker.device.startswith("cuda")
    return float(torch.cuda.max_memory_allocated() if on_gpu else peak_memory())


@contextmanager
def _stop_on_signals(run: Path) -> Iterator[None]:
    """SIGTERM (`ray job stop`) and the first Ctrl-C end the run after its step with a checkpoint; a second Ctrl-C, at once."""

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and (run / STOP).exists():
            raise KeyboardInterrupt
        (run / STOP).touch()

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_with_ray(job: Job, config: Config) -> None:
    """Trains in a Ray of our own or a cluster's; once more, and in a new Ray of our own, where Ray Train's controller died."""
    # Ray Train's own limit is for workers that do not even answer it, such as stopped ones; 0 would be none at all
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.hang_seconds or 10**9)
    what = ""
    for attempt in range(config.max_failures + 1):
        if attempt:
            sys.stderr.write(
                f"Ray Train's controller failed ({what}); training starts again from the last checkpoint\n"
            )
        what = _fit_with_ray(job, config)
        if not what:
            return
    raise RunFailed(f"Ray Train's controller kept failing ({what}); the same command goes on from the last checkpoint")


def _fit_with_ray(job: Job, config: Config) -> str:
    """Returns how Ray Train's controller failed, "" where it did not. Raises RunFailed where the workers did."""
    started = connect(max(os.cpu_count() or 1, (config.max_workers or config.workers) * job.threads), dashboard=False)
    import ray
    from ray.train import ControllerError, WorkerGroupError

    pool = ThreadPoolExecutor(1)  # not in this thread, where Ray Train would take Ctrl-C for itself
    try:
        alone = started and not on_cluster()
        with _stop_on_signals(Path(job.run)):  # Ray has set handlers of its own by now
            failure = pool.submit(_trainer(job, config, alone).fit).result().return_value
    except WorkerGroupError as error:
        raise RunFailed(_first_failure(error.worker_failures)) from error
    except (ControllerError, ray.exceptions.RayActorError) as error:
        return _one_line(error)
    finally:
        pool.shutdown(wait=False)
        if started:
            disconnect()
    if failure:
        raise RunFailed(failure)
    return ""


def _trainer(job: Job, config: Config, alone: bool) -> Any:
    """`alone`: in a Ray of its own, which ends with it, so that nothing need be cleaned up after a controller that has died."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    helpers = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if alone else ()))

    class Trainer(TorchTrainer):
        """Without its actors for Ray Data, and for a controller that dies, where they have nothing to do."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # Ray's annotations show the old class
            return [callback for callback in callbacks if not isinstance(callback, helpers)]

    class Failures(UserCallback):
        """Says in the controller's output that workers are replaced."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            sys.stderr.write(f"{_first_failure(worker_exceptions)}; the workers start again from the last checkpoint\n")

    # Ray Train reads it at a start, and fails where a checkpoint that it lists is no longer kept; `restore` needs it not.
    (Path(job.run) / "checkpoints" / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    gpu = device_of(config) == "cuda"
    return Trainer(
        _ray_worker,  # type: ignore[arg-type]  # its annotations know nothing of the value that it hands on
        train_loop_config=dataclasses.asdict(job),
        scaling_config=ScalingConfig(
            num_workers=(config.workers, config.max_workers) if config.max_workers else config.workers,  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker={"CPU": job.threads, **({"GPU": 1} if gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(  # type: ignore[call-arg]  # Ray's annotations show the old class, without logging_config
            name="checkpoints",  # Ray Train's own files lie beside the checkpoints that it is told of
            storage_path=job.run,
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[Failures()],  # type: ignore[list-item]  # as above
            worker_runtime_env={"env_vars": ONE_ARENA},
        ),
    )


def _ray_worker(values: dict[str, Any]) -> str | None:
    """What Ray Train runs in each worker; says why the run must not go on, where it must not."""
    import ray.train
    import ray.train.torch
    from ray.train.v2._internal.execution import context as reporting

    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)  # else a line for each report of each worker
    job, context = Job(**values), ray.train.get_context()
    keep_freed_memory()
    torch.set_num_threads(job.threads)  # Ray starts workers with OMP_NUM_THREADS=1
    world_size, device = context.get_world_size(), str(ray.train.torch.get_device())
    rank = context.get_world_rank()
    worker = Worker(rank, world_size, device, make_all_reduce(rank, world_size, device) if world_size > 1 else None)
    try:
        train_fn(job, worker, _report)
    except NotFinite as error:  # which would come again
        return str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


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
