"""The optimizer of an episodic stage and its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from lgm_dist.config import Config

BETAS, EPSILON = (0.9, 0.999), 1e-8


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam as in TensorFlow (see `set_rates`), with decoupled weight decay if configured."""
    optim = config.optim
    return torch.optim.AdamW(
        model.parameters(), optim.lr, betas=BETAS, eps=EPSILON, weight_decay=optim.weight_decay, fused=True
    )


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step `step` (from 0): lr_decay to the power of the finished lr_decay_steps, at least lr_min."""
    optim = config.optim
    return max(optim.lr * optim.lr_decay ** (step // optim.lr_decay_steps), optim.lr_min)


def set_rates(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Set learning rate, weight decay and epsilon for step `step` (from 0).

    TensorFlow adds epsilon to the square root of the second moment before the bias correction, torch after it; the epsilon
    set here makes both the same. Weight decay is set too, because a checkpoint that is taken over from another trial of a
    sweep brings that trial's along.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
        group["weight_decay"] = config.optim.weight_decay
        group["eps"] = EPSILON / (1 - BETAS[1] ** (step + 1)) ** 0.5
