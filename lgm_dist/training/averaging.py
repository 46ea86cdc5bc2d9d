"""Exponential moving averages of an optimizer's weights. They are part of its state, so checkpoints hold them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

_AVERAGE = "average"


def keep_averages(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Move the averages of all weights after each step of the optimizer: a <- decay * a + (1 - decay) * weight."""
    optimizer.register_step_post_hook(partial(_move, decay))


def exchange(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the weights and their averages; a second call undoes the first."""
    with torch.no_grad():
        for weight, average in _pairs(optimizer):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


@torch.no_grad()
def _move(decay: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for weight, average in _pairs(optimizer):
        average.lerp_(weight, 1 - decay)


def _pairs(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight with its average, which begins as the weight itself after the first step."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state[weight]
            if _AVERAGE not in state:
                state[_AVERAGE] = weight.detach().clone()
            yield weight, state[_AVERAGE]
