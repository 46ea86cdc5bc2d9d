"""Faults of two hosts: network namespaces of this machine, joined by a virtual wire. Needs root, iproute2 and util-linux.

The second host has its own processes, shared memory and Ray folder, so the hosts share only the wire and the storage. No
other network reaches them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chaos.elastic import ELASTIC, SETTINGS, compare, world_sizes
from chaos.trainings import Outcome, Training, past_this_step
from lgm_dist.cluster.processes import descendants, kill, open_pidfds
from lgm_dist.errors import RunFailed

_HERE, _THERE, _PORT = "10.77.0.1", "10.77.0.2", 6379
_RAY = str(Path(sys.executable).with_name("ray"))
_AWAY = 10.0
"""Seconds for which the wire is cut, fewer than Ray needs to declare a node dead."""
_OWN_PLACES = "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && mount -t tmpfs none /dev/shm && exec"


def hosts(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """Train with --workers 1:2. A second host joins, the wire is cut for a while, the second host loses power and returns."""
    if os.geteuid() or not all(shutil.which(tool) for tool in ("ip", "unshare", "mount")):
        raise RunFailed("hosts: this part makes network namespaces; run it as root and install ip, unshare and mount")
    with _two_hosts() as (here, there):
        training = Training(
            *(folder, "hosts", *ELASTIC, "--steps-per-epoch=1000000", "--workers=1:2", "--max-failures=20"),
            prefix=_inside(here),
            RAY_ADDRESS=f"{_HERE}:{_PORT}",
            GLOO_SOCKET_IFNAME="eth0",
            **SETTINGS,
        )
        second: list[subprocess.Popen[bytes]] = []

        def join() -> None:
            second.append(_node(there, _THERE))

        def cut() -> None:
            _wire(there, "down")
            time.sleep(_AWAY)
            _wire(there, "up")

        def fail() -> None:
            _wire(there, "down")  # so that no goodbye gets through
            second[-1].kill()
            second[-1].wait()

        def come_back() -> None:
            _wire(there, "up")
            join()

        faults: list[tuple[str, Callable[[], Any], int]] = [
            ("a second host joins", join, 2),
            (f"network away for {_AWAY:g} s", cut, 0),
            ("the second host's power fails", fail, 1),
            ("it comes back", come_back, 2),
        ]
        try:
            training.until(lambda: training.step() >= 100)
            outcomes = [_suffer(training, *fault) for fault in faults]
            training.process.send_signal(signal.SIGTERM)
            training.wait(status=1)  # with a checkpoint
        finally:
            training.process.kill()
            for node in second:
                node.kill()
    return [*outcomes, compare(folder, training, len(faults))]


def _suffer(training: Training, name: str, fault: Callable[[], Any], size: int) -> Outcome:
    """Cause a fault and wait until the run goes on with `size` workers (0: with those that it has)."""
    before, start, past = len(world_sizes(training)), time.monotonic(), past_this_step(training)
    fault()
    if size:
        training.until(lambda: world_sizes(training)[before:][-1:] == [size])
        training.until(past)
        note = f"in the log: world size -> {size}"
    else:
        step = training.step()
        training.until(lambda: training.step() > step)
        note = "the workers wait for it" if len(world_sizes(training)) == before else "workers start again"
    return Outcome(name, 1, 1, [time.monotonic() - start], note=note)


@contextmanager
def _two_hosts() -> Iterator[tuple[str, str]]:
    """Make two namespaces, start a Ray head node in the first, and give their names."""
    names = tuple(f"lgm-{side}-{os.getpid()}" for side in ("here", "there"))
    head: subprocess.Popen[bytes] | None = None
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, (_HERE, _THERE), strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _wire(name, "up")
        head = _node(names[0], _HERE)
        asked = [*_inside(names[0]), _RAY, "health-check", f"--address={_HERE}:{_PORT}"]
        while subprocess.run(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60).returncode:
            if head.poll() is not None:
                raise RunFailed("hosts: the head node does not start")
        yield names[0], names[1]
    finally:
        if head:
            kill(open_pidfds([*descendants(head.pid), head.pid]))
            head.wait()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _node(host: str, address: str) -> subprocess.Popen[bytes]:
    """Start a Ray node with one CPU: the head at _HERE, else a second host, all of which ends with the returned process."""
    role = ["--head", f"--port={_PORT}"] if address == _HERE else [f"--address={_HERE}:{_PORT}"]
    ray = [_RAY, "start", *role, f"--node-ip-address={address}"]
    ray += ["--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--block"]
    apart = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        f'{_OWN_PLACES} "$@"',
        "sh",
    ]
    command = [*_inside(host), *(apart if address != _HERE else []), *ray]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "eth0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _inside(host: str) -> list[str]:
    return ["ip", "netns", "exec", host]


def _wire(host: str, state: str) -> None:
    _ip("-n", host, "link", "set", "eth0", state)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"hosts: ip {' '.join(words)}: {done.stderr.strip()}")
