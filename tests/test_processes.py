"""Processes found and ended, those too that a Ray leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lgm_dist.cluster.processes import below, handles, has_ended, have_handles, kill

ROOT = Path(__file__).parents[1]


def state(pid: int) -> str:
    """The letter of ps, "" for a process that has ended, if only its parent has not asked yet."""
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


def test_children_of_children_are_found_and_stopped_ones_ended() -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert shell.stdout
    sleeper = int(shell.stdout.readline())
    while (found := below(os.getpid()))[sleeper] != "sleep 1000 ":
        time.sleep(0.01)  # until the shell's copy of itself has become that program
    assert list(found).index(shell.pid) < list(found).index(sleeper)
    assert list(below(shell.pid)) == [sleeper]
    os.kill(sleeper, signal.SIGSTOP)
    assert within(10, sleeper, "T")
    kill(handles([sleeper, shell.pid]))
    assert state(sleeper) == ""
    assert handles([shell.pid]) == []  # it has ended and been waited for
    assert shell.wait() == 0  # as another has asked before


def test_a_name_that_is_cut_within_a_letter_is_no_matter(tmp_path: Path) -> None:
    """The kernel keeps 15 bytes of it."""
    program = tmp_path / "абвгдежз"
    shutil.copy(shutil.which("sleep") or "", program)
    process = subprocess.Popen([program, "1000"])
    while process.pid not in below(os.getpid()) or not below(os.getpid())[process.pid].startswith(str(program)):
        time.sleep(0.01)  # until it has become that program
    with pytest.raises(UnicodeDecodeError):
        Path(f"/proc/{process.pid}/stat").read_bytes().decode()
    kill(handles([process.pid]))
    process.wait()


def test_without_descriptors_of_processes_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with some builds of Python for Linux, and on other systems."""
    assert have_handles()
    monkeypatch.delattr(os, "pidfd_open")
    assert handles([os.getpid()]) == []
    assert not have_handles()


ADOPTS = """
import os, subprocess, time
from lgm_dist.cluster.processes import adopt_orphans, below, handles, kill

adopt_orphans(True)
shell = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!"], stdout=subprocess.PIPE, text=True)
orphan = int(shell.stdout.readline())
shell.wait()
while "sh -c" in str(below(os.getpid())):
    time.sleep(0.01)  # until the shell's copy of itself has become that program
print(orphan, below(os.getpid()))
kill(handles([orphan]))
print(below(os.getpid()))
"""


def test_a_process_whose_parent_has_ended_stays_below_one_that_adopts_and_is_waited_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADOPTS], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    first, second = done.stdout.splitlines()
    pid, _, found = first.partition(" ")
    assert found == f"{{{pid}: 'sleep 1000 '}}"
    assert second == "{}"


def test_the_end_of_a_process_is_seen_within_the_time_that_is_given() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    (descriptor,) = handles([process.pid])
    assert not has_ended(descriptor)
    start = time.monotonic()
    assert not has_ended(descriptor, 0.2)
    assert time.monotonic() - start >= 0.2
    process.kill()
    assert has_ended(descriptor, 10)
    assert has_ended(descriptor), "although nobody has waited for it"
    process.wait()
    os.close(descriptor)


def test_a_process_that_has_ended_meanwhile_is_no_error_and_its_descriptor_is_closed() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    (descriptor,) = handles([process.pid])
    process.kill()
    process.wait()
    kill([descriptor])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


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
del actor  # it takes its leave of Ray and waits for its thread
time.sleep(2)
disconnect()
"""


@pytest.mark.ray
class TestUnderRay:
    def test_no_process_of_a_ray_outlives_it_not_even_one_that_hangs_at_its_end(self) -> None:
        """With ray.shutdown() alone this one does, as a controller of Ray Train's did twice in some dozens of runs."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", HANGS_AT_ITS_END]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert within(10, int(done.stdout), "")
