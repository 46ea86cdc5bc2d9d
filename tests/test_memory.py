"""Freed memory is reused: the kernel hands out no page anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from lgm_dist.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # glibc takes some blocks until one fits that it has been given back, as they are aligned
    torch.ones(64 * 2**20 // 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_block_of_64_mib_is_not_cleared_by_the_kernel_every_time() -> None:
    pages = 40 * 64 * 2**20 // 4096
    assert faults("keep") < pages / 2
    assert faults("leave") > pages * 0.9, "else this test shows nothing"
