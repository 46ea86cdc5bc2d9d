"""The Ray cluster to train on: the one at RAY_ADDRESS, or a local Ray that this process starts on loopback."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lgm_dist.cluster.processes import adopt_orphans, descendants, has_ended, kill, open_pidfds, supports_pidfds
from lgm_dist.training.memory import ONE_ARENA

RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds every socket of a local Ray to 127.0.0.1, on Linux too
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment instead of making their own with uv
    "RAY_AUTH_MODE": "disabled",  # a Ray on loopback needs no token, which would be written to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report blocks until the next check
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # these are for Prometheus
    "RAY_task_events_report_interval_ms": "0",  # otherwise gcs_server records each call
    "RAY_JEMALLOC_LIB_PATH": "",  # with jemalloc the memory of raylet and gcs_server keeps growing
    **ONE_ARENA,
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Environment of a local Ray. The settings of a cluster are not changed."""

_SERVERS = ("gcs_server", "raylet")
_servers: dict[str, int] = {}
"""Name and descriptor of the servers of a local Ray. Empty on a cluster and on systems without such descriptors."""
_started_before: set[int] = set()
"""Descendants of this process that are older than its local Ray."""


class RayEnded(Exception):
    """The local Ray has ended or hangs."""


def on_cluster() -> bool:
    """Return True if RAY_ADDRESS names a cluster."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def connect(cpus: int, log_to_driver: bool = True, dashboard: bool = True) -> bool:
    """Join the cluster at RAY_ADDRESS or start a local Ray with `cpus`, unless this process is connected already.

    Return True if the caller has to call `disconnect`. Raises ValueError if nothing listens at RAY_ADDRESS.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return False
    if not on_cluster():
        start_local_ray(cpus, log_to_driver, dashboard)
        return True
    address = os.environ["RAY_ADDRESS"]
    _check_address(address)
    import ray

    ray.init(address, logging_level=logging.ERROR, log_to_driver=log_to_driver)
    return True


def _check_address(address: str) -> None:
    """Raise ValueError if nothing listens there. Ray itself would try for half a minute and print pages."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", or a name that Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS ({address}): no Ray cluster answers there ({error}); start one with `ray start --head`, or "
            "unset RAY_ADDRESS to train on this machine"
        ) from None


def prepare_for_ray() -> None:
    """Set the environment of a local Ray. Call this before Ray is imported, which reads part of it then."""
    if not on_cluster():
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def start_local_ray(cpus: int, log_to_driver: bool = True, dashboard: bool = True) -> None:
    """Start a Ray of this process, which listens on loopback only.

    A sweep needs the dashboard: it is asked whether a trial has ended, so that the resources of its workers are freed.
    """
    prepare_for_ray()
    import ray

    _started_before.update(descendants(os.getpid()))
    with _sigterm_blocked() if supports_pidfds() else nullcontext():  # Ray ends itself by SIGTERM if we cannot kill it
        ray.init(
            "local",
            num_cpus=cpus,
            object_store_memory=200 * 2**20,
            include_dashboard=dashboard,
            logging_level=logging.ERROR,
            log_to_driver=log_to_driver,
        )
    for pid, command in _ray_processes().items():
        name = next((name for name in _SERVERS if f"/{name} " in command), "")
        for pidfd in open_pidfds([pid] if name else []):
            _servers[name] = pidfd
    adopt_orphans(bool(_servers))  # so that the workers of a raylet that has died are found and killed


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in processes that are started meanwhile, and in those that they start.

    `timeout`, systemd and Slurm send SIGTERM to all processes of a job at once. This process then asks the workers for a
    checkpoint, for which Ray's servers have to go on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watch:
    """Checks a local Ray when called: raises RayEnded if a server has ended or the training makes no progress.

    `progress` returns a value that changes as training goes on. After its first change it has to change at least every
    `limit_s` seconds (0: no limit). On a cluster neither is checked.

    Ray notices the end of its raylet after a quarter of a minute and that of its gcs_server not at all: all steps get slower
    until Ray aborts this process, after a minute. It waits for a stopped controller of Ray Train without a limit.
    """

    def __init__(self, progress: Callable[[], object], limit_s: float) -> None:
        self._progress, self._limit_s = progress, limit_s
        self._first = self._last = progress()
        self._changed_at = time.monotonic()

    def __call__(self) -> None:
        for name, pidfd in _servers.items():
            if has_ended(pidfd):
                raise RayEnded(f"Ray's {name} has ended")
        value, now = self._progress(), time.monotonic()
        if value != self._last:
            self._last, self._changed_at = value, now
        elif _servers and self._limit_s and value != self._first and now - self._changed_at > self._limit_s:
            raise RayEnded(f"nothing has happened for {self._limit_s:g} s")


def disconnect() -> None:
    """Leave the cluster, or end the local Ray with all its processes."""
    import ray

    kill_local_ray()
    ray.shutdown()
    adopt_orphans(False)
    kill(_servers.values())
    _servers.clear()
    _started_before.clear()


def kill_local_ray() -> bool:
    """Kill all processes of the local Ray at once. Return False if it knows no servers of a local Ray.

    `ray.shutdown()` sends SIGTERM, which they block, to one server after the other and waits a second for each. It does not
    end a worker that hangs at its exit, nor the workers of a raylet that has died, which would train on.
    """
    if not _servers:
        return False
    for _ in range(3):  # a raylet may have started one more process meanwhile
        kill(open_pidfds(_ray_processes()))
    return True


def _ray_processes() -> dict[int, str]:
    """Return the command lines of the local Ray's processes and of all that they have started, by pid."""
    import ray

    package = f"{Path(ray.__file__).parent}/"
    commands = {pid: command for pid, command in descendants(os.getpid()).items() if pid not in _started_before}
    rays = {pid: command for pid, command in commands.items() if command.startswith("ray::") or package in command}
    return rays | descendants(*rays)
