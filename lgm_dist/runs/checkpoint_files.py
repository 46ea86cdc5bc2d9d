"""The files of a checkpoint, and whether they still hold what was written. They load without executing anything.

Formats of state.json: 1 has the digest of state.pt alone (`sha256`) and no data set. 2 has `files` (digests by name), `data`
(the manifest's digest) and `digest`, that of the record without it; a later format keeps `format` and `digest` as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.model import LGMNet, upgrade_state_dict
from lgm_dist.training.engine import Evaluation

FORMAT = 2
"""Version of the format that is written; a newer one is refused."""
NAME = re.compile(r"step-[0-9]{8,18}")
"""Of a checkpoint's folder."""
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
_STEP = ((), torch.float32, torch.strided, True)
"""See `_kind`: the number of steps that an optimizer keeps with each parameter."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    val_accuracy: float = -1.0
    """Of this very checkpoint, in 0 to 1; -1 before the first evaluation."""
    val_ci95: float = 0.0

    @classmethod
    def after(cls, step: int, val: Evaluation | None) -> TrainState:
        """The state after `step` steps and an evaluation on val, if there was one."""
        return cls(step, val.score.accuracy, val.score.ci95) if val else cls(step)


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are missing, unreadable or not those that were written."""


class LaterFormat(ValueError):
    """A checkpoint that only a later version reads."""


@dataclass(frozen=True)
class Meta:
    """What state.json holds."""

    state: TrainState
    config: dict[str, Any]
    files: dict[str, str]
    """sha256 of each other file (hex)."""
    data: str
    """sha256 of the manifest of the data set (hex), "" where it is not known."""

    def write(self, folder: Path) -> None:
        """Writes state.json into `folder`."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(record | {"digest": _digest_of(record)}, indent=1)
        (folder / "state.json").write_text(text + "\n")


def read(folder: Path) -> tuple[Meta, dict[str, Any]]:
    """What state.json holds and the tensors of state.pt, whose structure is not checked yet."""
    meta = read_meta(folder)
    content = read_file(folder, "state.pt", meta)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            if sum(info.file_size for info in file.infolist()) > len(content):
                raise ValueError("compressed, as torch's own files are not, so that it may be of any size")
        tensors = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # a file made to do harm can raise almost anything
        raise DamagedCheckpoint(f"checkpoint {folder}/state.pt holds more than tensors and is not loaded") from error
    with contextlib.suppress(AttributeError, LookupError, TypeError):  # `check_tensors` says what is wrong
        tensors["model"] = upgrade_state_dict(tensors["model"])
    return meta, tensors


def read_file(folder: Path, name: str, meta: Meta) -> bytes:
    """A file of a checkpoint, its digest checked where the format has one."""
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read ({error})") from error
    if meta.files.get(name) not in (None, sha256(content)):
        raise DamagedCheckpoint(f"checkpoint {folder}/{name} is not the file that was written (sha256 differs)")
    return content


def read_meta(folder: Path) -> Meta:
    """What state.json holds. Raises DamagedCheckpoint, and LaterFormat for one that is whole but of a later version."""
    where = f"checkpoint {folder}/state.json"
    try:
        record = json.loads((folder / "state.json").read_bytes())
        digest, version = record.pop("digest", None), record["format"]
        if digest not in (None, _digest_of(record)):
            raise DamagedCheckpoint(f"{where} is not the file that was written (sha256 differs)")
        if digest and version > FORMAT:
            raise LaterFormat(f"checkpoint {folder} has format {version}, newer than {FORMAT}; update lgm_dist")
        if version != (FORMAT if digest else 1):
            raise DamagedCheckpoint(f"{where} is of format {version!r} and should be of {FORMAT}")
        files = record["files"] if digest else {"state.pt": record["sha256"]}
        meta = Meta(TrainState(**record["state"]), record["config"], files, record["data"] if digest else "")
        good = _sound(meta) and (meta.state.step == step_of(folder) or not NAME.fullmatch(folder.name))
    except LaterFormat:
        raise
    except _UNREADABLE as error:
        raise DamagedCheckpoint(f"{where} cannot be read ({error})") from error
    if not good:
        raise DamagedCheckpoint(f"{where} cannot be read (a value of the wrong type, or of another step)")
    return meta


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(folder.name.removeprefix("step-"))


def _sound(meta: Meta) -> bool:
    """Whether the values are of the types that they should be of."""
    state = meta.state
    texts = [*meta.files.values(), meta.data]
    numbers = (state.val_accuracy, state.val_ci95)
    return (
        type(state.step) is int
        and state.step >= 0
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and "state.pt" in meta.files
        and isinstance(meta.config, dict)
    )


def config_of(folder: Path, meta: Meta) -> Config:
    """The configuration that a checkpoint was trained with. Raises ValueError for one that this version does not know."""
    try:
        return Config.from_dict(meta.config)
    except ValueError as error:
        raise ValueError(f"checkpoint {folder} has a configuration that this version does not read: {error}") from None


def check_tensors(folder: Path, tensors: Any, model: LGMNet, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raises DamagedCheckpoint unless the tensors are those of such a network and, where it is given, optimizer."""
    wanted = {name: _kind(tensor) for name, tensor in model.state_dict().items()}
    try:
        good = {name: _kind(tensor) for name, tensor in tensors["model"].items()} == wanted
        if good and optimizer:
            theirs, ours = tensors["optimizer"], optimizer.state_dict()
            of = [_kind(p) for group in optimizer.param_groups for p in group["params"]]
            groups, ours_groups = ([g["params"] for g in found["param_groups"]] for found in (theirs, ours))
            moments = [
                (_STEP if name == "step" else of[i], t) for i, m in theirs["state"].items() for name, t in m.items()
            ]
            good = groups == ours_groups and all(_kind(tensor) == kind for kind, tensor in moments)
    except (AttributeError, LookupError, TypeError, RuntimeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}/state.pt does not hold a network's tensors ({error})") from error
    if not good:
        raise DamagedCheckpoint(
            f"checkpoint {folder}/state.pt does not hold the tensors of its configuration's network"
        )


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What one tensor must have in common with another to take its place; a view of less memory than it shows is none."""
    shows = tensor.numel() * tensor.element_size()
    held = tensor.device.type == "meta" or tensor.untyped_storage().nbytes() >= shows
    return tensor.shape, tensor.dtype, tensor.layout, held


def _digest_of(record: dict[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode())


def sha256(content: bytes | memoryview) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()
