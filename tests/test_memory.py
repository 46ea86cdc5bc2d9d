"""Freed memory is reused: the kernel hands out no page anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lgm_dist.training.memory import ONE_ARENA

PAGES = 40 * 64 * 2**20 // 4096
PROGRAM = """
import resource, sys, threading, torch
from lgm_dist.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(40):  # glibc takes some blocks until one fits that it has been given back, as they are aligned
        torch.ones(64 * 2**20 // 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if "thread" in sys.argv:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*how: str, **environment: str) -> int:
    program = [sys.executable, "-c", PROGRAM, *how]
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=os.environ | environment)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_block_of_64_mib_is_not_cleared_by_the_kernel_every_time() -> None:
    assert faults("keep") < PAGES / 2
    assert faults("leave") > PAGES * 0.9, "else this test shows nothing"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_nor_in_a_thread_that_shares_the_main_threads_memory() -> None:
    assert faults("keep", "thread", **ONE_ARENA) < PAGES / 2
    assert faults("keep", "thread", MALLOC_ARENA_MAX="8") > PAGES * 0.9, "else this test shows nothing"
