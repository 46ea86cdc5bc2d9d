"""The feature banks of a network whose backbone is frozen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.features import FeatureBank, open_features
from lgm_dist.model import LGMNet
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.worker import Worker

_AFTER = (
    "generator",
    "head",
    "pool",
    "power",
    "centre",
    "shrinkage",
    "base_share",
    "episode_share",
    "kernels",
    "noise_size",
    "weight_norm",
    "base_outputs",
)
"""Settings of the network that do not change the features."""


@torch.no_grad()
def features_of(model: LGMNet, bank: ImageBank, config: Config, worker: Worker) -> FeatureBank:
    """The features of the bank's images under the backbone of `model`, which lies on the worker's device.

    They are computed once, on all cores or on the GPU, and stored in the cache folder. The mode of the model (training or
    evaluation) stays as it was. Raises ValueError as `open_features`.
    """
    network = model.without_generator()  # its codes take no time

    def embed(images: Tensor) -> Tensor:
        worker.heartbeat()
        return network.embed(images.to(worker.device))[0]  # (m, F, h, w)

    was_training = model.training
    network.eval()
    try:
        with arithmetic(), _all_cores():
            return open_features(bank, config, embed, backbone_digest(model), worker.heartbeat)
    finally:
        network.train(was_training)


def backbone_digest(model: LGMNet) -> str:
    """sha256 (hex) of the backbone's weights and statistics and of the settings that may change the features."""
    kind = type(model.backbone)
    settings = {k: v for k, v in dataclasses.asdict(model.config).items() if k not in _AFTER}
    digest = hashlib.sha256(json.dumps([kind.__module__, kind.__qualname__, settings]).encode())
    assert isinstance(model.backbone, torch.nn.Module)
    for name, tensor in model.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _all_cores() -> Iterator[None]:
    """torch uses all cores of the machine: other workers of this node wait meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
