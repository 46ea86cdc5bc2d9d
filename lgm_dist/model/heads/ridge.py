"""Dense matching: how well a class's support maps reconstruct a query's map (Wertheimer et al., "Few-shot classification with
feature map reconstruction networks", CVPR 2021).

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, P places of a map, G
channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.vectors import Vectors
from lgm_dist.model.layers import unit
from lgm_dist.model.parts import register_head


@register_head("ridge")
class Ridge(nn.Module):
    """Softmax of minus the mean squared residual of ridge regression from a class's K * P vectors to each of the query's P,
    times a learned temperature. Penalty and size of the reconstruction are learned too.

    Vectors are of single places, so `model.centre` and `model.shrinkage` take statistics over all places.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.vectors = Vectors(config, channels, places=True)
        self.temperature = nn.Parameter(torch.tensor(10.0))
        self.log_penalty = nn.Parameter(torch.tensor(2.0))
        self.log_size = nn.Parameter(torch.tensor(0.0))

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """support (B, S, G, h, w), query (B, T, G, h, w) -> log-probabilities (B, T, N)."""
        return self.logits(support, query, [support.shape[1] // ways] * ways).log_softmax(-1)  # (B, T, N)

    def logits(self, support: Tensor, query: Tensor, shots: Sequence[int]) -> Tensor:
        """See `UnequalHead`."""
        s, q = unit(self.vectors(support)), unit(self.vectors(query))  # (B, S, P, G), (B, T, P, G)
        if len(set(shots)) == 1:
            groups = [s.unflatten(1, (len(shots), -1))]  # (B, N, K, P, G)
        else:
            groups = [part[:, None] for part in s.split(list(shots), 1)]  # each (B, 1, K, P, G)
        with torch.autocast(s.device.type, enabled=False):
            residuals = torch.cat(
                [self._residuals(g.flatten(2, 3), q.flatten(1, 2)) for g in groups], 1
            )  # (B, N, T * P)
        distances = residuals.unflatten(2, q.shape[1:3]).mean(3).transpose(1, 2)  # (B, T, N)
        logits: Tensor = -self.temperature * distances  # (B, T, N)
        return logits

    def _residuals(self, s: Tensor, q: Tensor) -> Tensor:
        """Vectors of the classes (B, N, R, G), R = K * P, and of the queries (B, T * P, G) -> squared residuals
        (B, N, T * P), from inner products alone."""
        count, channels = s.shape[2:]
        penalty, size = count / channels * self.log_penalty.exp(), self.log_size.exp()
        gram = s @ s.transpose(2, 3) + penalty * torch.eye(count, dtype=s.dtype, device=s.device)  # (B, N, R, R)
        products = s @ q[:, None].transpose(2, 3)  # (B, N, R, T * P)
        shares = torch.cholesky_solve(products, torch.linalg.cholesky_ex(gram).L)  # (B, N, R, T * P)
        dot = (shares * products).sum(2)  # (B, N, T * P): of the query with its reconstruction
        length = dot - penalty * shares.square().sum(2)  # (B, N, T * P): squared, of the reconstruction
        residuals: Tensor = q.square().sum(2)[:, None] - 2 * size * dot + size**2 * length  # (B, N, T * P)
        return residuals
