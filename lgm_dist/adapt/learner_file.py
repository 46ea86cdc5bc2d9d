"""The file of a learner: tensors as safetensors, with the configuration and the facts of images as JSON in its header.

It is small (conv4 with the head of `--preset strong`: under 1 MB), and reading it executes nothing. The header's `lgm_dist`
has `format`, `config`, `state` and `images`, as the state.json of a checkpoint, and `calibration` if there is one. The file of
a classifier is one of a learner too, with more tensors and `classifier` in the header (see `classifier_file`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from lgm_dist.config import SETTINGS, Config, marked
from lgm_dist.model import LGMNet
from lgm_dist.runs.checkpoint_files import DamagedCheckpoint, ImageFacts, TrainState, check_tensors, sound
from lgm_dist.runs.files import write_bytes
from lgm_dist.training.calibration import Calibration

FORMAT = 1
"""Version of the format that is written. A newer one is refused."""
MOST_SIDE = 4096
"""Largest height and width of images that a file may claim; they are memory of whoever reads it."""
RANK = 48
"""Components of each whitening matrix that are kept."""
_HALF = ("backbone.", "generator.")
"""What the names of tensors that are kept in half precision begin with."""
_RANK_PARTS = (".bulk", ".scales", ".components")
"""What the names of the three tensors that stand for a whitening matrix end with."""


class Contents(NamedTuple):
    """What the file of a learner holds."""

    model: LGMNet
    config: Config
    state: TrainState
    images: ImageFacts
    calibration: Calibration | None = None


class Packed(NamedTuple):
    """What is written: tensors by name, and the record of the header."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def pack(contents: Contents, rank: int = RANK) -> Packed:
    """What the file of a learner holds; the classifier of the base classes is left out.

    Args:
        contents: The learner; what its configuration says of data, run and machine is left out but for the names and the seed.
        rank: Components of each whitening matrix that are kept.

    Raises ValueError for a rank below 0.
    """
    model, config, state, images, calibration = contents
    if rank < 0:
        raise ValueError(f"rank ({rank}) must be at least 0, which keeps nothing of a whitening")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("classifier."):
            continue
        if name.endswith(".whitening") and rank < tensor.shape[-1]:
            tensors |= zip((name + part for part in _RANK_PARTS), low_rank(tensor, rank), strict=True)
        else:
            tensors[name] = tensor.half() if _fits_half(name, tensor) else tensor
    record = {
        "format": FORMAT,
        "config": _portable(config).to_dict(),
        "state": dataclasses.asdict(state),
        "images": dataclasses.asdict(images),
    }
    return Packed(tensors, record | ({"calibration": calibration.to_dict()} if calibration else {}))


def write(path: Path, packed: Packed) -> Path:
    """Write `packed` beside its place, rename it and return the path. Raises OSError if the file cannot be written."""
    header = {"lgm_dist": json.dumps(packed.record | {"sha256": _digest_of(packed.tensors)})}
    write_bytes(path, to_bytes({name: x.contiguous() for name, x in packed.tensors.items()}, header))
    return path


def read(path: Path) -> Contents:
    """Read the file of a learner; the network is in evaluation mode, on the CPU.

    Raises ValueError for another file, a damaged one, or one of a later version.
    """
    with plain_errors(path, "learner", "Learner.save"):
        packed = read_packed(path)
        if "classifier" in packed.record:
            raise Refused(f"{path} is the file of a classifier; load it with lgm_dist.Classifier.load")
        return unpack(path, packed)


