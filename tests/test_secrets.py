"""The key of a W&B account is in no file that a run leaves and in nothing that it prints; of jobs, test_jobs.py says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.mirrored import drive

from lgm_dist.cluster.fit import train
from lgm_dist.config import Config
from lgm_dist.runs.job import make_job
from lgm_dist.tracking.mirror import Mirror

KEY = "5ecde7" * 6 + "abcd"
"""40 letters, as W&B's are."""


def holding(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_finished_run_holds_no_key(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    config = small.replace(storage=str(tmp_path), name="run", wandb="offline", steps_per_epoch=2, eval_every=1)
    job = make_job(config)
    run = Path(job.run)
    with Mirror(run, config):
        train(job)
    assert list(run.glob("wandb/offline-run-*/*.wandb")), "W&B was at work"
    (run / "canary").write_text(f"key={KEY}")
    assert holding(tmp_path, KEY) == [run / "canary"]
    with pytest.raises(ValueError, match="was started with") as refused:
        make_job(config.replace(lr=0.5))
    assert KEY not in str(refused.value) + "".join(capfd.readouterr())


def test_a_server_that_is_gone_is_told_of_without_the_key(tmp_path: Path) -> None:
    gone = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "1"}
    done = drive(tmp_path, 3, "online", **gone)
    assert "W&B does not have all of" in done.stderr
    assert KEY not in done.stdout + done.stderr
    assert holding(tmp_path, KEY) == []
