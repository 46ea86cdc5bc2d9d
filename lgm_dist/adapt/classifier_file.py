"""The file of a classifier: that of its learner (see `learner_file`), with what is kept of the labelled photos.

The header's record has `classifier`: the names of the classes, their shots and the report. A tensor `means` (N, D) holds the
class means, or `maps` (S, F, h, w) the support maps, class by class, if the network needs more than means.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lgm_dist.adapt import learner_file
from lgm_dist.adapt.examples import Examples, compares_means, embed, mean_of
from lgm_dist.adapt.learner import Learner
from lgm_dist.adapt.photos import MOST_CLASSES
from lgm_dist.adapt.report import Report
from lgm_dist.model import LGMNet

_PREFIX = "classes."
_WRITER = "Classifier.save"


def write(path: Path, learner: Learner, examples: Mapping[str, Examples], report: Report | None, rank: int) -> Path:
    """Write a classifier; see `Classifier.save`."""
    packed = learner_file.pack(learner.contents(), rank)
    # A whitening that is cut to `rank` gives vectors in other directions, so means are those of the network in the file
    model = learner_file.unpack(path, packed).model
    kept = _means(model, examples) if compares_means(learner.model) else _maps(examples)
    shots = [example.shots for example in examples.values()]
    record = {"names": list(examples), "shots": shots, "report": report.to_dict() if report else None}
    return learner_file.write(
        path, learner_file.Packed({**packed.tensors, **kept}, {**packed.record, "classifier": record})
    )


def read(path: Path) -> tuple[Learner, dict[str, Examples], Report | None]:
    """The learner, the examples and the report in the file of a classifier.

    Raises ValueError for another file, a damaged one, or one of a later version.
    """
    with learner_file.plain_errors(path, "classifier", _WRITER):
        tensors, record = learner_file.read_packed(path)
        if "classifier" not in record:
            raise learner_file.Refused(f"{path} is the file of a learner; load it with lgm_dist.load, then adapt it")
        kept = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_PREFIX)}
        contents = learner_file.unpack(path, learner_file.Packed(tensors, record))
        learner = Learner(str(path), *contents)
        names, shots, report = _facts(record["classifier"])
        examples = _examples(learner, kept, shots)
        return learner, dict(zip(names, examples, strict=True)), report


def _means(model: LGMNet, examples: Mapping[str, Examples]) -> dict[str, torch.Tensor]:
    means = [example.mean if e is None else e for example in examples.values() for e in [_mean_again(model, example)]]
    return {f"{_PREFIX}means": torch.stack([mean for mean in means if mean is not None]).float().cpu()}


def _mean_again(model: LGMNet, example: Examples) -> torch.Tensor | None:
    """The class mean of this network, if the maps are at hand."""
    return None if example.maps is None else mean_of(model, example.maps.cpu())


def _maps(examples: Mapping[str, Examples]) -> dict[str, torch.Tensor]:
    maps = [example.maps for example in examples.values() if example.maps is not None]
    return {f"{_PREFIX}maps": torch.cat(maps).half().cpu()}  # (S, F, h, w)


def _facts(values: dict[str, Any]) -> tuple[list[str], list[int], Report | None]:
    """The names, shots and report. Raises ValueError for values that a classifier cannot have."""
    names, shots = values["names"], values["shots"]
    good = all(isinstance(name, str) for name in names) and all(type(k) is int and k > 0 for k in shots)
    if not good or not 2 <= len(set(names)) == len(names) == len(shots) <= MOST_CLASSES:
        raise ValueError("its names and shots are not those of classes")
    report = Report.from_dict(values["report"]) if values["report"] else None
    if report and (list(report.shots) != names or list(report.classes) != names):
        raise ValueError("its report is about other classes")
    return names, shots, report


def _examples(learner: Learner, kept: dict[str, torch.Tensor], shots: list[int]) -> list[Examples]:
    """The examples of each class. Raises ValueError for tensors that do not fit the network."""
    blank = np.zeros((1, *learner.shape), np.uint8)
    maps = embed(learner, blank, labelled=False).query  # (1, F, h, w), for the shapes
    if compares_means(learner.model):
        means = kept[f"{_PREFIX}means"]
        wanted = mean_of(learner.model, maps)
        assert wanted is not None
        if means.shape != (len(shots), *wanted.shape) or means.dtype != torch.float32 or not means.isfinite().all():
            raise ValueError("its class means do not fit its network")
        return [Examples(k, mean, None) for k, mean in zip(shots, means, strict=True)]
    support = kept[f"{_PREFIX}maps"].float()
    if support.shape != (sum(shots), *maps.shape[1:]) or not support.isfinite().all():
        raise ValueError("its support maps do not fit its network")
    return [Examples(len(part), None, part) for part in support.split(shots)]
