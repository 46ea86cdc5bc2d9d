"""`fit` trains one run: it checks the configuration, starts the training, and draws the result."""

from __future__ import annotations

from pathlib import Path

import torch

from lgm_dist.cluster.connection import prepare_for_ray
from lgm_dist.config import Config
from lgm_dist.console import notify
from lgm_dist.data import open_bank
from lgm_dist.errors import RunFailed
from lgm_dist.extras import need
from lgm_dist.runs import checkpoint
from lgm_dist.runs.announce import describe
from lgm_dist.runs.facts import is_finished
from lgm_dist.runs.folder import RESULT, lock_run
from lgm_dist.runs.job import Job, device_of, make_job
from lgm_dist.runs.progress import Progress
from lgm_dist.runs.record import train_fn
from lgm_dist.runs.stop import STOP, stop_on_signals
from lgm_dist.tracking.mirror import Mirror
from lgm_dist.training.loop import Report, total_steps
from lgm_dist.training.memory import keep_freed_memory
from lgm_dist.training.worker import Worker


def fit(config: Config, group: str = "") -> Path:
    """Train the run that `config` describes and return its folder.

    If the folder exists, training resumes from its last checkpoint. `group` is the W&B group. A finished run's folder holds
    config.json, facts.json, metrics.jsonl, checkpoints/, result.json (test accuracy of the checkpoint with the best val
    accuracy), analysis.json and pictures.

    Raises ValueError for a wrong setting before training starts, OSError if the storage fails for longer than
    `storage_seconds`, and RunFailed if the workers keep failing, the loss is not finite, or SIGTERM or Ctrl-C stops the run.
    """
    job = make_job(config)  # checks everything that can be checked before the start
    run, config = Path(job.run), Config.from_dict(job.config)  # with what the data set decides, such as the channels
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
    """Train to the end, in this process or in Ray Train workers. `report` is called only if training is in this process."""
    config, run = Config.from_dict(job.config), Path(job.run)
    for name in (STOP, RESULT):  # left by an earlier start, which may have had fewer epochs to train
        (run / name).unlink(missing_ok=True)
    with stop_on_signals(run) as listen:
        if config.run.workers:
            prepare_for_ray()  # before Ray is imported, which reads part of its environment then
            from lgm_dist.cluster.trainer import train_with_ray

            train_with_ray(job, listen)
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
