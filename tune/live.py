"""What happens in the sweep's driver while trials run: their status on disk, a live table, and their W&B runs."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
import time
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from trial import Plan, identify

from lgm_dist.console import table
from lgm_dist.errors import RunFailed
from lgm_dist.runs.folder import read_config
from lgm_dist.runs.sweep_folder import Trial, read_sweep, read_trial, write_trial
from lgm_dist.tracking.mirror import Mirror

REDRAW_SECONDS = {True: 2.0, False: 30.0}
"""Between two tables, on a terminal and into a file."""


class Live(tune.Callback):
    """Hears from Ray Tune of every trial. Pickled with Tune's own state, so it holds plain values until trials run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._mirrors: dict[int, Mirror] = {}
        self._closing: list[threading.Thread] = []
        self._drawn, self._lines = 0.0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mirrors": {}, "_closing": [], "_drawn": 0.0, "_lines": 0}

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Opens the trial's W&B run, which outlives the trial's processes."""
        number, sample = identify(trial.trial_id, trial.config)
        if number in self._mirrors:
            return  # paused and taken up again
        run = self._plan.run_of(number)
        run.mkdir(parents=True, exist_ok=True)
        config = self._plan.config_of(number, sample)
        mirror = Mirror(run, config, group=self._plan.name, job_type="trial")
        mirror.__enter__()
        self._mirrors[number] = mirror

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Draws the table anew, not too often."""
        self.draw()

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Settles whether the trial trained to its end or was stopped."""
        self._end(trial, "")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Its retries are used up."""
        self._end(trial, str(trial.get_error()) if trial.get_error() else "its process died")

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        """Closes W&B runs of trials that an interrupt has left unfinished."""
        self.close()

    def close(self) -> None:
        """Closes all W&B runs; their trials were cut off."""
        while self._mirrors:
            cut_off = RunFailed("the sweep ended before the trial")
            self._mirrors.popitem()[1].__exit__(RunFailed, cut_off, None)
        for closing in self._closing:
            closing.join()

    def _end(self, trial: TuneTrial, error: str) -> None:
        number, sample = identify(trial.trial_id, trial.config)
        run = self._plan.run_of(number)
        ours = read_trial(run) if (run / "trial.json").exists() else Trial(number, run, sample, "failed", error, [])
        status = "failed" if error else status_of_trial(ours)
        write_trial(dataclasses.replace(ours, status=status, error=_last_line(error)))
        mirror = self._mirrors.pop(number, None)
        if mirror:  # sending its end takes seconds, for which Tune would keep a core idle
            closing = threading.Thread(target=mirror.__exit__, args=(None, None, None))
            closing.start()
            self._closing.append(closing)
        self.draw(force=True)

    def draw(self, force: bool = False) -> None:
        """Prints the table of trials; on a terminal over the last one."""
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
    """finished, or stopped before its last step."""
    return "finished" if trial.rows and trial.rows[-1]["step"] >= read_config(trial.run).episodes.steps else "stopped"


def _last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def live_table(plan: Plan) -> str:
    """Every trial so far: status, step, newest and best accuracy, time, sample."""
    sweep = read_sweep(plan.path)
    header = ("trial", "status", "step", "val accuracy", "best", "minutes", "sample")
    text = table(header, [_row(trial) for trial in sweep.trials])
    if sys.stderr.isatty():  # a wrapped line would put the next table in the wrong place
        columns = shutil.get_terminal_size().columns
        text = "".join(line[: columns - 1] + "\n" for line in text.splitlines())
    return f"\n{text}"


def _row(trial: Trial) -> tuple[str, ...]:
    sample = (trial.exploits[-1] if trial.exploits else {"sample": trial.sample})["sample"]
    words = ", ".join(f"{path}={_short(value)}" for path, value in sample.items())
    rows, evaluations = trial.rows, trial.evaluations
    return (
        str(trial.number),
        trial.status,
        str(rows[-1]["step"]) if rows else "",
        _percent(evaluations[-1] if evaluations else None),
        _percent(trial.best),
        f"{rows[-1]['seconds'] / 60:.1f}" if rows else "",
        words,
    )


def _percent(row: dict[str, Any] | None) -> str:
    return f"{100 * row['val/accuracy']:.2f} ± {100 * row['val/ci95']:.2f} %" if row else ""


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
