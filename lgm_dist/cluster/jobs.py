"""Ray jobs: what `lgm-dist submit` does on a cluster. Imports ray.job_submission, whose client speaks HTTP to the dashboard."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import lgm_dist
from lgm_dist.console import notify, table
from lgm_dist.errors import RunFailed
from lgm_dist.extras import need

PASSED = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "WANDB_BASE_URL", "LGM_DIST_CACHE")
"""Variables that a job gets from here without being asked for."""
KEY = "WANDB_API_KEY"
"""A job gets it only with --env: Ray stores the variables of a job where everybody who reaches its job API can read them."""
STOP_SECONDS = "60"
"""How long Ray waits for a job that it has asked to stop. Its own 3 s are too short for a step and a checkpoint."""
TRAINERS = ("train", "sweep", "grid")
"""Commands that write into --storage and find a data set by its name in --data-root."""


def check_paths(entrypoint: list[str]) -> None:
    """Raise ValueError if a job would write its run into, or look for its data in, the job's temporary folder."""
    if not _trains(entrypoint):
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in {"storage": "runs", "data": "fc100", "data-root": "data", "config": ""}.items():
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default=default)
    flags = parser.parse_known_args(entrypoint)[0]
    _check_path("storage", flags.storage)
    if flags.data.endswith(".json"):
        if "://" not in flags.data:
            _check_path("data", flags.data)
    elif not flags.config:  # a configuration may name the data set
        _check_path("data-root", flags.data_root)


def _trains(entrypoint: list[str]) -> bool:
    """Return True for `lgm-dist train`, `python -m lgm_dist train` and `python scripts/train.py`, and so for sweep and grid."""
    words = [word.rsplit("/", 1)[-1] for word in entrypoint]
    scripts = {f"{name}.py" for name in TRAINERS}
    called = any(first in ("lgm-dist", "lgm_dist") and second in TRAINERS for first, second in pairwise(words))
    return called or not scripts.isdisjoint(words)


def _check_path(name: str, path: str) -> None:
    if not path.startswith("/"):
        fix = f"/shared/{path.rsplit('/', 1)[-1]}" if "://" in path else Path(path).absolute()
        raise ValueError(
            f"{name} ({path}) must be an absolute path that all machines of the cluster share, because the job runs in a "
            f"temporary folder; give --{name} {fix}, for example"
        )


def job_environment(assignments: list[str]) -> dict[str, str]:
    """The variables of a job: those of PASSED that are set here, then K=V, or K with its value here.

    Raises ValueError for a K that is not set.
    """
    from lgm_dist.runs.facts import commit

    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals and name not in os.environ:
            raise ValueError(f"env ({name}) is not set here; give --env {name}=VALUE")
        environment[name] = value if equals else os.environ[name]
    if KEY in os.environ and KEY not in environment:
        notify(f"{KEY} is not passed to the job, where others could read it; --env {KEY} passes it")
    # the uploaded code has no .git to ask for its commit
    return {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, "LGM_DIST_COMMIT": commit()} | environment


def upload_folder() -> Path:
    """What a job runs in a copy of: the checkout that this package runs from, or the current folder if it is installed."""
    root = Path(lgm_dist.__file__).parents[1]
    return root if (root / "pyproject.toml").exists() else Path.cwd()


@contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Turn the errors of Ray and requests into one sentence."""
    need("ray", "ray", "to submit jobs")
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise RunFailed(
            f"the cluster at {address} asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put the token into "
            "~/.ray/auth_token"
        ) from None
    except (ConnectionError, requests.RequestException) as error:
        raise RunFailed(
            f"no answer from the cluster at {address} ({_first_line(error)}); a job there runs on"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def connect(address: str) -> Any:
    """A JobSubmissionClient. Raises ValueError at once if no dashboard of Ray answers at `address`."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 8265), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"address ({address}): no Ray cluster answers there ({error}); start one with `ray start --head`, or give "
            "--address the URL of its dashboard"
        ) from None
    # Ray prefers this variable, and RAY_ADDRESS, to the argument of its client
    os.environ["RAY_API_SERVER_ADDRESS"] = parts.geturl()
    import requests
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.WARNING)  # the client logs each file that it leaves out; errors are exceptions
    try:
        return JobSubmissionClient(parts.geturl())
    except (RuntimeError, KeyError, ValueError, requests.RequestException) as error:
        raise ValueError(
            f"address ({address}): the server there is not the dashboard of a Ray cluster ({_first_line(error)}); give "
            "--address the URL of one"
        ) from None


