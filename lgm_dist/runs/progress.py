"""A progress bar in the process that started the run, fed from metrics.jsonl: the same for every number of workers."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from lgm_dist.config import Config
from lgm_dist.console import STANDARD_ERROR
from lgm_dist.runs.metrics import Tail

_POLL_SECONDS = 0.5


class Progress:
    """While open, shows steps, loss, accuracy, episodes/s, last val accuracy and the time left, on standard error."""

    def __init__(self, run: Path, config: Config) -> None:
        self._tail = Tail(run)
        self._shown: dict[str, str] = {}
        self._stop = threading.Event()
        interval = _POLL_SECONDS if sys.stderr.isatty() else 30.0
        done = self._tail.rows()
        self._bar = tqdm(
            total=config.episodes.steps,
            initial=done[-1]["step"] if done else 0,  # so that steps of an earlier start do not count as speed
            desc=config.run_name,
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
            file=STANDARD_ERROR,  # after an error of write() tqdm would keep its lock and never end
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Progress:
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
        step = rows[-1]["step"]
        self._bar.initial = min(self._bar.initial, step)
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)


def _in_words(row: dict[str, Any]) -> dict[str, str]:
    shown = {}
    if "train/loss" in row:
        shown["loss"] = f"{row['train/loss']:.3f}"
        shown["acc"] = f"{100 * row['train/accuracy']:.1f}%"
        shown["episodes/s"] = f"{row['speed/episodes_per_s']:.0f}"
    if "val/accuracy" in row:
        shown["val"] = f"{100 * row['val/accuracy']:.1f}%"
    return shown
