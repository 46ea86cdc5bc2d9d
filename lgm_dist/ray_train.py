"""Training under Ray Train: `fit` checks everything, starts the workers, and each runs `train_fn`. The only ray import."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lgm_dist import checkpoint, plots
from lgm_dist.cli import RunFailed
from lgm_dist.config import SPLITS, Config
from lgm_dist.data import check_episodes, open_bank, sample_episodes
from lgm_dist.data.prepare import ensure_manifest
from lgm_dist.engine import Evaluation, Worker, evaluate, make_optimizer, train_step
from lgm_dist.model import LGMNet
from lgm_dist.progress import Progress
from lgm_dist.tracking import Tracker, read_metrics

RESULT = "result.json"
MAY_CHANGE = {
    *("epochs", "workers", "cpus_per_worker", "device", "max_failures"),
    *("data_root", "source", "cache", "name", "storage", "wandb"),
}
"""Fields with which a run may be resumed differently from how it was started."""

RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: every socket of a local Ray on 127.0.0.1
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment instead of making their own with uv
    "RAY_AUTH_MODE": "disabled",  # a local Ray on loopback writes no token into the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the next check
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""For a Ray that `fit` starts itself on this machine; a cluster's own settings are left alone."""

Report = Callable[[dict[str, float], Path | None], None]
"""Tells Ray Train of an evaluation and, on rank 0, of the checkpoint folder."""


@dataclass(frozen=True)
class Job:
    """What a worker is sent: the configuration and absolute places. All plain values."""

    config: dict[str, Any]
    manifest: str
    cache: str
    run: str
    threads: int


def fit(config: Config) -> Path:
    """Trains as configured, resuming the run if its folder exists, and returns that folder.

    It then holds config.json, metrics.jsonl, checkpoints/, result.json (test accuracy of the checkpoint that was best on
    val), curves.png and episode.png. Raises ValueError for what a user can mend, before Ray starts.
    """
    manifest = ensure_manifest(config.data, config.data_root, config.source)
    banks = {split: open_bank(manifest, split, config.cache) for split in SPLITS}
    for split, bank in banks.items():
        check_episodes(config, split, bank.name, bank.counts.tolist(), bank.classes)
    run = _claim(config)
    cache = str(Path(config.cache).absolute()) if config.cache else ""
    manifest = manifest if "://" in manifest else str(Path(manifest).absolute())
    job = Job(config.to_dict(), manifest, cache, str(run), _threads(config))
    with Progress(run, config):
        if config.workers:
            _fit_with_ray(job, config)
        else:
            torch.set_num_threads(job.threads)
            train_fn(job, Worker(device=_device(config)))
    plots.curves(run)
    plots.episode(run, banks["val"])
    return run


def train_fn(job: Job, worker: Worker, report: Report | None = None) -> None:
    """The training of one worker, top to bottom."""
    config, run = Config.from_dict(job.config), Path(job.run)
    banks = {split: open_bank(job.manifest, split, job.cache) for split in SPLITS}
    model = build_model(config, worker)
    parallel = DistributedDataParallel(model) if worker.world_size > 1 else model
    optimizer = make_optimizer(model, config)
    state = checkpoint.restore(run, model, optimizer)
    tracker = Tracker(run, config, state.step, _facts(job, worker)) if worker.rank == 0 else None

    for step in range(state.step, config.steps):
        start = time.monotonic()
        first, count = worker.slice_of(step * config.meta_batch, config.meta_batch)
        batch = sample_episodes(banks["train"], config, "train", first, count).to(worker.device)
        loss, accuracy, grad_norm = worker.mean(train_step(parallel.train(), optimizer, batch, config, step)).tolist()
        metrics = {"train/loss": loss, "train/accuracy": accuracy, "optim/grad_norm": grad_norm}
        metrics["optim/lr"] = optimizer.param_groups[0]["lr"]
        metrics["speed/episodes_per_s"] = config.meta_batch / (time.monotonic() - start)
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            val = evaluate(model, banks["val"], config, "val", config.eval_episodes, worker=worker).score
            metrics |= {"val/accuracy": val.accuracy, "val/ci95": val.ci95}
        if tracker:  # before the checkpoint: a resumed run drops rows that will come again, but brings no lost one back
            tracker.log(done, metrics)
        if "val/accuracy" in metrics:
            state, folder = checkpoint.TrainState(done, val.accuracy, val.ci95), None
            if worker.rank == 0:
                folder = checkpoint.save(run, state, model, optimizer, config)
            if report:
                report(metrics, folder)

    model.load_state_dict(checkpoint.load_model(checkpoint.best(run))[0].state_dict())
    test = evaluate(model, banks["test"], config, "test", config.test_episodes, worker=worker)
    memory = worker.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if tracker:
        tracker.close(_write_result(run, config, test, memory))


