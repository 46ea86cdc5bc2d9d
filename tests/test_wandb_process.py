"""Which mode of W&B is taken, and that disabled means nothing at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.mirrored import (
    ROOT,
    isolate,
)
from helpers.waiting import LIMIT

from lgm_dist.config import Config
from lgm_dist.tracking.wandb_process import wandb_mode


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    isolate(monkeypatch, tmp_path_factory)


def test_disabled_loads_and_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["wandb"] = None
from pathlib import Path
from lgm_dist.config import Config
from lgm_dist.tracking.evaluations import log_evaluation
from lgm_dist.tracking.mirror import Mirror
with Mirror(Path({str(tmp_path)!r}), Config.of(wandb="disabled")):
    Path({str(tmp_path)!r}, "metrics.jsonl").write_text('{{"step": 1}}\\n')
log_evaluation(Config.of(wandb="disabled"), Path("nowhere"), "fc100", [])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=LIMIT)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("configured", "environment", "key", "expected"),
    [
        ("online", None, "", "online"),
        ("offline", None, "k" * 40, "offline"),
        ("disabled", "online", "k" * 40, "disabled"),  # what is asked for by flag goes before the environment
        ("offline", "disabled", "", "offline"),
        ("auto", "disabled", "k" * 40, "disabled"),
        ("auto", "offline", "k" * 40, "offline"),
        ("auto", "online", "", "online"),
        ("auto", None, "k" * 40, "online"),
        ("auto", None, "", "offline"),
        ("auto", "", "", "offline"),
    ],
)
def test_mode(
    configured: Any, environment: str | None, key: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # no login but the one that a test makes
    monkeypatch.setenv("WANDB_API_KEY", key)
    if environment is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_mode(Config.of(wandb=configured)) == expected


def test_a_login_counts_as_an_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "k" * 40 + "\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_mode(Config()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(Config()) == "offline"
