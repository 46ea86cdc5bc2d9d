"""Files of learners and classifiers with a changed header."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def rewritten(path: Path, change: Any) -> Path:
    """The file at `path` after `change` of its header's record."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    record = json.loads(head["__metadata__"]["lgm_dist"])
    change(record)
    head["__metadata__"]["lgm_dist"] = json.dumps(record)
    packed = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + size :])
    return path
