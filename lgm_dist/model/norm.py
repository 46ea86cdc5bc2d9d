"""Normalisation over the global meta-batch, over a worker's slice of it, or over each episode; moving averages in evaluation.

Over the global meta-batch this is the paper's intertask normalisation (section 3.3 of arXiv 1905.06331; in the authors' code
plain batch normalisation over all images of all episodes). The module knows no process group: if the meta-batch is spread over
workers, set `all_reduce` to a function that sums a tensor over them in place.
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
Moments = tuple[Tensor, Tensor, float]
"""Mean (F,) and population variance (F,) of each channel, and the number of values of a channel."""
_VALUES_AT_ONCE = 16 * 1024


class Norm(nn.Module):
    """Normalises (n, F, h, w) with a learned scale and shift for each of F = `channels` channels.

    In training `running_mean` and `running_var` follow the statistics (variance Bessel-corrected, as in TensorFlow's fused
    kernel); they are equal on every worker at all times. In evaluation they take the place of the statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.kind = config.norm
        self.scope = config.norm_scope
        self.momentum = 1 - config.norm_decay
        self.epsilon = config.norm_epsilon
        self.groups = {"group": config.norm_groups, "instance": channels}.get(config.norm, 1)
        if channels % self.groups:
            raise ValueError(f"model.norm_groups ({self.groups}) must divide the {channels} channels of every layer")
        self.all_reduce: AllReduce | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        if config.norm == "batch":
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

    @property
    def uses_batch(self) -> bool:
        """True if it is in training and normalises with one mean and variance over all images that it gets."""
        return self.training and self.kind == "batch" and self.scope != "episode"

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, F, h, w), the images of `episodes` episodes, one episode after the other -> the same shape.

        Only scope episode in training reads `episodes`.
        """
        if self.kind != "batch":
            return torch.group_norm(x, self.groups, self.weight, self.bias, self.epsilon)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.epsilon)
        if self.scope == "episode":
            return self._per_episode(x, episodes)
        if self.scope == "global" and self.all_reduce is not None:
            return self._over_workers(x)
        return self._over_this_worker(x)

    def _over_this_worker(self, x: Tensor) -> Tensor:
        if self.all_reduce is None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.epsilon
            )
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.epsilon)
        self._move_averages(mean, var)
        return y

    def _over_workers(self, x: Tensor) -> Tensor:
        mean, var, count = self.track(*moments(x))
        y: Tensor = _NormOverWorkers.apply(
            x, self.weight, self.bias, *(m.to(self.weight.dtype) for m in (mean, var)), count, self
        )
        return y

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: float) -> Moments:
        """Move the averages towards this worker's moments; return the moments to normalise with. Not for scope episode."""
        if self.scope == "global" and self.all_reduce is not None:
            mean, var, count = _moments_over_workers(mean, var, count, self.all_reduce)
        unbiased = var * (count / max(count - 1, 1))
        if self.scope == "worker":
            self._move_averages(mean, unbiased)
        else:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, var, count

    def input_gradient(
        self, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor, mean: Tensor, var: Tensor, count: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """scale, slope, offset (F,): the gradient of the normalisation's input x is scale * grad + slope * x + offset.

        `grad_weight` and `grad_bias` are this worker's sums of grad * normalised x and of grad; `mean`, `var` and `count`
        are what `track` returned.
        """
        total = torch.stack([grad_weight, grad_bias]).double()  # (2, F)
        if self.scope == "global" and self.all_reduce is not None:
            self.all_reduce(total)
        mean_grad_x, mean_grad = (total / count).to(weight.dtype)  # (F,)
        # weight / std * (grad - mean_grad - x_normalised * mean_grad_x)
        inverse_std = torch.rsqrt(var + self.epsilon)
        scale = weight * inverse_std
        slope = -scale * inverse_std * mean_grad_x
        return scale, slope, -scale * mean_grad - slope * mean

    def _per_episode(self, x: Tensor, episodes: int) -> Tensor:
        x = x.to(self.weight.dtype)
        x5 = x.unflatten(0, (episodes, -1))  # (B, n, F, h, w)
        mean = x5.mean((1, 3, 4), keepdim=True)  # (B, 1, F, 1, 1)
        centred = x5 - mean  # (B, n, F, h, w)
        var = centred.square().mean((1, 3, 4), keepdim=True)  # (B, 1, F, 1, 1); torch.var_mean takes six times as long
        y = (centred * torch.rsqrt(var + self.epsilon)).flatten(0, 1)  # (B * n, F, h, w)
        count = x5.shape[1] * x5.shape[3] * x5.shape[4]
        with torch.no_grad():
            bessel = count / max(count - 1, 1)
            self._move_averages(mean.flatten(1).mean(0), var.flatten(1).mean(0) * bessel)  # (F,)
        scaled: Tensor = y * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled

    @torch.no_grad()
    def _move_averages(self, mean: Tensor, var: Tensor) -> None:
        """Move the averages towards the mean over the workers of their statistics."""
        statistics = torch.stack([mean, var, torch.ones_like(mean)])  # (3, F)
        if self.all_reduce is not None:
            self.all_reduce(statistics)
        statistics = statistics.to(self.running_mean.dtype)
        self.running_mean.lerp_(statistics[0] / statistics[2], self.momentum)
        self.running_var.lerp_(statistics[1] / statistics[2], self.momentum)


@torch.no_grad()
def moments(x: Tensor) -> Moments:
    """The moments of x (n, F, h, w) in float64, many times faster than torch.var_mean on a CPU."""
    size = max(_VALUES_AT_ONCE // (x.shape[2] * x.shape[3]), 1)
    return _union([_moments(piece) for piece in x.split(size)])


def _moments(x: Tensor) -> Moments:
    """The moments of a piece that fits into the cache, in two passes; bfloat16 is summed in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean((0, 2, 3))  # (F,)
    centred = x - mean[:, None, None]  # (n, F, h, w)
    correction = centred.mean((0, 2, 3)).double()  # (F,)
    var = centred.square_().mean((0, 2, 3)).double() - correction.square()  # (F,)
    return mean.double() + correction, var, x.numel() / x.shape[1]


def _union(parts: list[Moments]) -> Moments:
    """The moments of all values, from those of their parts."""
    means, variances = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])  # (p, F)
    counts = torch.tensor([part[2] for part in parts], dtype=means.dtype, device=means.device)[:, None]  # (p, 1)
    share = counts / counts.sum()  # (p, 1)
    mean = (share * means).sum(0)  # (F,)
    return mean, (share * (variances + (means - mean).square())).sum(0), sum(part[2] for part in parts)


def _moments_over_workers(mean: Tensor, var: Tensor, count: float, all_reduce: AllReduce) -> Moments:
    """The moments of the values of all workers, from those of each, in one collective.

    In float64, because the square of the mean is subtracted from the mean square.
    """
    n = torch.full_like(mean[:1], count)  # (1,)
    total = torch.cat([n, n * mean, n * (var + mean * mean)])  # (1 + 2F,)
    all_reduce(total)
    count = float(total[0])
    mean, square = (total[1:] / count).chunk(2)  # (F,)
    return mean, (square - mean * mean).clamp_min(0), count


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale (F,) * x (n, F, h, w) + shift (F,), in one pass."""
    return F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)


class _NormOverWorkers(torch.autograd.Function):
    """Batch normalisation with given statistics; its gradient takes into account that all workers' images made them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: float, norm: Norm
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.norm = count, norm
        return F.batch_norm(x, mean, var, weight, bias, eps=norm.epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, mean, var = ctx.saved_tensors
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.norm.epsilon, [False, True, True]
        )
        scale, slope, offset = ctx.norm.input_gradient(weight, grad_weight, grad_bias, mean, var, ctx.count)
        grad_x = affine(x, slope, offset).addcmul_(grad, scale.to(x.dtype)[:, None, None])  # (n, F, h, w)
        return grad_x, grad_weight, grad_bias, None, None, None, None
