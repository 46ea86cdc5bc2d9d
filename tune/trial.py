"""One trial of a sweep: an ordinary run whose evaluations Ray Tune is told of, and which goes on where it stopped.

Tune's checkpoint of a trial is a pointer: the run's folder and the step of one of its own checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from spaces import Sample, apply, budgeted, evaluations_of

from lgm_dist.cluster.fit import train
from lgm_dist.config import Config
from lgm_dist.data.lock import exclusive
from lgm_dist.runs import checkpoint
from lgm_dist.runs.folder import CONFIG
from lgm_dist.runs.job import Job, make_job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.sweep_folder import TRIAL, Trial, read_trial, write_trial

POINTER, EXPLOITABLE = "pointer.json", "exploitable"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share. All plain values."""

    folder: str
    base: dict[str, Any]
    scheduler: str

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return Path(self.folder)

    @property
    def name(self) -> str:
        """The sweep's name, which groups its runs on W&B."""
        return self.path.name

    @property
    def perturbation_interval(self) -> int:
        """Evaluations between two exchanges of population-based training."""
        return max(evaluations_of(Config.from_dict(self.base)) // 5, 1)

    def run_of(self, number: int) -> Path:
        """The folder of a trial's run."""
        return self.path / "trials" / f"trial-{number:03d}"

    def config_of(self, number: int, sample: Sample) -> Config:
        """The trial's configuration: the base with its sample, as many training images as the base has.

        Under population-based training all take the base's steps: its trials go on from each other's checkpoints.
        """
        base = Config.from_dict(self.base)
        config = apply(base, sample)
        config = config if self.scheduler == "pbt" else budgeted(base, config)
        run = self.run_of(number)
        return config.replace(name=run.name, storage=str(run.parent))


def identify(trial_id: str, config: dict[str, Any]) -> tuple[int, Sample]:
    """Number and sample of a trial, from what Ray Tune hands it."""
    if "sample" in config:  # drawn before the sweep: Tune's ids count them
        return int(trial_id.rsplit("_", 1)[-1]), dict(config["sample"])
    sample = dict(config)
    return sample.pop("number"), sample


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """What Ray Tune runs: takes the trial up where its folder stands, trains, and reports every evaluation once."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # else a line for each report
    number, sample = identify(tune.get_context().get_trial_id(), config)
    run = plan.run_of(number)
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / ".lock"):  # until a process that a killed driver has left behind is gone
        settings, pointer = plan.config_of(number, sample), _pointer()
        trial = _take_up(run, number, sample, plan)
        if pointer and plan.scheduler == "pbt":
            if pointer["step"] >= settings.episodes.steps:  # a last exchange, after which nothing is trained
                write_trial(dataclasses.replace(trial, status="finished"))
                return
            trial = _go_to(trial, pointer, sample)
        write_trial(trial)
        job, report = make_job(settings), _Reporter(run, settings, plan)
        for row in _evaluations(run):  # those of an earlier start that Tune does not remember
            report(row["step"], row, known=bool(pointer) and row["step"] <= pointer["step"])
        if settings.run.workers:
            _train_and_follow(job, report)
        else:
            train(job, report)
        write_trial(dataclasses.replace(read_trial(run), status="finished"))


def _pointer() -> Any:
    """The checkpoint that Tune has of this trial, None at its first start."""
    known = tune.get_checkpoint()
    if known is None:
        return None
    with known.as_directory() as folder:
        return json.loads((Path(folder) / POINTER).read_text())


def _take_up(run: Path, number: int, sample: Sample, plan: Plan) -> Trial:
    """The trial as its folder has it, or a new one."""
    if not (run / TRIAL).exists():
        return Trial(number, run, sample, "running", "", [])
    trial = dataclasses.replace(read_trial(run), status="running", error="")
    if trial.sample == sample or plan.scheduler == "pbt":
        return trial
    _set_aside(trial, plan)
    return Trial(number, run, sample, "running", "", [])


def _set_aside(trial: Trial, plan: Plan) -> None:
    """Keeps, under a new number, a trial that was begun so shortly before a kill that Tune has drawn another in its place."""
    number = trial.number
    while plan.run_of(number).exists():
        number += 1
    trial.run.rename(plan.run_of(number))
    trial.run.mkdir()
    note = f"began as trial {trial.number}, just before the driver was killed"
    write_trial(dataclasses.replace(trial, number=number, run=plan.run_of(number), status="stopped", error=note))


def _go_to(trial: Trial, pointer: Any, sample: Sample) -> Trial:
    """Puts the run where Tune says, be it another trial's checkpoint; population-based training only."""
    (trial.run / CONFIG).unlink(missing_ok=True)  # Tune may have changed the sample
    source, step = Path(pointer["run"]), pointer["step"]
    if source == trial.run:
        own = trial.run / "checkpoints" / f"step-{step:08d}"
        if own.exists():  # workers may have run ahead of what Tune has heard of
            checkpoint.drop_after(trial.run, step)
        return dataclasses.replace(trial, exploits=[e for e in trial.exploits if e["step"] <= step])
    exploit = {"step": step, "from": read_trial(source).number, "sample": sample}
    if exploit in trial.exploits:
        return trial
    checkpoint.adopt(source / EXPLOITABLE / f"step-{step:08d}", trial.run)
    return dataclasses.replace(trial, exploits=[*trial.exploits, exploit])


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """The run's evaluations whose checkpoint has been written, by step."""
    saved = max((int(folder.name[-8:]) for folder in run.glob("checkpoints/step-*")), default=0)
    return [row for row in read_metrics(run) if "val/accuracy" in row and row["step"] <= saved]


class _Reporter:
    """Tells Ray Tune of evaluations, with a pointer to the checkpoint of each."""

    def __init__(self, run: Path, config: Config, plan: Plan) -> None:
        self._run, self._every, self._plan = run, config.episodes.eval_every, plan
        self._best = -1.0
        self.step = 0
        """Of the newest that was reported."""

    def __call__(self, step: int, metrics: dict[str, Any], _: Path | None = None, known: bool = False) -> None:
        """`known`: Tune has it already."""
        self._best, self.step = max(self._best, metrics["val/accuracy"]), step
        if known:
            return
        figures = {"accuracy": metrics["val/accuracy"], "best": self._best, "ci95": metrics["val/ci95"], "step": step}
        figures["iteration"] = -(-step // self._every)
        if self._plan.scheduler == "pbt":
            self._keep_for_others(step)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / POINTER).write_text(json.dumps({"run": str(self._run), "step": step}))
            tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))

    def _keep_for_others(self, step: int) -> None:
        """Links the checkpoint where another trial finds it even when it is taken up an exchange later."""
        name = f"step-{step:08d}"
        kept = self._run / EXPLOITABLE
        if not (kept / name).exists():
            shutil.copytree(self._run / "checkpoints" / name, kept / name, copy_function=os.link)
        for old in sorted(kept.iterdir())[: -self._plan.perturbation_interval - 1]:
            shutil.rmtree(old)


def _train_and_follow(job: Job, report: _Reporter) -> None:
    """Trains in Ray Train workers; what they evaluate is read from the run's folder."""
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
