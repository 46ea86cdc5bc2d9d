"""A projection of each episode towards the subspace of its class means, in closed form, with generated shrinkage."""

from __future__ import annotations

import torch
from torch import Tensor

from lgm_dist.config import ModelConfig
from lgm_dist.model.class_level import STATISTICS, ClassLevel, gram_statistics, small_network
from lgm_dist.model.parts import Weights, register_generator


@register_generator("projection")
class Projection(ClassLevel):
    """x - s * (d - P d), d = x - m, P = M^T (M M^T + r * I)^-1 M, at each place of a map.

    M (N, F) are the class means less their mean m. What does not separate the classes is shrunk by s. A small network
    generates s and the ridge r from statistics of the Gram matrix; s starts at 0 and r at the mean of the matrix's diagonal.
    """

    def __init__(self, _config: ModelConfig, channels: int) -> None:
        super().__init__(channels)
        self.network = small_network(STATISTICS, 2)

    def weights(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """codes (B, N, K, F) -> M (B, N, F), (M M^T + r * I)^-1 M (B, N, F), m (B, F), s (B,)."""
        means = codes.mean(2)  # (B, N, F)
        centre = means.mean(1)  # (B, F)
        rows = means - centre[:, None]  # (B, N, F)
        share, ridge = self.network(gram_statistics(codes)).unbind(1)  # (B,)
        gram = rows @ rows.transpose(1, 2)  # (B, N, N)
        size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)  # (B,)
        ridge = (size * ridge.clamp(-9, 9).exp())[:, None, None] * torch.eye(
            gram.shape[1], dtype=gram.dtype, device=gram.device
        )  # (B, N, N)
        return rows, torch.linalg.solve_ex(gram + ridge, rows)[0], centre, share.tanh()

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, n, F, h, w) -> (B, n, F, h, w)."""
        ((rows, solved, centre, share),) = weights
        x = features.movedim(2, -1)  # (B, n, h, w, F)
        d = (x - centre[:, None, None, None]).flatten(1, 3)  # (B, n * h * w, F)
        outside = d - d @ rows.transpose(1, 2) @ solved  # (B, n * h * w, F)
        return features - (share[:, None, None] * outside).view(x.shape).movedim(-1, 2)  # (B, n, F, h, w)
