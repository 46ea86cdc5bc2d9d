"""Runs a script of this repository as a Ray job on a cluster: uploads the code, shows the logs, hands on the exit status."""

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
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from lgm_dist.console import run_command, table
from lgm_dist.errors import RunFailed

ROOT = Path(__file__).parents[1]
ADDRESS = "http://127.0.0.1:8265"
PASSED = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "WANDB_BASE_URL", "LGM_DIST_CACHE")
"""Variables that reach the job from here without being asked for."""
KEY = "WANDB_API_KEY"
"""Reaches it only where --env asks for it: Ray keeps a job's variables where whoever reaches its job API reads them."""
STOP_SECONDS = "60"
"""How long Ray waits for a job that it has asked to stop; its own 3 s are too short for a step and a checkpoint."""
TRAINERS = ("train.py", "sweep.py", "grid.py")
"""Scripts that leave something behind under --storage and find their data by name under --data-root."""
EPILOG = f"""
examples:
  scripts/submit.py -- python scripts/train.py --data fc100 --data-root /shared/data --storage /shared/runs --name first
  scripts/submit.py --stop first

The job runs on the cluster in a copy of this repository without data, runs and tests, so its paths must be absolute and the
same on all machines. The same train.py --name and --storage go on where the run stopped. Ctrl-C leaves the job running.
It gets what --env says and, where they are set here,
  {", ".join(PASSED)}.
Ray keeps them in plain text: with the job, for whoever reaches the cluster's job API, and in runtime_env_agent.log. So
{KEY} stays here: give it to the cluster's nodes, or pass it with --env {KEY} where nobody else reaches the cluster.
"""


def main(argv: list[str]) -> None:
    """Does what is asked for; ends with the job's exit status where it follows one."""
    flags = _parser().parse_args(argv)
    asked = [flags.stop, flags.status, flags.follow, flags.list, flags.entrypoint]
    if sum(map(bool, asked)) != 1:
        raise ValueError(
            "give one of --stop, --status, --follow, --list, or `-- python scripts/train.py …`; see --help"
        )
    if flags.entrypoint:
        check_paths(flags.entrypoint)
        environment = environment_of(flags.env)
    with _sentences(flags.address):
        client = _connect(flags.address)
        if flags.list:
            sys.stdout.write(_list(client))
        elif flags.status:
            sys.stdout.write(f"{_status(client, flags.status)}\n")
        elif flags.stop:
            _stop(client, flags.stop)
        else:
            job = flags.follow or _submit(client, flags.name, flags.entrypoint, environment)
            if not flags.no_wait:
                sys.exit(_follow(client, job))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    parser.add_argument("--address", default=address, help="URL of the cluster's dashboard (default: %(default)s)")
    parser.add_argument(
        "--name", default="", help="name of the job (default: the --name in its command, else one of Ray's)"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="K[=V]", help="a variable for the job; K alone: as here"
    )
    parser.add_argument("--no-wait", action="store_true", help="submit, and do not follow the job")
    parser.add_argument("--follow", metavar="JOB", help="show the logs of a job and hand on its exit status")
    parser.add_argument(
        "--stop", metavar="JOB", help=f"end a job; training has {STOP_SECONDS} s for its last checkpoint"
    )
    parser.add_argument("--status", metavar="JOB", help="print the status of a job")
    parser.add_argument("--list", action="store_true", help="print all jobs of the cluster")
    parser.add_argument("entrypoint", nargs="*", metavar="-- COMMAND", help="what the job runs")
    return parser


def check_paths(entrypoint: list[str]) -> None:
    """Raises ValueError where a trainer's command would leave its run, or look for its data, in the job's temporary folder."""
    if not any(word.rsplit("/", 1)[-1] in TRAINERS for word in entrypoint):
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in {"storage": "runs", "data": "fc100", "data-root": "data", "config": ""}.items():
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default=default)
    flags = parser.parse_known_args(entrypoint)[0]
    _check_path("storage", flags.storage)
    if flags.data.endswith(".json"):
        if "://" not in flags.data:
            _check_path("data", flags.data)
    elif not flags.config:  # which may say where data lies
        _check_path("data-root", flags.data_root)


def _check_path(name: str, path: str) -> None:
    if not path.startswith("/"):
        fix = f"/shared/{path.rsplit('/', 1)[-1]}" if "://" in path else Path(path).absolute()
        raise ValueError(
            f"{name} ({path}) must be an absolute path that all machines of the cluster share, since the job runs in a "
            f"temporary copy of this repository; give --{name} {fix}, say"
        )


