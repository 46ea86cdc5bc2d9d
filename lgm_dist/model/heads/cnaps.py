"""Distances to class means by the covariances of the episode (Bateni et al., "Improved few-shot visual classification", CVPR
2020: Simple CNAPS).

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, D values of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.vectors import Vectors
from lgm_dist.model.layers import unit
from lgm_dist.model.parts import register_head


@register_head("cnaps")
class Cnaps(nn.Module):
    """Softmax of minus half the squared Mahalanobis distances to the class means.

    The covariance of class k is K / (K + 1) S_k + 1 / (K + 1) S + I, with S_k that of its support images and S that of all, of
    vectors of L2 norm 1. After whitening (`model.shrinkage`) the identity is the covariance within the base classes.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.vectors = Vectors(config, channels)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """support (B, S, G, h, w), query (B, T, G, h, w) -> log-probabilities (B, T, N)."""
        return self.logits(support, query, [support.shape[1] // ways] * ways).log_softmax(-1)  # (B, T, N)

    def logits(self, support: Tensor, query: Tensor, shots: Sequence[int]) -> Tensor:
        """See `UnequalHead`."""
        s, q = unit(self.vectors(support)), unit(self.vectors(query))  # (B, S, D), (B, T, D)
        if len(set(shots)) == 1:
            groups = [s.unflatten(1, (len(shots), -1))]  # (B, N, K, D)
        else:
            groups = [part[:, None] for part in s.split(list(shots), 1)]  # each (B, 1, K, D)
        with torch.autocast(s.device.type, enabled=False):
            return torch.cat([-_distances(group, s, q) / 2 for group in groups], -1)  # (B, T, N)


def _distances(classes: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """Squared Mahalanobis distances (B, T, N) of queries (B, T, D) to the means of classes (B, N, K, D); s (B, S, D) are the
    support images of all classes.

    A covariance I + A A', A (D, S + K), has the inverse I - A (I + A' A)^-1 A' (Woodbury), so no D x D matrix is needed.
    """
    images, (ways, shot) = s.shape[1], classes.shape[1:3]
    share = shot / (shot + 1)
    means = classes.mean(2)  # (B, N, D)
    own = (classes - means[:, :, None]) * (share / max(shot - 1, 1)) ** 0.5  # (B, N, K, D)
    all_images = (s - s.mean(1, keepdim=True)) * ((1 - share) / (images - 1)) ** 0.5  # (B, S, D)
    a = torch.cat([own, all_images[:, None].expand(-1, ways, -1, -1)], dim=2)  # (B, N, K + S, D)
    rest = q[:, None] - means[:, :, None]  # (B, N, T, D)
    inner = a @ a.transpose(2, 3) + torch.eye(a.shape[2], dtype=a.dtype, device=a.device)  # (B, N, K + S, K + S)
    along = torch.linalg.solve_triangular(
        torch.linalg.cholesky_ex(inner).L, a @ rest.transpose(2, 3), upper=False
    )  # (B, N, K + S, T)
    distances: Tensor = rest.square().sum(3) - along.square().sum(2)  # (B, N, T)
    return distances.transpose(1, 2)  # (B, T, N)