def submit(client: Any, name: str, entrypoint: list[str], environment: dict[str, str]) -> str:
    """Upload the code and start a job; return its name. Raises RunFailed if the cluster refuses it."""
    job = _free_name(client, name or _name_in(entrypoint))
    runtime_env = {"working_dir": str(upload_folder()), "env_vars": environment}
    try:
        job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env, submission_id=job or None)
    except RuntimeError as error:  # its text ends the traceback of the server
        raise RunFailed(f"the cluster refused job {job!r}: {str(error).strip().splitlines()[-1]}") from None
    return str(job)


def _name_in(entrypoint: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--name", default="")
    return str(parser.parse_known_args(entrypoint)[0].name)


def _free_name(client: Any, name: str) -> str:
    """`name`, or NAME-2, NAME-3 ... if jobs of that name have ended. Raises ValueError while one of them runs."""
    if not name:
        return ""
    jobs = {job.submission_id: job for job in client.list_jobs()}
    job, number = name, 1
    while job in jobs:
        if not jobs[job].status.is_terminal():
            raise ValueError(
                f"name ({name}): job {job} is {jobs[job].status}; end it with --stop {job}, or give another --name"
            )
        number += 1
        job = f"{name}-{number}"
    return job


def _info(client: Any, job: str) -> Any:
    try:
        return client.get_job_info(job)
    except RuntimeError:
        raise ValueError(f"there is no job {job} on {client.get_address()}; --list shows all") from None


def status(client: Any, job: str) -> str:
    """The name, status and message of a job in one line. Raises ValueError if the job does not exist."""
    info = _info(client, job)
    last = (info.message or "").splitlines()[:1]
    return " ".join([job, str(info.status), *last])


def list_jobs(client: Any) -> str:
    """A table of all jobs of the cluster."""
    jobs = sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)
    rows = [
        (job.submission_id, str(job.status), _clock(job.start_time), textwrap.shorten(job.entrypoint, 80))
        for job in jobs
    ]
    return table(("job", "status", "started", "command"), rows)


def _clock(milliseconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((milliseconds or 0) / 1000))


def stop(client: Any, job: str) -> None:
    """Ask a job to stop and wait until it has ended. A job that has ended before is no error."""
    if not _info(client, job).status.is_terminal():
        client.stop_job(job)
    while not _info(client, job).status.is_terminal():
        time.sleep(0.2)


def follow(client: Any, job: str) -> int:
    """Print the logs of a job until it ends; return its exit status."""
    try:
        _info(client, job)
        log: SimpleQueue[str | Exception | None] = SimpleQueue()
        # in a thread, because asyncio and aiohttp swallow a Ctrl-C while they clean up, or answer it with messages of theirs
        threading.Thread(target=_read_logs, args=(client, job, log.put), daemon=True).start()
        while (text := log.get()) is not None:
            if isinstance(text, Exception):
                raise text
            sys.stdout.write(text)
            sys.stdout.flush()
        info = _info(client, job)
    except KeyboardInterrupt:
        raise RunFailed(f"job {job} runs on; --follow {job} shows its logs again, --stop {job} ends it") from None
    sys.stdout.write(f"{job} {info.status}\n")
    return 0 if info.status == "SUCCEEDED" else info.driver_exit_code or 1


def _read_logs(client: Any, job: str, put: Callable[[str | Exception | None], None]) -> None:
    """Put the log of a job piece by piece, then None, or the error that has ended it."""
    try:
        asyncio.run(_tail(client, job, put))
        put(None)
    except Exception as error:
        put(error)


async def _tail(client: Any, job: str, put: Callable[[str], None]) -> None:
    """Put the log as it grows, each character once, also if the connection is lost in between."""
    import aiohttp

    shown = 0
    while True:
        position = 0  # each connection sends the log from its start
        try:
            async for text in client.tail_job_logs(job):
                put(text[max(shown - position, 0) :])
                position += len(text)
                shown = max(shown, position)
        except (RuntimeError, aiohttp.ClientError):
            pass  # proxies close long connections
        if _info(client, job).status.is_terminal():
            put(client.get_job_logs(job)[shown:])
            return
        await asyncio.sleep(1)
