"""The files of a checkpoint, and whether they still hold what was written. They load without executing anything.

state.json has `format`, `state`, `config`, `files` (digests by name), `data` (the manifest's digest), `images` (see
`ImageFacts`; checkpoints of the first version lack it) and `digest`, that of the record without it. A later format keeps
`format` and `digest` as they are.
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
from lgm_dist.data.episodes import statistics
from lgm_dist.data.streamed import BaseImages
from lgm_dist.model import LGMNet, upgrade_state_dict
from lgm_dist.training.evaluation import Evaluation

FORMAT = 2
"""Version of the format that is written. A newer one is refused."""
_NAME = re.compile(r"step-([0-9]{8,18})")
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
_STEP = ((), torch.float32, torch.strided, True)
"""The kind (see `_kind`) of the number of steps that an optimizer keeps with each parameter."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    val_accuracy: float = -1.0
    """Accuracy of this very checkpoint on val, in 0 to 1; -1 if it was not evaluated."""
    val_ci95: float = 0.0
    """Half-width of the 95 % interval of `val_accuracy`."""
    stage: int = 0
    """Number of the stage that the last of the steps belongs to."""

    @property
    def rank(self) -> tuple[bool, int, float]:
        """The larger, the better: evaluated before not evaluated, later stages before earlier ones, then by accuracy."""
        return self.val_accuracy >= 0, self.stage, self.val_accuracy

    @classmethod
    def after(cls, step: int, val: Evaluation | None, stage: int = 0) -> TrainState:
        """The state after `step` steps, the last one of stage `stage`, and possibly an evaluation on val."""
        return cls(step, val.score.accuracy, val.score.ci95, stage) if val else cls(step, stage=stage)


@dataclass(frozen=True)
class ImageFacts:
    """What the network has to know about images, so that a copied checkpoint is enough to use it."""

    mean: tuple[float, ...]
    """Per channel, on the 0 to 255 scale."""
    std: tuple[float, ...]
    height: int
    width: int
    channels: int
    classes: tuple[str, ...]
    """Names of the base classes."""

    @classmethod
    def of(cls, base: BaseImages, config: Config) -> ImageFacts:
        """The facts of the train split, normalised as the protocol does."""
        return cls(*statistics(base, config), *base.shape, base.classes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageFacts:
        """Read what JSON has made of the facts."""
        mean, std, classes = (tuple(values[name]) for name in ("mean", "std", "classes"))
        return cls(mean, std, values["height"], values["width"], values["channels"], classes)


class DamagedCheckpoint(Exception):
    """The files of a checkpoint are missing, unreadable or not those that were written."""


class LaterFormat(ValueError):
    """Only a later version can read the checkpoint."""


@dataclass(frozen=True)
class Meta:
    """What state.json holds."""

    state: TrainState
    config: dict[str, Any]
    files: dict[str, str]
    """sha256 of each other file (hex)."""
    data: str
    """sha256 of the manifest of the data set (hex), empty if it is not known."""
    images: ImageFacts | None = None
    """None for checkpoints of the first version."""

    def write(self, folder: Path) -> None:
        """Write state.json into `folder`."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(record | {"digest": _digest_of(record)}, indent=1)
        (folder / "state.json").write_text(text + "\n")


def read(folder: Path) -> tuple[Meta, dict[str, Any]]:
    """The content of state.json, and the tensors of state.pt, whose structure is not checked yet."""
    meta = read_meta(folder)
    content = read_file(folder, "state.pt", meta)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            if sum(info.file_size for info in file.infolist()) > len(content):
                raise ValueError("it is compressed, unlike torch's own files, and could unpack to any size")
        tensors = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # a file made to do harm can raise almost anything
        raise DamagedCheckpoint(f"checkpoint {folder}/state.pt holds more than tensors and is not loaded") from error
    with contextlib.suppress(AttributeError, LookupError, TypeError):  # `check_tensors` says what is wrong
        tensors["model"] = upgrade_state_dict(tensors["model"])
    return meta, tensors


def read_file(folder: Path, name: str, meta: Meta) -> bytes:
    """The content of a file of a checkpoint, after a check of its digest."""
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read ({error})") from error
    if meta.files.get(name) != sha256(content):
        raise DamagedCheckpoint(f"checkpoint {folder}/{name} is not the file that was written (sha256 differs)")
    return content


def read_meta(folder: Path) -> Meta:
    """The content of state.json. Raises DamagedCheckpoint, or LaterFormat for a whole one of a later version."""
    where = f"checkpoint {folder}/state.json"
    try:
        record = json.loads((folder / "state.json").read_bytes())
        digest, version = record.pop("digest", None), record["format"]
        if digest != _digest_of(record):
            raise DamagedCheckpoint(f"{where} is not the file that was written (sha256 differs)")
        if version > FORMAT:
            raise LaterFormat(f"checkpoint {folder} has format {version}, newer than {FORMAT}; update lgm_dist")
        if version != FORMAT:
            raise DamagedCheckpoint(f"{where} has format {version!r} instead of {FORMAT}")
        images = ImageFacts.from_dict(record["images"]) if record.get("images") else None
        meta = Meta(TrainState(**record["state"]), record["config"], record["files"], record["data"], images)
        good = _sound(meta) and step_of(folder) in (None, meta.state.step)
    except LaterFormat:
        raise
    except _UNREADABLE as error:
        raise DamagedCheckpoint(f"{where} cannot be read ({error})") from error
    if not good:
        raise DamagedCheckpoint(f"{where} cannot be read (a value of the wrong type, or of another step)")
    return meta


def folder_name(step: int) -> str:
    """The name of the folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def sound(state: TrainState) -> bool:
    """Return True if the values have the right types."""
    numbers = (state.val_accuracy, state.val_ci95)
    finite = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    return type(state.step) is int and state.step >= 0 and finite


def _sound(meta: Meta) -> bool:
    """Return True if the values have the right types."""
    texts = [*meta.files.values(), meta.data]
    return (
        sound(meta.state)
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
