"""What a run leaves behind as it goes: metrics.jsonl, the record, and the same on Weights & Biases (the only wandb import).

A row of metrics.jsonl is one JSON object: `step` (optimizer steps done) and metrics with W&B's keys, such as `train/loss`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from lgm_dist.config import Config

METRICS = "metrics.jsonl"


class Tracker:
    """Writes rows to the run's metrics.jsonl and to W&B. Continues after `step`: rows that will come again are dropped."""

    def __init__(self, run: Path, config: Config, step: int, facts: dict[str, Any]) -> None:
        self._path = run / METRICS
        _drop_rows_after(self._path, step)
        self._file = self._path.open("a", buffering=1)
        self._seconds = float(max((row.get("seconds", 0.0) for row in read_metrics(run)), default=0.0))
        self._start = time.monotonic()
        self._wandb = _start_wandb(run, config, facts)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row: metrics after `step` optimizer steps."""
        row = {"step": step, **metrics, "seconds": round(self._seconds + time.monotonic() - self._start, 3)}
        self._file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics}, step=step)

    def close(self, summary: dict[str, float]) -> None:
        """The run is over; `summary` holds its final figures."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.summary.update(summary)
            self._wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl; a last line that a killed process left half-written is not one."""
    try:
        lines = (run / METRICS).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _drop_rows_after(path: Path, step: int) -> None:
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    beside = path.with_suffix(".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)


def _start_wandb(run: Path, config: Config, facts: dict[str, Any]) -> Any:
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    import wandb

    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "lgm_dist"),
        dir=run,
        id=_wandb_id(run),
        name=config.run_name,
        job_type="train",
        config=config.to_dict() | facts,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        settings=wandb.Settings(console="off", silent=True),
    )
    tracked.define_metric("step")
    tracked.define_metric("*", step_metric="step")
    tracked.define_metric("val/accuracy", step_metric="step", summary="max")
    return tracked


def wandb_mode(config: Config) -> str:
    """online, offline or disabled: WANDB_MODE, else what the configuration says, where auto asks for an account."""
    if os.environ.get("WANDB_MODE") and config.wandb == "auto":
        return os.environ["WANDB_MODE"]
    if config.wandb != "auto":
        return config.wandb
    from wandb.sdk.lib import wbauth

    host = wbauth.HostUrl(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return "online" if os.environ.get("WANDB_API_KEY") or wbauth.read_netrc_auth(host=host) else "offline"


def _wandb_id(run: Path) -> str:
    """The run's W&B id, drawn at its first start: a run that is resumed goes on as the same one."""
    path = run / "wandb-id"
    if not path.exists():
        path.write_text(secrets.token_hex(6) + "\n")
    return path.read_text().strip()
