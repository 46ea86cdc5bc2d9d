"""Normalisation over the global meta-batch, the worker's slice of it, or each episode; moving averages in evaluation.

With statistics over the global meta-batch this is the paper's intertask normalisation (section 3.3 of arXiv 1905.06331; in
the authors' code plain batch normalisation over all images of all episodes). The module knows no process group: where the
meta-batch is spread over workers, `all_reduce` is set from outside to a function that sums a tensor over them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over all workers, in place."""


class Norm(nn.Module):
    """Normalises (n, F, h, w) with a learned scale and shift per channel.

    In training `running_mean` and `running_var` follow the statistics (variance Bessel-corrected, as in TensorFlow's fused
    kernel); they are equal on every worker at all times. In evaluation they take the place of the statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.norm
        self.scope = config.norm_scope
        self.momentum = 1 - config.norm_decay
        self.epsilon = config.norm_epsilon
        self.groups = {"group": config.norm_groups, "instance": config.filters}.get(config.norm, 1)
        self.all_reduce: AllReduce | None = None
        self.weight = nn.Parameter(torch.ones(config.filters))
        self.bias = nn.Parameter(torch.zeros(config.filters))
        if config.norm == "batch":
            self.register_buffer("running_mean", torch.zeros(config.filters))
            self.register_buffer("running_var", torch.ones(config.filters))

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, F, h, w), the images of `episodes` episodes one after the other -> the same shape."""
        if self.kind != "batch":
            return torch.group_norm(x, self.groups, self.weight, self.bias, self.epsilon)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.epsilon)
        if self.scope == "episode":
            return self._per_episode(x, episodes)
        if self.scope == "global" and self.all_reduce is not None:
            return self._over_workers(x, self.all_reduce)
        return self._over_this_worker(x)

    def _over_this_worker(self, x: Tensor) -> Tensor:
        if self.all_reduce is None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.epsilon
            )
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.epsilon)
        self._follow(mean, var)
        return y

    def _over_workers(self, x: Tensor, all_reduce: AllReduce) -> Tensor:
        mean, var, count = _global_statistics(x, all_reduce)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        y: Tensor = _NormOverWorkers.apply(x, self.weight, self.bias, mean, var, count, self.epsilon, all_reduce)
        return y

    def _per_episode(self, x: Tensor, episodes: int) -> Tensor:
        x5 = x.unflatten(0, (episodes, -1))  # (B, n, F, h, w)
        var, mean = torch.var_mean(x5, dim=(1, 3, 4), correction=0, keepdim=True)  # (B, 1, F, 1, 1)
        y = ((x5 - mean) * torch.rsqrt(var + self.epsilon)).flatten(0, 1)  # (B * n, F, h, w)
        count = x5.shape[1] * x5.shape[3] * x5.shape[4]
        with torch.no_grad():
            bessel = count / max(count - 1, 1)
            self._follow(mean.flatten(1).mean(0), var.flatten(1).mean(0) * bessel)  # (F,)
        scaled: Tensor = y * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """Moves the averages towards this worker's statistics, averaged over the workers."""
        statistics = torch.stack([mean, var, torch.ones_like(mean)])  # (3, F)
        if self.all_reduce is not None:
            self.all_reduce(statistics)
        self.running_mean.lerp_(statistics[0] / statistics[2], self.momentum)
        self.running_var.lerp_(statistics[1] / statistics[2], self.momentum)


@torch.no_grad()
def _global_statistics(x: Tensor, all_reduce: AllReduce) -> tuple[Tensor, Tensor, float]:
    """Mean (F,) and population variance (F,) of x (n, F, h, w) over all workers, and the number of values of a channel.

    One collective; in float64, so that the mean's square may be taken off the mean square.
    """
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)  # (F,)
    mean, var = mean.double(), var.double()
    count = torch.full_like(mean[:1], x.numel() / x.shape[1])  # (1,)
    total = torch.cat([count, count * mean, count * (var + mean * mean)])  # (1 + 2F,)
    all_reduce(total)
    n = float(total[0])
    mean, square = (total[1:] / n).chunk(2)  # (F,)
    return mean.to(x.dtype), (square - mean * mean).clamp_min(0).to(x.dtype), n


class _NormOverWorkers(torch.autograd.Function):
    """Batch normalisation with given statistics, whose gradient knows that every worker's images made the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: float,
        epsilon: float,
        all_reduce: AllReduce,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.epsilon, ctx.all_reduce = count, epsilon, all_reduce
        return F.batch_norm(x, mean, var, weight, bias, eps=epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, mean, var = ctx.saved_tensors
        # In its evaluation mode the native kernel gives just the two sums needed: of grad * normalised x, and of grad.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.epsilon, [False, True, True]
        )
        total = torch.stack([grad_weight, grad_bias]).double()  # (2, F)
        ctx.all_reduce(total)
        mean_grad_x, mean_grad = (total / ctx.count).to(x.dtype)  # (F,)
        # weight / std * (grad - mean_grad - x_normalised * mean_grad_x), written as scale * grad + (slope * x + offset)
        inverse_std = torch.rsqrt(var + ctx.epsilon)
        scale = weight * inverse_std
        slope = -scale * inverse_std * mean_grad_x
        offset = -scale * mean_grad - slope * mean
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        affine = F.batch_norm(x, zero, one, slope, offset, eps=0.0)  # (n, F, h, w)
        return affine.addcmul_(grad, scale[:, None, None]), grad_weight, grad_bias, None, None, None, None, None
