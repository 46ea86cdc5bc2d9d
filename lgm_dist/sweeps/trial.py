"""One trial of a sweep: an ordinary run that resumes from its folder and reports its evaluations to Ray Tune.

Tune's checkpoint of a trial is a pointer to one of the run's own checkpoints: the run's folder and the step.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from ray import tune

from lgm_dist.cluster.fit import train
from lgm_dist.config import Config
from lgm_dist.data.lock import exclusive
from lgm_dist.runs import checkpoint
from lgm_dist.runs.checkpoint_files import folder_name, step_of
from lgm_dist.runs.files import read_json
from lgm_dist.runs.folder import CONFIG
from lgm_dist.runs.job import Job, make_job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.sweep_folder import TRIAL, Trial, read_trial, write_trial
from lgm_dist.sweeps.plan import Plan, identify
from lgm_dist.sweeps.spaces import Sample
from lgm_dist.training.loop import total_steps

POINTER, EXPLOITABLE = "pointer.json", "exploitable"
POLL_SECONDS = 0.2


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """Train one trial from where its folder stands, and report each evaluation once. Ray Tune calls it."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # otherwise it prints a line for each report
    number, sample = identify(tune.get_context().get_trial_id(), config)
    run = plan.run_of(number)
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / ".lock"):  # a killed driver may have left a process that still trains this trial
        settings, pointer = plan.config_of(number, sample), _pointer()
        trial = _load(run, number, sample, plan)
        if pointer and plan.scheduler == "pbt":
            if pointer["step"] >= total_steps(settings):  # an exploit after the last step: nothing is left to train
                write_trial(dataclasses.replace(trial, status="finished"))
                return
            trial = _go_to(trial, pointer, sample)
        write_trial(trial)
        job, report = make_job(settings), _Reporter(run, settings, plan)
        known = pointer["step"] if pointer else 0
        for row in _evaluations(run):  # evaluations of an earlier start that Tune may not know
            report(row["step"], row, known=row["step"] <= known)
        if settings.run.workers:
            _train_and_follow(job, report)
        else:
            train(job, report)
        write_trial(dataclasses.replace(read_trial(run), status="finished"))


def _pointer() -> dict[str, Any] | None:
    """Tune's checkpoint of this trial; None at its first start."""
    known = tune.get_checkpoint()
    if known is None:
        return None
    with known.as_directory() as folder:
        return read_json(Path(folder) / POINTER)


def _load(run: Path, number: int, sample: Sample, plan: Plan) -> Trial:
    """The trial in the folder `run`, or a new one."""
    if not (run / TRIAL).exists():
        return Trial(number, run, sample, "running", "", [])
    trial = dataclasses.replace(read_trial(run), status="running", error="")
    if trial.sample == sample or plan.scheduler == "pbt":
        return trial
    _set_aside(trial, plan)
    return Trial(number, run, sample, "running", "", [])


def _set_aside(trial: Trial, plan: Plan) -> None:
    """Give a new number to a trial that Tune does not know: it started just before a kill, and Tune has drawn another."""
    number = trial.number
    while plan.run_of(number).exists():
        number += 1
    trial.run.rename(plan.run_of(number))
    trial.run.mkdir()
    note = f"started as trial {trial.number}, just before the driver was killed"
    write_trial(dataclasses.replace(trial, number=number, run=plan.run_of(number), status="stopped", error=note))


def _go_to(trial: Trial, pointer: dict[str, Any], sample: Sample) -> Trial:
    """Set the run to the checkpoint that Tune names, its own or another trial's. For population-based training."""
    (trial.run / CONFIG).unlink(missing_ok=True)  # Tune may have changed the sample
    source, step = Path(pointer["run"]), pointer["step"]
    if source == trial.run:
        if (trial.run / "checkpoints" / folder_name(step)).exists():  # workers may be ahead of what Tune knows
            checkpoint.drop_after(trial.run, step)
        return dataclasses.replace(trial, exploits=[e for e in trial.exploits if e["step"] <= step])
    exploit = {"step": step, "from": read_trial(source).number, "sample": sample}
    if exploit in trial.exploits:
        return trial
    checkpoint.adopt(source / EXPLOITABLE / folder_name(step), trial.run)
    return dataclasses.replace(trial, exploits=[*trial.exploits, exploit])


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """The run's evaluations that have a checkpoint or a later one, by step."""
    saved = max((step_of(folder) or 0 for folder in run.glob("checkpoints/step-*")), default=0)
    return [row for row in read_metrics(run) if "val/accuracy" in row and row["step"] <= saved]


class _Reporter:
    """Reports evaluations to Ray Tune, each with a pointer to its checkpoint."""

    def __init__(self, run: Path, config: Config, plan: Plan) -> None:
        self._run, self._every, self._plan = run, config.episodes.eval_every, plan
        self._best = -1.0
        self.step = 0
        """Step of the last reported evaluation."""

    def __call__(self, step: int, metrics: dict[str, Any], _: Path | None = None, known: bool = False) -> None:
        """Report an evaluation, unless Tune knows it already. A checkpoint without an evaluation is left out."""
        if "val/accuracy" not in metrics:
            return
        self._best, self.step = max(self._best, metrics["val/accuracy"]), step
        if known:
            return
        values = {"accuracy": metrics["val/accuracy"], "best": self._best, "ci95": metrics["val/ci95"], "step": step}
        values["iteration"] = -(-step // self._every)
        if self._plan.scheduler == "pbt":
            self._keep_for_others(step)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / POINTER).write_text(json.dumps({"run": str(self._run), "step": step}))
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))

    def _keep_for_others(self, step: int) -> None:
        """Keep hard links to the checkpoint, which another trial may need one exploit later than this run does."""
        kept, name = self._run / EXPLOITABLE, folder_name(step)
        if not (kept / name).exists():
            shutil.copytree(self._run / "checkpoints" / name, kept / name, copy_function=os.link)
        for old in sorted(kept.iterdir())[: -self._plan.perturbation_interval - 1]:
            shutil.rmtree(old)


def _train_and_follow(job: Job, report: _Reporter) -> None:
    """Train in Ray Train workers, and report the evaluations that appear in the run's folder."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            train(job)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    alive = True
    while alive:
        thread.join(POLL_SECONDS)
        alive = thread.is_alive()
        for row in _evaluations(Path(job.run)):
            if row["step"] > report.step:
                report(row["step"], row)
    if failures:
        raise failures[0]
