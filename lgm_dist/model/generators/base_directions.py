"""Class weights in closed form: class means, corrected by how the base classes differ and seen from the episode's centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lgm_dist.config import ModelConfig
from lgm_dist.model.heads.vectors import Vectors, means_of_classes
from lgm_dist.model.layers import unit
from lgm_dist.model.parts import Weights, register_generator

DIRECTIONS = 16
"""Directions of the base classes that are kept."""


@register_generator("base_directions")
class BaseDirections(nn.Module):
    """Nothing in it is trained: `fit` finds the directions, and two numbers of the settings say how far they count.

    It works on the head's vectors, that is after pooling, power, centring and whitening (`Vectors`). The weight vector of a
    class with mean m, length 1, of K images is

        w = m + (s / K) * unit(sum over j of sqrt(l_j / l_1) * <m, v_j> * v_j),

    v_j being the principal directions of the means of the base classes, l_j their variances and s = config.base_share: a class
    that is known from few images is assumed to lie where base classes lie. Weights and queries, at length 1, are then compared
    from c = config.episode_share * the mean of the w of the episode's classes, instead of 0.
    """

    directions: Tensor
    """(16, D): v_j, each times the fourth root of l_j / l_1; zeros if there are fewer."""
    needs_statistics = True

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        if not config.pool:
            raise ValueError(
                "model.pool (0) must be 1, 2, 3 or 4 for model.generator base_directions, whose vectors need maps of a known "
                "size; set model.pool to 2"
            )
        self.vectors, self._config = Vectors(config, channels), config
        self.base_share, self.episode_share = config.base_share, config.episode_share
        self.channels = channels * config.pool**2
        self.register_buffer("directions", torch.zeros(DIRECTIONS, self.channels))

    @torch.no_grad()
    def fit(self, maps: Tensor, labels: Tensor) -> None:
        """Find the statistics of `vectors` and the directions from images of the base classes, as `Fitted`."""
        if self.vectors.needs_statistics:
            self.vectors.fit(maps, labels)
        x = torch.cat([self.vectors(piece[None])[0] for piece in maps.split(1000)])  # (n, D)
        counts = labels.bincount()  # (classes,)
        means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, labels, x)[counts > 0]  # (classes, D)
        means /= counts[counts > 0, None]
        _, lengths, found = torch.linalg.svd(means - means.mean(0), full_matrices=False)  # (r,), (r, D)
        shares = (lengths / lengths[0].clamp_min(1e-12))[:DIRECTIONS, None]  # (r, 1), sqrt(l_j / l_1)
        self.directions.zero_()
        self.directions[: len(shares)] = shares.sqrt() * found[:DIRECTIONS]

    def on_vectors(self) -> BaseDirections:
        """This generator for maps (n, D, 1, 1) that are vectors already; `directions` are shared with it."""
        plain = replace(self._config, pool=1, power=1.0, centre=False, shrinkage=1.0, rotations=1, blocks=1)
        found = BaseDirections(plain, self.channels)
        found.directions = self.directions
        return found

    def encode(self, features: Tensor, _episodes: int) -> Tensor:
        """features (n, F, h, w) -> vectors (n, D)."""
        x: Tensor = self.vectors(features[None])[0]
        return x

    def generate(self, codes: Tensor, ways: int, noise: Tensor | None) -> Weights:
        """codes (B, S, D) -> shift of each support image (B, S, D) and centre (B, D), in full precision."""
        return self.generate_unequal(codes, [codes.shape[1] // ways] * ways, noise)

    def generate_unequal(self, codes: Tensor, shots: Sequence[int], _noise: Tensor | None) -> Weights:
        """See `UnequalGenerator`."""
        with torch.autocast(codes.device.type, enabled=False):
            means, counts = means_of_classes(codes, shots), torch.tensor(shots, device=codes.device)  # (B, N, D), (N,)
            weights, centre = self.class_weights(means, counts)  # (B, N, D), (B, D)
            shift = means.norm(dim=-1, keepdim=True) * weights - means  # (B, N, D)
            return [(shift.repeat_interleave(counts, dim=1, output_size=codes.shape[1]), centre)]

    def class_weights(self, means: Tensor, shots: Tensor) -> tuple[Tensor, Tensor]:
        """Class means (B, N, D) of `shots` (N,) images -> their weights w - c (B, N, D) and the centre c (B, D)."""
        m = unit(means)  # (B, N, D)
        moved = unit(m @ self.directions.T @ self.directions)  # (B, N, D)
        weights = m + self.base_share / shots[:, None] * moved  # (B, N, D)
        centre = self.episode_share * weights.mean(1)  # (B, D)
        return weights - centre[:, None], centre

    def centred(self, features: Tensor, centre: Tensor) -> Tensor:
        """Maps of queries (B, T, F, h, w) and the centre (B, D) -> vectors that are compared with class weights (B, T, D)."""
        return unit(self.vectors(features)) - centre[:, None]  # (B, T, D)

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, S + T, F, h, w) -> vectors as maps (B, S + T, D, 1, 1)."""
        ((shift, centre),) = weights
        shots = shift.shape[1]
        support = self.vectors(features[:, :shots]) + shift  # (B, S, D)
        return torch.cat([support, self.centred(features[:, shots:], centre)], dim=1)[..., None, None]
