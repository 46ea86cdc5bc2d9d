"""The vectors of an image that a head compares: its maps, pooled, to a power, centred and whitened as the settings say.

Shape legend: B episodes, n images, R parts of a map (rotations times blocks), G channels of a map, one part after the other,
h x w its size, p x p its size after pooling, D values of a vector: G * p * p, or G for a vector of each place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.layers import unit

_TINY = 1e-12


class Vectors(nn.Module):
    """Maps -> vectors: pooling, power, centring, whitening, each as `config` asks for it; none of them by default.

    With several rotations or blocks, each has a whitening of its own, and its part of the vector is scaled to L2 norm 1.

    Centring subtracts the mean over the base classes' images. Whitening multiplies by the inverse square root of
    (1 - s) C + s t I, with s = config.shrinkage, C the covariance within the base classes and t its mean eigenvalue, and by the
    root of t. Both need `fit`; before it they change nothing. What `fit` finds belongs to the state_dict.

    Args:
        places: Give a vector (G,) for each place of a map instead of one (D,) for the image.

    Raises ValueError for statistics of maps whose size is not known.
    """

    mean: Tensor
    """(D,): over the images of the base classes."""
    whitening: Tensor
    """(R, D / R, D / R), symmetric; (D, D) for one part."""

    def __init__(self, config: ModelConfig, channels: int, *, places: bool = False) -> None:
        super().__init__()
        self.pool, self.power, self.shrinkage, self.places = config.pool, config.power, config.shrinkage, places
        self.centred, self.whitened, self.parts = config.centre, config.shrinkage < 1, config.rotations * config.blocks
        if self.needs_statistics and not (config.pool or places):
            raise ValueError(
                f"model.pool (0) must be 1, 2, 3 or 4 for model.centre ({config.centre}) or model.shrinkage "
                f"({config.shrinkage}), whose statistics need maps of a known size; use --model.pool 2"
            )
        size = channels if places else channels * config.pool**2
        self.size = size
        if self.centred:
            self.register_buffer("mean", torch.zeros(size))
        if self.whitened:
            identity = torch.eye(size // self.parts)
            self.register_buffer("whitening", identity.repeat(self.parts, 1, 1) if self.parts > 1 else identity)

    @property
    def changes_images(self) -> bool:
        """Whether a vector is more than an image's map as it is, and is one vector of the whole image."""
        changes = self.pool or self.power != 1 or self.centred or self.whitened or self.parts > 1
        return bool(changes) and not self.places

    @property
    def needs_statistics(self) -> bool:
        """Whether `fit` has something to find."""
        return self.centred or self.whitened

    def forward(self, maps: Tensor) -> Tensor:
        """maps (B, n, G, h, w) -> (B, n, D), or (B, n, p * p, G) for vectors of places; bfloat16 becomes float32."""
        x = self._powered(maps)
        if self.centred:
            x = x - self.mean
        if self.parts == 1:
            return self._whitened(x, self.whitening) if self.whitened else x
        parts = list(x.chunk(self.parts, -1))  # each (B, n, D / R) or (B, n, p * p, G / R)
        if self.whitened:
            parts = [self._whitened(part, w) for part, w in zip(parts, self.whitening, strict=True)]
        return torch.cat([unit(part) for part in parts], -1)

    @torch.no_grad()
    def fit(self, maps: Tensor, labels: Tensor) -> None:
        """Find mean and whitening from images of the base classes: maps (n, G, h, w) and labels (n,) from 0 on."""
        x = self._powered(maps[None])[0].double()  # (n, D) or (n, p * p, G)
        if self.places:
            labels = labels.repeat_interleave(x.shape[1])  # (n * p * p,)
            x = x.flatten(0, 1)  # (n * p * p, G)
        if self.centred:
            self.mean.copy_(x.mean(0))
        if self.whitened:
            found = [_whitening(covariance_within(part, labels), self.shrinkage) for part in x.chunk(self.parts, 1)]
            self.whitening.copy_(torch.stack(found) if self.parts > 1 else found[0])

    def _whitened(self, x: Tensor, whitening: Tensor) -> Tensor:
        """x (..., D), whitening (D, D) -> (..., D), in full precision under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            return x @ whitening.T

    def _powered(self, maps: Tensor) -> Tensor:
        """The vectors before centring."""
        x = maps.float() if maps.dtype == torch.bfloat16 else maps
        if self.pool:
            x = F.adaptive_avg_pool2d(x.flatten(0, 1), self.pool).unflatten(0, x.shape[:2])  # (B, n, G, p, p)
        x = x.flatten(3).transpose(2, 3) if self.places else x.flatten(2)  # (B, n, p * p, G) or (B, n, D)
        if self.power != 1:
            x = x.sign() * x.abs().clamp_min(_TINY).pow(self.power)  # the root's gradient at 0 is infinite
        return x


def covariance_within(x: Tensor, labels: Tensor) -> Tensor:
    """Vectors (n, D) and their classes (n,) -> the pooled covariance within the classes (D, D)."""
    counts = labels.bincount()  # (classes,)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, labels, x)  # (classes, D)
    rest = x - (sums / counts.clamp_min(1)[:, None])[labels]  # (n, D)
    return rest.T @ rest / max(len(x) - int((counts > 0).sum()), 1)  # (D, D)


def _whitening(covariance: Tensor, shrinkage: float) -> Tensor:
    """The symmetric inverse square root of the shrunk covariance, relative to its mean eigenvalue: (D, D) -> (D, D)."""
    relative = covariance / covariance.diagonal().mean().clamp_min(_TINY)  # (D, D)
    values, vectors = torch.linalg.eigh(relative)  # (D,), (D, D)
    shrunk = (1 - shrinkage) * values.clamp_min(0) + shrinkage  # (D,)
    root: Tensor = (vectors * shrunk.rsqrt()) @ vectors.T  # (D, D)
    return root


def means_of_classes(x: Tensor, shots: Sequence[int]) -> Tensor:
    """Vectors of support images (B, S, D), class-major, shots[c] of class c -> class means (B, N, D)."""
    if len(set(shots)) == 1:
        means: Tensor = x.unflatten(1, (len(shots), -1)).mean(dim=2)  # (B, N, D)
        return means
    return torch.stack([part.mean(1) for part in x.split(list(shots), 1)], 1)  # (B, N, D)


def cosine_similarities(query: Tensor, others: Tensor) -> Tensor:
    """query (B, T, D), others (B, n, D) -> (B, T, n) in [-1, 1]; 0 for a vector of zeros.

    In full precision, also under autocast and with tf32: similarities differ by less than bfloat16 or tf32 resolve.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, others = unit(query), unit(others)
        if query.is_cuda:
            return (query.double() @ others.double().transpose(1, 2)).to(query.dtype)  # (B, T, n)
        return query @ others.transpose(1, 2)  # (B, T, n)
