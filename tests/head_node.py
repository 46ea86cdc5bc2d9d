"""A real Ray head node on loopback, for the tests of jobs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lgm_dist.cluster.connection import RAY_ENVIRONMENT
from lgm_dist.cluster.processes import descendants, kill, open_pidfds

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Head:
    """A Ray head node."""

    pid: int
    address: str
    ports: set[int]
    environment: dict[str, str]

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/submit.py with these arguments. Its standard error is part of the output."""
        command = [sys.executable, str(ROOT / "scripts/submit.py"), "--address", self.address, *arguments]
        return self.call(command, "/", **environment)

    def call(self, command: list[str], folder: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        whole = self.environment | environment
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(command, env=whole, text=True, timeout=200, cwd=folder, **out)  # type: ignore[call-overload]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def head_node() -> Iterator[Head]:
    """Start a head node of 2 CPUs with every socket on loopback. It ends with all its processes."""
    folder = Path(
        tempfile.mkdtemp(prefix="rj", dir="/tmp")
    )  # short, because the path of a socket has at most 107 characters
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= RAY_ENVIRONMENT | {"PATH": path}
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", "--num-cpus=2", f"--temp-dir={folder}", "--object-store-memory=100000000"]
    command += ["--disable-usage-stats", *(f"--{name}={port}" for name, port in ports.items())]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = Head(process.pid, f"http://127.0.0.1:{ports['dashboard-port']}", set(ports.values()), environment)
    try:
        wait_for(lambda: answers(started.address), 60, "the dashboard of the head node")
        yield started
    finally:
        kill(open_pidfds([process.pid, *descendants(process.pid)]))  # by itself it would take a minute
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def listening_sockets(pids: Iterable[int]) -> list[tuple[str, int]]:
    """The addresses (IPv4 and IPv6) and ports on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:"):
                inodes.add(target[8:-1])
    sockets = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: LISTEN
                place, port = fields[1].split(":")
                raw = bytes.fromhex(place)
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                address = ipaddress.ip_address(words)
                sockets.append((str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)))
    return sockets
