"""Multinomial logistic regression, fitted to each episode's support images (as in Tian et al., "Rethinking few-shot image
classification", ECCV 2020).

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, D values of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.vectors import Vectors
from lgm_dist.model.layers import unit
from lgm_dist.model.parts import register_head

PENALTY = 1.0
"""Weight of half the squared L2 norm of the weights beside the sum of the losses (scikit-learn's 1 / C)."""
ITERATIONS = 100
"""They bring probabilities to within 1e-4 of the optimum's, for 3 to 20 ways and 1 to 50 shots."""
_BOUND = 0.5
"""No eigenvalue of the Hessian of a softmax loss by its logits is larger."""


@register_head("logistic")
class Logistic(nn.Module):
    """Regression on vectors of L2 norm 1, with an L2 penalty on the weights and none on the intercepts.

    The Hessian has a constant upper bound (Böhning, "Multinomial logistic regression algorithm", 1992), so each iteration is a
    ridge regression with the same matrix, and the loss never rises. It works on inner products: the cost does not grow with D.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.vectors = Vectors(config, channels)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """support (B, S, G, h, w), query (B, T, G, h, w) -> log-probabilities (B, T, N)."""
        return self.logits(support, query, [support.shape[1] // ways] * ways).log_softmax(-1)  # (B, T, N)

    def logits(self, support: Tensor, query: Tensor, shots: Sequence[int]) -> Tensor:
        """See `UnequalHead`. Each support image has the same weight."""
        s, q = unit(self.vectors(support)), unit(self.vectors(query))  # (B, S, D), (B, T, D)
        numbers = torch.arange(len(shots), device=s.device)
        each = numbers.repeat_interleave(torch.tensor(shots, device=s.device), output_size=sum(shots))  # (S,)
        with torch.autocast(s.device.type, enabled=False):
            return _logits(s, q, F.one_hot(each, len(shots)).to(s.dtype))  # (B, T, N)


def _logits(s: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    """support (B, S, D), queries (B, T, D), one-hot labels (S, N) -> logits of the queries (B, T, N)."""
    centre = s.mean(1, keepdim=True)  # (B, 1, D): the intercepts make up for it
    s, q = s - centre, q - centre
    gram = s @ s.transpose(1, 2)  # (B, S, S)
    penalised = gram + PENALTY / _BOUND * torch.eye(gram.shape[1], dtype=s.dtype, device=s.device)
    factor = torch.linalg.cholesky_ex(penalised).L  # (B, S, S)
    smoother = torch.cholesky_solve(gram, factor) + 1 / gram.shape[1]  # (B, S, S): targets -> fitted logits
    targets = torch.zeros_like(gram[..., :1]).expand(-1, -1, labels.shape[1])  # (B, S, N)
    for _ in range(ITERATIONS):
        logits = smoother @ targets  # (B, S, N)
        targets = logits + (labels - logits.softmax(-1)) / _BOUND
    weights = torch.cholesky_solve(targets - targets.mean(1, keepdim=True), factor)  # (B, S, N)
    return q @ (s.transpose(1, 2) @ weights) + targets.mean(1, keepdim=True)  # (B, T, N)