def build_model(config: Config, worker: Worker) -> LGMNet:
    """The network with the initial weights of config.seed, its normalisation tied to the other workers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LGMNet(config.model)
    model.reduce_over(worker.all_reduce)
    return model.to(worker.device)


def read_result(run: Path) -> dict[str, Any]:
    """The result.json of a finished run."""
    result: dict[str, Any] = json.loads((run / RESULT).read_text())
    return result


def _claim(config: Config) -> Path:
    """The run's folder, made or taken up again. Refuses one that was started with another configuration."""
    run = Path(config.storage).absolute() / config.run_name
    run.mkdir(parents=True, exist_ok=True)
    path, ours = run / "config.json", config.to_dict()
    if path.exists():
        theirs = json.loads(path.read_text())
        for name in ours:
            if name not in MAY_CHANGE and theirs.get(name) != ours[name]:
                raise ValueError(
                    f"run {config.run_name!r} was started with {name} {theirs.get(name)!r}, not {ours[name]!r}; "
                    f"give another --name, or delete {run}"
                )
    path.write_text(json.dumps(ours, indent=1) + "\n")
    return run


def _write_result(run: Path, config: Config, test: Evaluation, memory: list[float]) -> dict[str, float]:
    chosen = checkpoint.load_model(checkpoint.best(run))[2]
    result = {
        "protocol": config.protocol,
        "ways": config.ways,
        "shot": config.shot,
        "test/accuracy": test.score.accuracy,
        "test/ci95": test.score.ci95,
        "test/episodes": test.episodes,
        "val/accuracy": chosen.val_accuracy,
        "val/ci95": chosen.val_ci95,
        "step": chosen.step,
        "train/steps": config.steps,
        "train/episodes": config.steps * config.meta_batch,
        "train/seconds": max(row["seconds"] for row in read_metrics(run)),
        "memory/peak_bytes": max(memory),
    }
    (run / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return {name: value for name, value in result.items() if isinstance(value, float)}


def _facts(job: Job, worker: Worker) -> dict[str, Any]:
    """What W&B shows beside the configuration."""
    return {
        "manifest": job.manifest,
        "world_size": worker.world_size,
        "threads": job.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "device": torch.cuda.get_device_name() if worker.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
    }


def _device(config: Config) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _threads(config: Config) -> int:
    """torch threads of a worker: its CPUs; in this process, what the caller or OMP_NUM_THREADS has set."""
    if config.cpus_per_worker:
        return config.cpus_per_worker
    return max((os.cpu_count() or 1) // config.workers, 1) if config.workers else torch.get_num_threads()


def _fit_with_ray(job: Job, config: Config) -> None:
    started = _connect(config, job)
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = _device(config) == "cuda"
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=dataclasses.asdict(job),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": job.threads, **({"GPU": 1} if gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(  # type: ignore[call-arg]  # Ray's annotations show the old class, without logging_config
            name="checkpoints",  # Ray Train's own files lie beside the checkpoints that it is told of
            storage_path=job.run,
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise RunFailed(_first_failure(error)) from error
    finally:
        if started:
            ray.shutdown()


def _connect(config: Config, job: Job) -> bool:
    """Joins the cluster of RAY_ADDRESS, else starts a local Ray unless this process has one. True if it is ours to end."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return False
    if "RAY_ADDRESS" not in os.environ:
        start_local_ray(max(os.cpu_count() or 1, config.workers * job.threads))
    else:
        import ray

        ray.init()
    return True


def start_local_ray(cpus: int) -> None:
    """Starts a Ray of this process, on this machine, listening on loopback only."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # before Ray is imported, which reads some of them then
    import ray

    # With its dashboard, on loopback too: Ray Train's cleaner asks it for the controller's state every second.
    ray.init(
        "local", num_cpus=cpus, object_store_memory=200 * 2**20, include_dashboard=True, logging_level=logging.ERROR
    )


def _ray_worker(values: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import ray.train
    import ray.train.torch
    from ray.train.v2._internal.execution import context as reporting

    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)  # else a line for each report of each worker
    job, context = Job(**values), ray.train.get_context()
    torch.set_num_threads(job.threads)  # Ray starts workers with OMP_NUM_THREADS=1
    world_size, device = context.get_world_size(), str(ray.train.torch.get_device())
    train_fn(job, Worker(context.get_world_rank(), world_size, device, all_reduce if world_size > 1 else None), _report)


def all_reduce(x: Tensor) -> None:
    """Sums `x` over the workers of the process group, in place."""
    torch.distributed.all_reduce(x)


def _report(metrics: dict[str, float], folder: Path | None) -> None:
    import ray.train

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,  # it lies in the run's folder already
    )


def _first_failure(error: Any) -> str:
    rank, failure = min(error.worker_failures.items())
    return f"worker {rank} failed: {failure}"
