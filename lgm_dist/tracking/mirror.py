"""Weights & Biases, mirrored from a run's folder by a process that is none of its workers. Imports wandb, as panels does.

metrics.jsonl is the record and W&B a copy of it. Whoever starts a run (`fit`, a sweep's driver, scripts/wandb_replay.py)
follows its files and sends each row once, whatever dies: what W&B has lost with the process that sent it is sent again by
the next one, which first asks what is there. Nothing that goes wrong with W&B ends a training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lgm_dist.config import Config
from lgm_dist.console import leak_note, notify
from lgm_dist.report.analysis import ANALYSIS
from lgm_dist.runs.checkpoint import best
from lgm_dist.runs.folder import FACTS, RESULT, read_result
from lgm_dist.runs.metrics import Tail, read_metrics
from lgm_dist.runs.sweep_folder import SWEEP, TRIAL
from lgm_dist.tracking.panels import (
    DONE,
    UPLOAD_SECONDS,
    data_artifact,
    evaluation,
    model_artifact,
    panels,
    read_json,
    summary,
    use,
    wait,
)
from lgm_dist.tracking.wandb_process import forget_service, held_steps, leave_service, service_ended, wandb_mode

POLL_SECONDS = 1.0
TRIES = 3
"""How often in a row something is tried that W&B fails at."""


class Mirror:
    """While open, sends a run's rows and facts to its one W&B run as they come; when left, all else that the folder holds.

    Left by an exception, the W&B run is marked as failed; the next Mirror of the same folder goes on with it.
    """

    def __init__(self, run: Path, config: Config, group: str = "", job_type: str = "train") -> None:
        self.logged = 0
        """Rows sent by this object."""
        self.failure = ""
        """Why W&B does not hold everything, in one sentence."""
        self._run, self._config, self._group, self._job_type = run, config, group, job_type
        self._mode = wandb_mode(config)
        self._wandb: Any = None
        self._held: set[int] | None = None  # steps of the rows that W&B holds, once they are known
        self._done = self._last = 0  # its DONE, and the row that was logged last
        self._facts: dict[str, Any] = {}
        self._tail = Tail(run)
        self._service = ""  # W&B's own process
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
        _wandb_id(self._run)
        self._lock.enter_context(_locked(self._run))

    def _send(self, rows: list[dict[str, Any]]) -> None:
        """Logs the rows that W&B does not hold; rows come again where a worker went back to a checkpoint."""
        held = self._recall()
        if any(row["step"] not in held for row in rows):
            held = self._open()
        for row in rows:
            if row["step"] not in held:
                self._wandb.log(row, step=row["step"])  # kept back until the next: the panels join the last one
                self._last = row["step"]
                held.add(self._last)
                self.logged += 1
        self._send_facts()

    def _recall(self) -> set[int]:
        """The steps that W&B holds, of which it says nothing offline: there they are read from its files."""
        if self._held is None:
            steps: list[int] = []
            if self._mode == "offline":
                steps, self._done = held_steps(self._run, _wandb_id(self._run))
            self._held = set(steps)
        return self._held

    def _open(self) -> set[int]:
        """Starts the W&B run or takes it up again; online, W&B says what it holds. Returns the steps that it holds."""
        held = self._recall()
        if self._wandb is None:
            self._facts = read_json(self._run / FACTS)
            config = logged_config(self._config) | self._facts
            try:
                self._wandb = _init(self._run, self._config, config, self._group, self._job_type, resume="allow")
            finally:
                self._service = os.environ.get("WANDB_SERVICE", "")
            held.update(range(self._wandb.starting_step))
            self._done = self._done or int(self._wandb.summary.get(DONE) or 0)
        return held

    def _send_facts(self) -> None:
        """Rank 0 writes them anew at each start of the workers."""
        facts = read_json(self._run / FACTS)
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
        """Offline, W&B does not say what it could not write; online, `finish` does."""
        if self._mode == "offline":
            lost = steps - set(held_steps(self._run, self._wandb.id)[0])
            if lost:
                raise RuntimeError(f"{len(lost)} of {len(steps)} rows are not in its files; is the disk full?")

    def _send_end(self, result: dict[str, Any]) -> None:
        """Panels with the last row, the data set and the checkpoint, and the result, unless an earlier start has sent them."""
        if self._mode == "offline" and self._done == result[DONE]:
            return
        self._open()
        if self._done == result[DONE]:
            return
        analysis = read_json(self._run / ANALYSIS)
        if self._last:
            self._wandb.log(panels(self._run, analysis), step=self._last)
        else:  # the last row is W&B's already and takes nothing more
            self._wandb.summary.update(panels(self._run, analysis, charts=False))
        if self._facts:
            use(self._wandb, data_artifact(self._facts))
        if (self._run / "checkpoints").exists():
            model = model_artifact(self._wandb.id, self._config, best(self._run), result)
            wait(self._wandb, self._wandb.log_artifact(model, aliases=["best"]))
        self._wandb.summary.update(summary(result))

    def _guard(self, work: Callable[[], None]) -> None:
        """Does `work`, anew where W&B fails; where it fails again and again, says so once and leaves it at that."""
        if self.failure:
            return
        failure = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(POLL_SECONDS)
            try:
                work()
            except Exception as error:  # of a dozen kinds, and none may end a training
                failure = _sentence(error)
                self._renew(attempt > 0 or service_ended(error))
                if isinstance(error, TimeoutError):  # after UPLOAD_SECONDS
                    break
            else:
                return
        self.failure = failure
        notify(
            f"W&B does not hold all of {self._run} ({self.failure}); metrics.jsonl does, and "
            f"`python scripts/wandb_replay.py {self._run}` sends the rest"
        )

    def _renew(self, ended: bool) -> None:
        """Leaves the W&B run, and its process if that may have `ended`: the next try starts anew and sends all that is lost."""
        with contextlib.suppress(Exception):
            self._wandb.finish(exit_code=1)
        if ended:
            forget_service(self._service)
        self._wandb, self._tail, self._held, self._done, self._last = None, Tail(self._run), None, 0, 0


def replay(run: Path, config: Config) -> tuple[int, int] | None:
    """Sends to W&B what it does not hold of a run; how many rows were sent and how many were there.

    None where W&B failed, which standard error says. Raises ValueError for a damaged metrics.jsonl.
    """
    rows = read_metrics(run)
    mirror = Mirror(run, config, *place(run))
    with mirror:
        pass
    return None if mirror.failure else (mirror.logged, len(rows) - mirror.logged)


def place(run: Path) -> tuple[str, str]:
    """Group and job type of a run on W&B: its sweep's name and trial; its grid's, if any, and train."""
    if not (run / TRIAL).exists():
        above = run.absolute().parent
        return above.name if (above / "table.json").exists() else "", "train"
    return str(read_json(run.absolute().parents[1] / SWEEP).get("name", "")), "trial"


def logged_config(config: Config) -> dict[str, Any]:
    """The settings as W&B shows them: by flag name, those of the network in a dictionary of their own."""
    flat = {name: value for name, value in config.flat().items() if "." not in name}
    return flat | {"model": dataclasses.asdict(config.model)}


def log_evaluation(config: Config, checkpoint: Path, data: str, results: list[dict[str, Any]]) -> None:
    """A W&B run of its own, of job type evaluate, for a grid of evaluations of a run's checkpoint; config.run.wandb says where.

    `results` are those of scripts/evaluate.py's JSON, `data` the data set's name. A failure of W&B is one sentence on
    standard error.
    """
    if wandb_mode(config) == "disabled":
        return
    try:
        _log_evaluation(checkpoint.absolute().parents[1], config, checkpoint, data, results)
    except Exception as error:
        notify(f"W&B does not hold this evaluation ({_sentence(error)}); the JSON file does")


def _log_evaluation(run: Path, config: Config, checkpoint: Path, data: str, results: list[dict[str, Any]]) -> None:
    group = place(run)[0] or config.run_name
    values = logged_config(config) | read_json(run / FACTS)
    tracked = _init(run, config, values, group, "evaluate", id=secrets.token_hex(6))
    table, cells = evaluation(data, results)
    tracked.log({"evaluation": table})
    tracked.summary.update(cells)
    use(tracked, model_artifact(_wandb_id(run), config, checkpoint, {}))
    tracked.finish()


def _init(run: Path, config: Config, values: dict[str, Any], group: str, job_type: str, **more: Any) -> Any:
    leave_service()
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # its lines on standard error know nothing of a run's own settings
    tracked = wandb.init(
        **{"id": _wandb_id(run), **more},
        project=os.environ.get("WANDB_PROJECT", "lgm_dist"),
        dir=run,
        name=config.run_name,
        group=group or None,
        job_type=job_type,
        config=values,
        notes=leak_note(config.episodes.protocol) or None,
        mode=wandb_mode(config),  # type: ignore[arg-type]
        allow_val_change=True,
        reinit="create_new",  # a sweep's driver holds several at once
        settings=wandb.Settings(console="off", silent=True, finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True),
    )
    tracked.define_metric("step")
    for glob in ("train/*", "val/*", "optim/*", "speed/*", "memory/*", "seconds"):
        tracked.define_metric(glob, step_metric="step")
    tracked.define_metric("val/accuracy", step_metric="step", summary="max")
    return tracked


def _wandb_id(run: Path) -> str:
    """The run's W&B id, drawn at its first start: a run that is resumed goes on as the same one."""
    path = run / "wandb-id"
    if not path.exists() or not path.read_text().strip():
        path.write_text(secrets.token_hex(6) + "\n")
    return path.read_text().strip()


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Two processes that mirror the same run would send rows twice; ends with the process, however that ends."""
    with (run / "wandb-id").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError("another process is sending it") from None
        except OSError:
            pass  # a file system without locks
        yield


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
