"""What the sweep's driver does while trials run: it writes their status, prints a table, and keeps their W&B runs open."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
import time
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from lgm_dist.console import percent, table
from lgm_dist.errors import RunFailed
from lgm_dist.runs.folder import read_config
from lgm_dist.runs.sweep_folder import TRIAL, Trial, read_sweep, read_trial, write_trial
from lgm_dist.sweeps.plan import Plan, identify
from lgm_dist.sweeps.ranking import short
from lgm_dist.tracking.mirror import Mirror
from lgm_dist.training.loop import total_steps

REDRAW_SECONDS = {True: 2.0, False: 30.0}
"""Time between two tables: on a terminal, and into a file."""


class Live(tune.Callback):
    """Follows the trials. Ray Tune pickles it with its own state, so W&B runs and threads stay out of the pickle."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._mirrors: dict[int, Mirror] = {}
        self._closing: list[threading.Thread] = []
        self._drawn, self._lines = 0.0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mirrors": {}, "_closing": [], "_drawn": 0.0, "_lines": 0}

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Open the trial's W&B run, which outlives the trial's processes."""
        number, sample = identify(trial.trial_id, trial.config)
        if number in self._mirrors:
            return  # the trial was paused and continues
        run = self._plan.run_of(number)
        run.mkdir(parents=True, exist_ok=True)
        config = self._plan.config_of(number, sample)
        mirror = Mirror(run, config, group=self._plan.name, job_type="trial")
        mirror.__enter__()
        self._mirrors[number] = mirror

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Print the table, if the last one is old enough."""
        self.draw()

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note whether the trial has finished or was stopped."""
        self._end(trial, "")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note that the trial has failed for the last time."""
        self._end(trial, str(trial.get_error()) if trial.get_error() else "its process died")

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        """Close the W&B runs of trials that an interrupt has left unfinished."""
        self.close()

    def close(self) -> None:
        """Close all W&B runs that are still open, as failed."""
        while self._mirrors:
            error = RunFailed("the sweep ended before the trial")
            self._mirrors.popitem()[1].__exit__(RunFailed, error, None)
        for closing in self._closing:
            closing.join()

    def _end(self, trial: TuneTrial, error: str) -> None:
        number, sample = identify(trial.trial_id, trial.config)
        run = self._plan.run_of(number)
        known = read_trial(run) if (run / TRIAL).exists() else Trial(number, run, sample, "failed", error, [])
        status = "failed" if error else status_of_trial(known)
        write_trial(dataclasses.replace(known, status=status, error=_last_line(error)))
        mirror = self._mirrors.pop(number, None)
        if mirror:  # in a thread, because the upload takes seconds and Tune would start no trial meanwhile
            closing = threading.Thread(target=mirror.__exit__, args=(None, None, None))
            closing.start()
            self._closing.append(closing)
        self.draw(force=True)

    def draw(self, force: bool = False) -> None:
        """Print the table of trials; on a terminal, in place of the last one."""
        terminal = sys.stderr.isatty()
        if time.monotonic() - self._drawn < REDRAW_SECONDS[terminal] and not (force and terminal):
            return
        text = live_table(self._plan)
        if terminal and self._lines:
            sys.stderr.write(f"\x1b[{self._lines}F\x1b[J")
        sys.stderr.write(text)
        sys.stderr.flush()
        self._drawn, self._lines = time.monotonic(), text.count("\n")


def status_of_trial(trial: Trial) -> str:
    """finished, or stopped if the trial has not trained to its last step."""
    return "finished" if trial.rows and trial.rows[-1]["step"] >= total_steps(read_config(trial.run)) else "stopped"


def _last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def live_table(plan: Plan) -> str:
    """Status, step, last and best val accuracy, time and sample of every trial so far."""
    trials = read_sweep(plan.path).trials
    header = ("trial", "status", "step", "val accuracy", "best", "minutes", "sample")
    text = table(header, [_row(trial) for trial in trials])
    if sys.stderr.isatty():  # a wrapped line would put the next table in the wrong place
        columns = shutil.get_terminal_size().columns
        text = "".join(line[: columns - 1] + "\n" for line in text.splitlines())
    return f"\n{text}"


def _row(trial: Trial) -> tuple[str, ...]:
    rows, evaluations = trial.rows, trial.evaluations
    return (
        str(trial.number),
        trial.status,
        str(rows[-1]["step"]) if rows else "",
        percent(evaluations[-1]["val/accuracy"], evaluations[-1]["val/ci95"]) if evaluations else "",
        percent(trial.best.val_accuracy, trial.best.val_ci95) if trial.best else "",
        f"{rows[-1]['seconds'] / 60:.1f}" if rows else "",
        ", ".join(f"{path}={short(value)}" for path, value in trial.sample_at().items()),
    )
