"""A cluster of Ray to train on: the one of RAY_ADDRESS, or one of this process's own that listens on loopback only."""

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
from typing import Any

from lgm_dist.cluster.processes import adopt_orphans, below, handles, has_ended, have_handles, kill
from lgm_dist.training.memory import ONE_ARENA

RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: every socket of a local Ray on 127.0.0.1
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment instead of making their own with uv
    "RAY_AUTH_MODE": "disabled",  # a local Ray on loopback writes no token into the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the next check
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # for a Prometheus
    "RAY_task_events_report_interval_ms": "0",  # else gcs_server keeps a record of each call
    "RAY_JEMALLOC_LIB_PATH": "",  # with jemalloc, raylet and gcs_server take more memory, and more and more
    **ONE_ARENA,
    "GLOO_SOCKET_IFNAME": "lo",
}
"""For a Ray that `fit` starts itself on this machine; a cluster's own settings are left alone."""

_servers: dict[str, int] = {}
"""Name and descriptor of the processes that the Ray of this process cannot do without; empty where it has none, or no such
descriptors, and Ray is left to itself."""
_others: set[int] = set()
"""Processes that were below this one before its Ray."""


class RayEnded(Exception):
    """The Ray of this process is of no use any more."""


def on_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster to train on."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def connect(cpus: int, log_to_driver: bool = True, dashboard: bool = True) -> bool:
    """Joins the cluster of RAY_ADDRESS, else starts a local Ray with `cpus` unless this process has one.

    True if it is ours to end. Raises ValueError where nothing listens at RAY_ADDRESS.
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
    """Ray itself tries for half a minute and then prints pages."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # auto, or a name that Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS ({address}): no Ray cluster answers there ({error}); start one with `ray start --head`, or "
            "unset RAY_ADDRESS to train on this machine"
        ) from None


def prepare_for_ray() -> None:
    """Sets the environment of a local Ray; before Ray is imported, which reads some of it then."""
    if not on_cluster():
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def start_local_ray(cpus: int, log_to_driver: bool = True, dashboard: bool = True) -> None:
    """Starts a Ray of this process, on this machine, listening on loopback only.

    Without its dashboard only where nothing asks it: Ray Train's cleaner does for the state of its controller.
    """
    prepare_for_ray()
    import ray

    _others.update(below(os.getpid()))
    with _without_sigterm() if have_handles() else nullcontext():  # else Ray's own ways need it
        ray.init(
            "local",
            num_cpus=cpus,
            object_store_memory=200 * 2**20,
            include_dashboard=dashboard,
            logging_level=logging.ERROR,
            log_to_driver=log_to_driver,
        )
    started = _node().all_processes
    for name in ("gcs_server", "raylet"):
        for handle in handles(info.process.pid for info in started[name]):
            _servers[name] = handle
    adopt_orphans(bool(_servers))  # so that workers are found at the end whose raylet has gone


def _node() -> Any:
    """What Ray knows of the processes that it has started here."""
    from ray._private import worker

    return worker._global_node


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """For processes started meanwhile, and by them: SIGTERM is this process's, from which they hear what to do.

    `timeout`, systemd and Slurm send it to all of them at once, and Ray's servers would end before the workers' checkpoint.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watch:
    """Called now and then, raises RayEnded where the Ray of this process has ended, or where the given sign of life, once it
    has changed, has not changed again for so many seconds (0: for ever).

    Ray itself learns of its raylet's end a quarter of a minute later, and of its gcs_server's never: all steps get slower until
    it aborts this process, after a minute. For a stopped controller of Ray Train it would wait for ever.
    """

    def __init__(self, sign: Callable[[], object], seconds: float) -> None:
        self._sign, self._seconds = sign, seconds
        self._first = self._last = sign()
        self._since = time.monotonic()

    def __call__(self) -> None:
        for name, process in _servers.items():
            if has_ended(process):
                raise RayEnded(f"Ray's {name} has ended")
        sign, now = self._sign(), time.monotonic()
        if sign != self._last:
            self._last, self._since = sign, now
        elif _servers and self._seconds and sign != self._first and now - self._since > self._seconds:
            raise RayEnded(f"nothing has happened for {self._seconds:g} s")


def disconnect() -> None:
    """Leaves a cluster; ends a Ray of this process with every process of it.

    Ray does not end a worker that has taken its leave and then hangs, as a controller of Ray Train's now and then does, nor,
    at once, those of a raylet that has gone, which train on. And it asks one server after the other to end, by SIGTERM, and
    waits a second for it.
    """
    import ray

    if _servers and _node():
        _node().kill_all_processes = _end_all
    if any(map(has_ended, _servers.values())):
        _end_all()
    ray.shutdown()
    adopt_orphans(False)
    kill(_servers.values())
    _servers.clear()
    _others.clear()


def _end_all(**_: bool) -> None:
    for _round in range(3):  # a raylet may have started one more meanwhile
        kill(handles(_of_ray()))


def _of_ray() -> set[int]:
    """Ray's processes below this one, and all that they have started."""
    import ray

    package = f"{Path(ray.__file__).parent}/"
    found = {pid: command for pid, command in below(os.getpid()).items() if pid not in _others}
    own = {pid for pid, command in found.items() if command.startswith("ray::") or package in command}
    return own | below(*own).keys()
