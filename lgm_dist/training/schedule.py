"""The optimizers of the stages and their learning rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from lgm_dist.config import Config, PretrainingConfig

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


def pretraining_optimizer(module: nn.Module, config: PretrainingConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum and an L2 penalty, or AdamW, for the parameters of `module`."""
    parameters = list(module.parameters())
    if config.optimizer == "adam":
        return torch.optim.AdamW(
            parameters, config.lr, betas=BETAS, eps=EPSILON, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
        fused=True,
    )


def pretraining_rate(config: PretrainingConfig, step: int) -> float:
    """The learning rate of step `step` of the stage (from 0): linear warm-up, then half a cosine to 0, or steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / (config.steps - config.warmup)
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr * 0.1 ** sum(step >= round(share * config.steps) for share in config.milestones)
