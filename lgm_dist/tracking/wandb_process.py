"""W&B's service process, the files that it writes offline, and whether W&B is online."""

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
    """online, offline or disabled.

    The configuration decides. If it says auto: disabled if wandb is not installed, otherwise what WANDB_MODE says, otherwise
    online with an account and offline without.
    """
    if config.run.wandb != "auto":
        return config.run.wandb
    if not installed("wandb"):
        return "disabled"
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    try:
        from wandb.sdk.lib import wbauth
    except ImportError:  # a broken installation, which the Mirror reports
        return "offline"
    host = wbauth.HostUrl(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return "online" if os.environ.get("WANDB_API_KEY") or wbauth.read_netrc_auth(host=host) else "offline"


def held_steps(run: Path, wandb_id: str) -> tuple[list[int], int]:
    """The steps of the rows in the offline files of earlier starts, and DONE.

    The file of a killed process lacks its last rows, or does not exist.
    """
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
    """Return True if the error says that W&B's process has ended. The classes of these errors are not public."""
    kinds = ("HandleAbandonedError", "MailboxClosedError", "WandbServiceConnectionError")
    return isinstance(error, ConnectionError) or type(error).__name__ in kinds


def forget_service(service: str) -> None:
    """Forget a service that has ended, for example by `ray job stop`. Otherwise W&B fails again at exit, with a traceback.

    Another run of this process may have started a new service already.
    """
    if os.environ.get("WANDB_SERVICE", service) == service:
        # teardown exits with the status of the killed process, and there is nothing to tear down if wandb does not import
        with contextlib.suppress(Exception, SystemExit):
            import wandb

            wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)


def leave_service() -> None:
    """Forget the W&B service of a parent process. It would outlive this process and keep the ids of its runs in use."""
    owner = os.environ.get("WANDB_SERVICE", "").split("-")[1:2]  # version-pid-kind-address
    if owner != [str(os.getpid())]:
        os.environ.pop("WANDB_SERVICE", None)


def sentence_of(error: Exception) -> str:
    """An error on one line, with its class."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
