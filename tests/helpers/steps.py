"""Single steps of the task `episodes`, by configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lgm_dist.config import Config
from lgm_dist.data import EpisodeBatch, ImageBank
from lgm_dist.model import LGMNet
from lgm_dist.training import diagnosis, step
from lgm_dist.training.episodes_task import Episodes
from lgm_dist.training.tasks import Stage
from lgm_dist.training.worker import Worker


def episodes(config: Config, bank: ImageBank | None = None, worker: Worker | None = None) -> Episodes:
    """The task, on a training bank if one is given."""
    return Episodes(config, {"train": bank} if bank else {}, worker or Worker())


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: EpisodeBatch,
    config: Config,
    number: int,
    weight: float = 1.0,
) -> Tensor:
    """One optimizer step on a batch of episodes."""
    return step.train_step(episodes(config), model, optimizer, batch, number, weight)


def gradients(model: nn.Module, batch: EpisodeBatch, config: Config) -> Tensor:
    """The part of a step before the optimizer."""
    return step.gradients(episodes(config), model, batch)


def explain(model: LGMNet, batch: Any, config: Config, number: int, worker: Worker) -> str:
    """What the diagnosis says of a step."""
    return diagnosis.explain(Stage("episodes", episodes(config, worker=worker), 0), model, batch, number)
