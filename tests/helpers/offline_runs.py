"""W&B's offline files read back by W&B's own reader, `wandb leet inspect`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def folders(run: Path) -> list[Path]:
    """The offline folders in a run's folder, one a start, oldest first."""

    def start(folder: Path) -> tuple[str, int]:
        """The second in its name, and its time within that second: the id at the end of the name tells none."""
        return folder.name.rpartition("-")[0], folder.stat().st_mtime_ns

    return sorted((run / "wandb").glob("offline-run-*"), key=start)


def inspect(folder: Path) -> Records:
    """All records of an offline folder; none where its start was killed before W&B had made the file."""
    wandb = str(Path(sys.executable).parent / "wandb")
    lines: list[bytes] = []
    for file in folder.glob("*.wandb"):
        command = [wandb, "leet", "inspect", "--json", str(file)]
        lines += subprocess.run(command, check=True, capture_output=True, timeout=60).stdout.splitlines()
    return [json.loads(line) for line in lines]


def of_type(records: Records, kind: str) -> Records:
    """The records of one type, such as history."""
    return [record[kind] for record in records if record["type"] == kind]


def history(records: Records) -> Records:
    """The logged rows, without what W&B adds to them."""
    return [
        {key: value for key, value in row["item"].items() if not key.startswith("_")}
        for row in of_type(records, "history")
    ]


def merged(records: Records, kind: str) -> dict[str, Any]:
    """The updates of the records of type summary or config, the later over the earlier."""
    values: dict[str, Any] = {}
    for record in of_type(records, kind):
        values |= record.get("update", {})
    return values
