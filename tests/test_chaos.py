"""The command line of tests/chaos."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chaos.command import PARTS, main
from chaos.processes import FAULTS

from lgm_dist.errors import RunFailed

ROOT = Path(__file__).parents[1]


def test_the_command_runs_from_any_folder_and_names_all_parts(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/chaos"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    text = " ".join(done.stdout.split())
    assert all(f"{part}, " in text for part in PARTS)
    assert all(fault in text for fault in FAULTS)


def test_two_hosts_need_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunFailed, match=r"^hosts: .* run it as root and install ip, unshare and mount$"):
        main(["hosts", "--folder", str(tmp_path)])
