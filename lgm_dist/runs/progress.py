"""What a person sees while a run trains: its phases, a progress bar and the time left, on standard error.

They come from metrics.jsonl, in the process that has started the run, so they are the same for every number of workers.
"""

from __future__ import annotations

import statistics
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from lgm_dist.config import Config
from lgm_dist.console import STANDARD_ERROR, notify
from lgm_dist.runs.metrics import Tail
from lgm_dist.training.tasks import Stage, make_stages
from lgm_dist.training.worker import Worker

_POLL_SECONDS = 0.5
_LOG_SECONDS = 5.0
"""Between two updates of the bar where it is no terminal's: in a file, in the log of a job, in a notebook."""
_WARM_UP, _FEWEST, _FEWEST_SECONDS = 3, 5, 2.0
"""The first steps that tell nothing of the speed; the steps and seconds after them that an estimate takes at least."""


class Progress:
    """While open, names the phases of a run and shows steps, loss, accuracy, speed, last val accuracy and the time left."""

    def __init__(self, run: Path, config: Config) -> None:
        self._config = config
        self._stages = make_stages(config, {}, Worker())
        self._tail = Tail(run)
        self._shown: dict[str, str] = {}
        self._pace = Pace(self._stages)
        self._training = self._testing = False
        self._stop = threading.Event()
        done = self._tail.rows()
        self._bar = tqdm(
            total=self._stages[-1].last,
            initial=done[-1]["step"] if done else 0,  # so that steps of an earlier start do not count as speed
            desc=config.run_name,
            unit="step",
            mininterval=_POLL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS,
            dynamic_ncols=True,
            file=STANDARD_ERROR,  # after an error of write() tqdm would keep its lock and never end
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Progress:
        self._name_phase(self._bar.n)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._update()
        self._update()

    def _update(self) -> None:
        rows = self._tail.rows()
        if not rows:
            return
        for row in rows:
            self._shown |= _in_words(row)
            self._pace.add(row)
        step = rows[-1]["step"]
        if not self._training:
            self._training = True
            notify("training")
        self._bar.initial = min(self._bar.initial, step)
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if estimate := self._pace.estimate():
            notify(estimate)
        self._name_phase(step)

    def _name_phase(self, step: int) -> None:
        """Say once that all steps are taken and the test begins."""
        count = self._config.episodes.test_episodes
        if step >= self._stages[-1].last and count and not self._testing:
            self._testing = True
            notify(f"testing the checkpoint that was best on val, on {count:,} episodes")


class Pace:
    """How fast a run trains, from the rows that this start has added to metrics.jsonl."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._last: dict[str, Any] = {}
        self._steps: list[float] = []
        """Seconds of each step without an evaluation, after the first ones."""
        self._evaluations: list[float] = []
        """Seconds of each evaluation with its step and checkpoint."""
        self._said = 0

    def add(self, row: dict[str, Any]) -> None:
        """Take a row of metrics.jsonl, in their order."""
        if "seconds" in row and row["step"] == self._last.get("step", -1) + 1:
            seconds = row["seconds"] - self._last["seconds"]
            (self._evaluations if "val/accuracy" in row else self._steps).append(seconds)
        self._last = row if "seconds" in row else {}

    def estimate(self) -> str:
        """The time left, in words: once after the first steps and once more after the first evaluation, else empty."""
        steps = self._steps[_WARM_UP:]
        if len(steps) < _FEWEST or sum(steps) < _FEWEST_SECONDS or self._said > bool(self._evaluations):
            return ""
        self._said = 1 + bool(self._evaluations)
        done = self._last["step"]
        left, evaluations = self._stages[-1].last - done, evaluations_after(self._stages, done)
        if not left:
            return ""
        seconds = left * statistics.fmean(steps)
        if self._evaluations:
            counted = f" and {evaluations} evaluations on val" if evaluations != 1 else " and 1 evaluation on val"
            return f"about {duration(seconds + evaluations * self._evaluations[-1])} left: {left:,} steps{counted}"
        return f"about {duration(seconds)} left for {left:,} steps, not counting evaluations"


def evaluations_after(stages: Sequence[Stage], step: int) -> int:
    """Evaluations on val that follow step `step` of the run: every `eval_every` steps of a stage, and at its end."""
    return sum(
        _evaluations(stage.task.steps, stage) - _evaluations(min(max(step - stage.first, 0), stage.task.steps), stage)
        for stage in stages
    )


def _evaluations(steps: int, stage: Stage) -> int:
    """Evaluations within the first `steps` steps of a stage."""
    return steps // stage.task.eval_every + (steps == stage.task.steps and steps % stage.task.eval_every > 0)


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _in_words(row: dict[str, Any]) -> dict[str, str]:
    shown = {}
    if "train/loss" in row:
        shown["loss"] = f"{row['train/loss']:.3f}"
        shown["acc"] = f"{100 * row['train/accuracy']:.1f}%"
    for key, value in row.items():
        if key.startswith("speed/"):
            shown[key.removeprefix("speed/").replace("_per_", "/")] = f"{value:.0f}"
    if "val/accuracy" in row:
        shown["val"] = f"{100 * row['val/accuracy']:.1f}%"
    return shown
