"""The copy of a run on Weights & Biases. The process that starts the run sends it; workers never talk to W&B.

metrics.jsonl is the record of a run, and W&B has a copy. `fit`, the driver of a sweep and `lgm-dist replay` follow the file
and send each row once. If that process dies, the next one asks what W&B has and sends the rest. An error of W&B never ends a
training.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lgm_dist.config import Config
from lgm_dist.console import notify
from lgm_dist.report.analysis import ANALYSIS
from lgm_dist.runs.checkpoint import best
from lgm_dist.runs.folder import FACTS, RESULT, read_result
from lgm_dist.runs.metrics import Tail, read_metrics
from lgm_dist.tracking.panels import (
    DONE,
    data_artifact,
    model_artifact,
    panels,
    read_if_there,
    summary,
    use,
    wait,
)
from lgm_dist.tracking.wandb_process import forget_service, held_steps, sentence_of, service_ended, wandb_mode
from lgm_dist.tracking.wandb_run import group_and_job_type, logged_config, open_run, wandb_id

POLL_SECONDS = 1.0
TRIES = 3
"""Number of attempts at anything that W&B fails at."""


class Mirror:
    """Sends a run's rows and facts to its W&B run while it is open, and the rest of the run's folder when it is closed.

    Closed by an exception, it marks the W&B run as failed. The next Mirror of the same folder continues the same W&B run.
    """

    def __init__(self, run: Path, config: Config, group: str = "", job_type: str = "train") -> None:
        self.logged = 0
        """Rows sent by this object."""
        self.failure = ""
        """Why W&B does not have everything, in one sentence; empty if it does."""
        self._run, self._config, self._group, self._job_type = run, config, group, job_type
        self._mode = wandb_mode(config)
        self._wandb: Any = None
        self._held: set[int] | None = None  # steps of the rows that W&B has, once they are known
        self._done = self._last = 0  # the value of DONE on W&B, and the step of the last row that was sent
        self._facts: dict[str, Any] = {}
        self._tail = Tail(run)
        self._service = ""  # the address of W&B's service process
        self._stop = threading.Event()
        self._lock = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Mirror:
        if self._mode != "disabled":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mode == "disabled":
            return
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._guard(lambda: self._close(failed=error is not None))

    def _follow(self) -> None:
        self._guard(self._begin)
        while not self._stop.wait(POLL_SECONDS):
            self._guard(lambda: self._send(self._tail.rows()))

    def _begin(self) -> None:
        wandb_id(self._run)
        self._lock.enter_context(_locked(self._run))

    def _send(self, rows: list[dict[str, Any]]) -> None:
        """Send the rows that W&B does not have. Rows come again after a worker has gone back to a checkpoint."""
        held = self._held_steps()
        if any(row["step"] not in held for row in rows):
            held = self._open()
        for row in rows:
            if row["step"] not in held:
                self._wandb.log(
                    row, step=row["step"]
                )  # wandb holds a row back until the next, so panels can join the last
                self._last = row["step"]
                held.add(self._last)
                self.logged += 1
        self._send_facts()

    def _held_steps(self) -> set[int]:
        """The steps that W&B has. Offline, they are read from its files."""
        if self._held is None:
            steps: list[int] = []
            if self._mode == "offline":
                steps, self._done = held_steps(self._run, wandb_id(self._run))
            self._held = set(steps)
        return self._held

    def _open(self) -> set[int]:
        """Start or resume the W&B run, and return the steps that W&B has. Online, W&B says so at that moment."""
        held = self._held_steps()
        if self._wandb is None:
            self._facts = read_if_there(self._run / FACTS)
            config = logged_config(self._config) | self._facts
            try:
                self._wandb = open_run(self._run, self._config, config, self._group, self._job_type, resume="allow")
            finally:
                self._service = os.environ.get("WANDB_SERVICE", "")
            held.update(range(self._wandb.starting_step))
            self._done = self._done or int(self._wandb.summary.get(DONE) or 0)
        return held

    def _send_facts(self) -> None:
        """Send facts.json if it has changed: rank 0 rewrites it at each start of the workers."""
        facts = read_if_there(self._run / FACTS)
        if self._wandb is not None and facts != self._facts:
            self._wandb.config.update(facts, allow_val_change=True)
            self._facts = facts

    def _close(self, failed: bool) -> None:
        rows = read_metrics(self._run)
        self._send(rows)
        if not failed and (self._run / RESULT).exists():
            self._send_end(read_result(self._run))
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._check({row["step"] for row in rows})

    def _check(self, steps: set[int]) -> None:
        """Raise RuntimeError if rows are missing in W&B's offline files. Online, `finish` raises."""
        if self._mode == "offline":
            lost = steps - set(held_steps(self._run, self._wandb.id)[0])
            if lost:
                raise RuntimeError(f"{len(lost)} of {len(steps)} rows are missing in its files; is the disk full?")

    def _send_end(self, result: dict[str, Any]) -> None:
        """Send panels, data set, checkpoint and result, unless an earlier start has sent them."""
        if self._mode == "offline" and self._done == result[DONE]:
            return
        self._open()
        if self._done == result[DONE]:
            return
        analysis = read_if_there(self._run / ANALYSIS)
        if self._last:
            self._wandb.log(panels(self._run, analysis), step=self._last)
        else:  # W&B already has the last row, and takes no more for that step
            self._wandb.summary.update(panels(self._run, analysis, charts=False))
        if self._facts:
            use(self._wandb, data_artifact(self._facts))
        if (self._run / "checkpoints").exists():
            model = model_artifact(self._wandb.id, self._config, best(self._run), result)
            wait(self._wandb, self._wandb.log_artifact(model, aliases=["best"]))
        self._wandb.summary.update(summary(result))

    def _guard(self, work: Callable[[], None]) -> None:
        """Do `work`, and repeat it if W&B fails. After TRIES failures, report the failure once and give up."""
        if self.failure:
            return
        failure = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(POLL_SECONDS)
            try:
                work()
            except Exception as error:  # wandb raises many kinds, and none may end a training
                failure = sentence_of(error)
                self._reset(attempt > 0 or service_ended(error))
                if isinstance(error, TimeoutError):  # after UPLOAD_SECONDS
                    break
            else:
                return
        self.failure = failure
        notify(
            f"W&B does not have all of {self._run} ({self.failure}); metrics.jsonl does, and `lgm-dist replay {self._run}` "
            "sends the rest"
        )

    def _reset(self, ended: bool) -> None:
        """Close the W&B run, and forget its process if that may have `ended`. The next attempt starts from the beginning."""
        with contextlib.suppress(Exception):
            self._wandb.finish(exit_code=1)
        if ended:
            forget_service(self._service)
        self._wandb, self._tail, self._held, self._done, self._last = None, Tail(self._run), None, 0, 0


def replay(run: Path, config: Config) -> tuple[int, int] | None:
    """Send to W&B what it does not have of a run. Returns how many rows were sent, and how many were there already.

    Returns None if W&B fails, with a sentence on standard error. Raises ValueError for a damaged metrics.jsonl.
    """
    rows = read_metrics(run)
    mirror = Mirror(run, config, *group_and_job_type(run))
    with mirror:
        pass
    return None if mirror.failure else (mirror.logged, len(rows) - mirror.logged)


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold a lock on the run, so that no other process sends the same rows. It ends with the process."""
    with (run / "wandb-id").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError("another process is sending it") from None
        except OSError:
            pass  # a file system without locks
        yield