def environment_of(assignments: list[str]) -> dict[str, str]:
    """The job's variables: those of PASSED that are set here, and K=V, or K with its value here.

    Raises ValueError for a K that is not set.
    """
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals and name not in os.environ:
            raise ValueError(f"env ({name}) is not set here; give --env {name}=VALUE")
        environment[name] = value if equals else os.environ[name]
    if KEY in os.environ and KEY not in environment:
        sys.stderr.write(f"{KEY} is not passed to the job, where others could read it; --env {KEY} passes it\n")
    ours = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, "LGM_DIST_COMMIT": _commit()}
    return ours | environment


def _commit() -> str:
    """The commit of what is uploaded, which has no .git to ask."""
    from lgm_dist.runs.facts import commit

    return commit()


@contextmanager
def _sentences(address: str) -> Iterator[None]:
    """Ray's and requests' errors as one sentence."""
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


def _connect(address: str) -> Any:
    """A JobSubmissionClient. Raises ValueError at once where no dashboard of Ray answers at `address`."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 8265), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"address ({address}): no Ray cluster answers there ({error}); start one with `ray start --head`, or give "
            "--address the URL of its dashboard"
        ) from None
    os.environ["RAY_API_SERVER_ADDRESS"] = (
        parts.geturl()
    )  # Ray puts this variable, and RAY_ADDRESS, before its argument
    import requests
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.WARNING)  # Ray's client tells of each file that it leaves out; what goes wrong it raises
    try:
        return JobSubmissionClient(parts.geturl())
    except (RuntimeError, KeyError, ValueError, requests.RequestException) as error:
        raise ValueError(
            f"address ({address}): what answers there is no dashboard of Ray ({_first_line(error)})"
        ) from None


def _submit(client: Any, name: str, entrypoint: list[str], environment: dict[str, str]) -> str:
    job = _free_name(client, name or _name_in(entrypoint))
    runtime_env = {"working_dir": str(ROOT), "env_vars": environment}
    try:
        job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env, submission_id=job or None)
    except RuntimeError as error:  # with a page of the server's traceback
        raise RunFailed(f"the cluster refused job {job!r}: {str(error).strip().splitlines()[-1]}") from None
    sys.stdout.write(f"job {job} (end it with `scripts/submit.py --stop {job}`)\n")
    return str(job)


def _name_in(entrypoint: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--name", default="")
    return str(parser.parse_known_args(entrypoint)[0].name)


def _free_name(client: Any, name: str) -> str:
    """`name`, or NAME-2, NAME-3 … after jobs of that name that have ended. Raises ValueError while one has not."""
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


def _status(client: Any, job: str) -> str:
    info = _info(client, job)
    last = (info.message or "").splitlines()[:1]
    return " ".join([job, str(info.status), *last])


def _list(client: Any) -> str:
    jobs = sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)
    rows = [
        (job.submission_id, str(job.status), _clock(job.start_time), textwrap.shorten(job.entrypoint, 80))
        for job in jobs
    ]
    return table(("job", "status", "started", "command"), rows)


def _clock(milliseconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((milliseconds or 0) / 1000))


def _stop(client: Any, job: str) -> None:
    """Asks the job to stop and waits until it has. One that has ended already is no mistake."""
    if not _info(client, job).status.is_terminal():
        client.stop_job(job)
    while not _info(client, job).status.is_terminal():
        time.sleep(0.2)
    sys.stdout.write(f"{_status(client, job)}\n")


def _follow(client: Any, job: str) -> int:
    """Shows the job's logs until it ends; its exit status."""
    try:
        _info(client, job)
        log: SimpleQueue[str | Exception | None] = SimpleQueue()
        # Not in this thread: Ctrl-C amid asyncio's and aiohttp's own clearing up is swallowed, or ends in their complaints.
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
    """Puts the job's log piece by piece, then None; or the error that ended it."""
    try:
        asyncio.run(_tail(client, job, put))
        put(None)
    except Exception as error:
        put(error)


async def _tail(client: Any, job: str, put: Callable[[str], None]) -> None:
    """Puts the log as it grows, each character once, also where the connection is lost in between."""
    import aiohttp

    shown = 0
    while True:
        position = 0  # the log comes from its start at each connection
        try:
            async for text in client.tail_job_logs(job):
                put(text[max(shown - position, 0) :])
                position += len(text)
                shown = max(shown, position)
        except (RuntimeError, aiohttp.ClientError):
            pass  # proxies give up on long connections
        if _info(client, job).status.is_terminal():
            put(client.get_job_logs(job)[shown:])
            return
        await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
