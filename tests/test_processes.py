"""Processes are found and killed, also those that Ray leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lgm_dist.cluster.processes import descendants, has_ended, kill, open_pidfds, supports_pidfds

ROOT = Path(__file__).parents[1]


def state(pid: int) -> str:
    """The state letter of ps, "" for a process that has ended, even if nobody has waited for it."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return letter.replace("Z", "")


def within(seconds: float, pid: int, letter: str) -> bool:
    end = time.monotonic() + seconds
    while state(pid) != letter and time.monotonic() < end:
        time.sleep(0.01)
    return state(pid) == letter


def test_children_of_children_are_found_and_stopped_ones_are_killed() -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert shell.stdout
    sleeper = int(shell.stdout.readline())
    while (processes := descendants(os.getpid()))[sleeper] != "sleep 1000 ":
        time.sleep(0.01)  # until the shell's fork has executed sleep
    assert list(processes).index(shell.pid) < list(processes).index(sleeper)
    assert list(descendants(shell.pid)) == [sleeper]
    os.kill(sleeper, signal.SIGSTOP)
    assert within(10, sleeper, "T")
    kill(open_pidfds([sleeper, shell.pid]))
    assert state(sleeper) == ""
    assert open_pidfds([shell.pid]) == []  # it has ended and `kill` has waited for it
    assert shell.wait() == 0  # the status is lost, since `kill` has asked for it


def test_a_process_whose_name_is_cut_within_a_letter_is_found(tmp_path: Path) -> None:
    """The kernel keeps 15 bytes of the name."""
    program = tmp_path / "абвгдежз"
    shutil.copy(shutil.which("sleep") or "", program)
    process = subprocess.Popen([program, "1000"])
    while process.pid not in descendants(os.getpid()) or not descendants(os.getpid())[process.pid].startswith(
        str(program)
    ):
        time.sleep(0.01)  # until the child has executed the program
    with pytest.raises(UnicodeDecodeError):
        Path(f"/proc/{process.pid}/stat").read_bytes().decode()
    kill(open_pidfds([process.pid]))
    process.wait()


def test_systems_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some builds of Python for Linux have none, and other systems."""
    assert supports_pidfds()
    monkeypatch.delattr(os, "pidfd_open")
    assert open_pidfds([os.getpid()]) == []
    assert not supports_pidfds()


ADOPTS = """
import os, subprocess, time
from lgm_dist.cluster.processes import adopt_orphans, descendants, kill, open_pidfds

adopt_orphans(True)
shell = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!"], stdout=subprocess.PIPE, text=True)
orphan = int(shell.stdout.readline())
shell.wait()
while "sh -c" in str(descendants(os.getpid())):
    time.sleep(0.01)  # until the shell's fork has executed sleep
print(orphan, descendants(os.getpid()))
kill(open_pidfds([orphan]))
print(descendants(os.getpid()))
"""


def test_an_orphan_becomes_a_child_of_the_process_that_adopts_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADOPTS], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    first, second = done.stdout.splitlines()
    pid, _, processes = first.partition(" ")
    assert processes == f"{{{pid}: 'sleep 1000 '}}"
    assert second == "{}"


def test_has_ended_waits_for_at_most_the_given_time() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    (pidfd,) = open_pidfds([process.pid])
    assert not has_ended(pidfd)
    start = time.monotonic()
    assert not has_ended(pidfd, 0.2)
    assert time.monotonic() - start >= 0.2
    process.kill()
    assert has_ended(pidfd, 10)
    assert has_ended(pidfd), "although nobody has waited for the process"
    process.wait()
    os.close(pidfd)


def test_kill_closes_the_descriptor_of_a_process_that_has_ended() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    (pidfd,) = open_pidfds([process.pid])
    process.kill()
    process.wait()
    kill([pidfd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)


HANGS_AT_ITS_END = """
import os, threading, time, ray
from lgm_dist.cluster.connection import connect, disconnect

@ray.remote(num_cpus=0)
class Actor:
    def hang(self):
        threading.Thread(target=time.sleep, args=(1000,)).start()
        return os.getpid()

connect(1, dashboard=False)
actor = Actor.remote()
print(ray.get(actor.hang.remote()))
del actor  # Ray asks it to exit, and it waits for its thread
time.sleep(2)
disconnect()
"""


@pytest.mark.ray
class TestUnderRay:
    def test_no_process_of_a_local_ray_outlives_it(self) -> None:
        """With ray.shutdown() alone, a process that hangs at its exit would."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", HANGS_AT_ITS_END]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert within(10, int(done.stdout), "")