def read_packed(path: Path) -> Packed:
    """What a file holds. Raises `Refused` for one of a later version; see `plain_errors` for others."""
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {})["lgm_dist"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    if record["format"] > FORMAT:
        raise Refused(f"{path} has format {record['format']}, newer than {FORMAT}; update lgm_dist")
    if record.pop("sha256") != _digest_of(tensors):
        raise ValueError("its tensors are not those that were written, sha256 differs")
    return Packed(tensors, record)


def unpack(path: Path, packed: Packed) -> Contents:
    """The learner in what a file holds; see `plain_errors` for what is raised if there is none."""
    record = packed.record
    config, state = _portable(Config.from_dict(record["config"])), TrainState(**record["state"])
    images = ImageFacts.from_dict(record["images"])
    numbers = [*images.mean, *images.std]
    finite = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    if not sound(state) or not finite or len(numbers) != 2 * images.channels:
        raise ValueError("a value of the wrong type in its header")
    if not (1 <= min(images.height, images.width) <= max(images.height, images.width) <= MOST_SIDE):
        raise ValueError(f"images of {images.width} x {images.height}")
    calibration = Calibration.from_dict(record["calibration"]) if record.get("calibration") else None
    with torch.device("meta"):  # takes no memory, however large the network that the file claims to hold
        claimed = _network(config)
    tensors = _expanded(packed.tensors, claimed.state_dict())
    check_tensors(path, {"model": tensors}, claimed)
    model = _network(config)
    model.load_state_dict(tensors)
    return Contents(model.eval(), config, state, images, calibration)


def _network(config: Config) -> LGMNet:
    """The network without the classifier of the base classes."""
    model = LGMNet(config.model)
    model.classifier = None
    return model


def _fits_half(name: str, tensor: Tensor) -> bool:
    """Return True for a weight tensor of backbone or generator whose values half precision can hold."""
    if not name.startswith(_HALF) or tensor.dtype != torch.float32 or tensor.dim() < 2:
        return False
    return bool(tensor.half().isfinite().all())


def _digest_of(tensors: dict[str, Tensor]) -> str:
    """sha256 (hex) of the names and contents of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Refused(ValueError):
    """The file is whole, but for another reader."""


@contextmanager
def plain_errors(path: Path, what: str, writer: str) -> Iterator[None]:
    """Turn what reading a wrong or damaged file raises into a ValueError of one sentence."""
    try:
        yield
    except Refused:
        raise
    except FileNotFoundError:
        raise ValueError(f"the file {path} does not exist; write one with {writer}") from None
    except OSError as error:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name the file of a {what}, written with {writer}") from None
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); name a file that you may read") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path} is not the file of a {what} ({error}); write it with {writer}") from None


_UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError),
    *(safetensors.SafetensorError, DamagedCheckpoint),
)


def low_rank(whitening: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """An approximation of whitening matrices W (..., D, D), from which `from_low_rank` makes matrices again.

    Returns, of the symmetric square root of W^T W, the mean of the eigenvalues that are left out (..., 1), the `rank` smallest
    (..., rank), and their eigenvectors (..., rank, D) in half precision. Shrinkage gives all directions of little variance
    about the same large eigenvalue; the small ones belong to those of much variance.
    """
    w = whitening.double()  # not symmetric in checkpoints of earlier versions
    values, vectors = torch.linalg.eigh(w.mT @ w)  # ascending; (..., D), (..., D, D)
    roots = values.clamp_min(0).sqrt()  # (..., D)
    bulk = roots[..., rank:].mean(-1, keepdim=True)  # (..., 1)
    return bulk.float(), roots[..., :rank].float(), vectors[..., :rank].mT.half()


def from_low_rank(bulk: Tensor, scales: Tensor, components: Tensor) -> Tensor:
    """bulk (..., 1), scales (..., rank), components (..., rank, D) -> whitening matrices (..., D, D)."""
    v = components.float()
    identity = torch.eye(v.shape[-1])
    return bulk[..., None] * identity + v.mT @ ((scales - bulk)[..., None] * v)


def _expanded(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network from those of a file. Raises ValueError for a whitening of another size than in `wanted`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, dot, last = name.rpartition(".")
        if stem.endswith(".whitening"):
            if dot + last == _RANK_PARTS[0]:
                components, matrix = tensors[stem + _RANK_PARTS[2]].shape, wanted[stem].shape
                if (*components[:-2], components[-1]) != (*matrix[:-2], matrix[-1]):
                    raise ValueError(f"{stem} of the shape {tuple(components)}")
                found[stem] = from_low_rank(*(tensors[stem + part] for part in _RANK_PARTS))
        else:
            found[name] = tensor.float() if tensor.dtype == torch.float16 else tensor
    return found


def _portable(config: Config) -> Config:
    """The configuration without what concerned the machine, and without paths and other runs."""
    elsewhere = {*marked("resumable"), "start", "pretraining.teacher"} - {"name", "plugins", "epochs"}
    plain = {name: SETTINGS[name].default for name in elsewhere}
    return config.replace(**plain, data=config.data.name.rsplit("/", 1)[-1].removesuffix(".json"))
