"""Files that are complete or absent. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """Write a JSON file beside its place and rename it, so that a reader sees the old one or the whole new one."""
    write_bytes(path, (json.dumps(values, indent=indent, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that a reader sees the old one or the whole new one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file. Raises OSError for a missing file, ValueError for other content."""
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values
