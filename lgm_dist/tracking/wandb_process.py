"""W&B's own process, which Python talks to, and the files that it writes offline."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from lgm_dist.config import Config
from lgm_dist.extras import installed
from lgm_dist.tracking.panels import DONE


def wandb_mode(config: Config) -> str:
    """online, offline or disabled: what the configuration says.

    auto is disabled if wandb is not installed, else what WANDB_MODE says, else online with an account and offline without.
    """
    if config.run.wandb == "auto" and not installed("wandb"):
        return "disabled"
    if os.environ.get("WANDB_MODE") and config.run.wandb == "auto":
        return os.environ["WANDB_MODE"]
    if config.run.wandb != "auto":
        return config.run.wandb
    try:
        from wandb.sdk.lib import wbauth
    except ImportError:  # a broken installation, which the Mirror then says
        return "offline"
    host = wbauth.HostUrl(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return "online" if os.environ.get("WANDB_API_KEY") or wbauth.read_netrc_auth(host=host) else "offline"


def held_steps(run: Path, wandb_id: str) -> tuple[list[int], int]:
    """The rows' steps in the offline files of earlier starts, and DONE. A killed process left its file without its tail, or
    none."""
    steps: list[int] = []
    done = 0
    for file in sorted(run.glob(f"wandb/offline-run-*-{wandb_id}/*.wandb")):
        inspect = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(inspect, check=True, capture_output=True, text=True).stdout.splitlines()
        for record in map(json.loads, lines):
            if record["type"] == "history":
                steps.append(record["history"]["step"]["num"])
            elif record["type"] == "summary":
                done = int(record["summary"].get("update", {}).get(DONE, done))
    return steps, done


def service_ended(error: Exception) -> bool:
    """Whether an exception says that W&B's process is gone; its own kinds of exception are not public."""
    kinds = ("HandleAbandonedError", "MailboxClosedError", "WandbServiceConnectionError")
    return isinstance(error, ConnectionError) or type(error).__name__ in kinds


def forget_service(service: str) -> None:
    """W&B's service is gone, as after `ray job stop`, which ends it too: else W&B fails once more at exit, with a traceback.

    Another run of this process may have replaced it already.
    """
    if os.environ.get("WANDB_SERVICE", service) == service:
        # it would exit with the status of the process that was killed; where it cannot even be imported, there is none
        with contextlib.suppress(Exception, SystemExit):
            import wandb

            wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)


def leave_service() -> None:
    """Forgets the W&B service of a parent process, which would outlive this one and keep its runs' ids in use after a kill."""
    owner = os.environ.get("WANDB_SERVICE", "").split("-")[1:2]  # version-pid-kind-place
    if owner != [str(os.getpid())]:
        os.environ.pop("WANDB_SERVICE", None)
