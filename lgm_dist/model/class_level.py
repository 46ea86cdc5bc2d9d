"""What generators share that work at the level of classes: their means, and how these lie to each other.

They see class means, not directions of single images, and treat all classes alike: another order of the classes gives the same
weights in that order. Shapes as in `lgm_dist.model.parts`; codes are the averages of maps, so E = F.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgm_dist.model.layers import unit
from lgm_dist.model.parts import Weights

STATISTICS = 5
"""Numbers of `gram_statistics`."""
_SMALL = 1e-6


class ClassLevel(nn.Module, ABC):
    """Base of generators that read the average of each map and return maps of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, features: Tensor, _episodes: int) -> Tensor:
        """features (n, F, h, w) -> averages (n, F)."""
        return features.mean(dim=(2, 3))  # (n, F)

    def generate(self, codes: Tensor, ways: int, _noise: Tensor | None) -> Weights:
        """codes (B, S, F) -> weights, in full precision also under autocast."""
        with torch.autocast(codes.device.type, enabled=False):
            full = codes.float() if codes.dtype in (torch.bfloat16, torch.float16) else codes
            return [self.weights(full.unflatten(1, (ways, -1)))]  # (B, N, K, F)

    @abstractmethod
    def weights(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes by class (B, N, K, F) -> the weights."""

    @abstractmethod
    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, S + T, F, h, w) -> (B, S + T, F, h, w)."""


class ClassShift(ClassLevel):
    """A generator that moves the class means: it adds a vector of each class to its support features. Queries stay."""

    def weights(self, codes: Tensor) -> tuple[Tensor, ...]:
        """codes (B, N, K, F) -> the shift of each support image (B, S, F)."""
        return (self.shift(codes).repeat_interleave(codes.shape[2], dim=1),)  # (B, N * K, F)

    @abstractmethod
    def shift(self, codes: Tensor) -> Tensor:
        """codes (B, N, K, F) -> shifts of the classes (B, N, F)."""

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """features (B, S + T, F, h, w) -> the same with shifted support images."""
        ((shift,),) = weights
        shots = shift.shape[1]
        moved = features[:, :shots] + shift[..., None, None].to(features.dtype)  # (B, S, F, h, w)
        return torch.cat([moved, features[:, shots:]], dim=1)  # (B, S + T, F, h, w)


def shifts_of_means(generator: ClassShift, codes: Tensor, shots: Sequence[int]) -> Weights:
    """What `generate` returns for classes of shots[c] images each, if the generator reads the class means alone."""
    shift = generator.generate(class_means(codes, shots), len(shots), None)[0][0]  # (B, N, F)
    return [(shift.repeat_interleave(torch.tensor(shots, device=shift.device), dim=1),)]  # (B, S, F)


def class_means(codes: Tensor, shots: Sequence[int]) -> Tensor:
    """Codes (B, S, F), class-major, shots[c] of class c -> means (B, N, F)."""
    return torch.stack([part.mean(1) for part in codes.split(list(shots), 1)], 1)  # (B, N, F)


def cosines(means: Tensor) -> Tensor:
    """Class means (B, N, F) -> their cosines (B, N, N): the Gram matrix of the means at length 1."""
    return unit(means) @ unit(means).transpose(1, 2)


def gram_statistics(codes: Tensor) -> Tensor:
    """codes (B, N, K, F) -> (B, 5): what the Gram matrix of the class means says, for any order of classes and channels.

    Mean and standard deviation of the cosines between classes, the spread of the lengths of the means relative to their mean,
    1 / K and 1 / N.
    """
    n, k = codes.shape[1:3]
    means = codes.mean(2)  # (B, N, F)
    # A class alone, of which a head's statistics are taken, counts as its own neighbour.
    matrix = cosines(means) if n > 1 else means.new_ones(len(means), 2, 2)  # (B, N, N)
    n = max(n, 2)
    # Without the first, each row of N + 1 ends with an element of the diagonal
    between = matrix.flatten(1)[:, 1:].unflatten(1, (n - 1, n + 1))[..., :-1].flatten(1)  # (B, N * (N - 1))
    lengths = means.norm(dim=-1)  # (B, N)
    spread = deviation(lengths) / lengths.mean(1).clamp_min(_SMALL)
    sizes = [torch.full_like(spread, 1 / size) for size in (k, codes.shape[1])]
    return torch.stack([between.mean(1), deviation(between), spread, *sizes], dim=1)  # (B, 5)


def deviation(x: Tensor) -> Tensor:
    """Standard deviation over the last dimension (divided by n); its gradient is finite where it is 0."""
    return (x.var(-1, correction=0) + _SMALL**2).sqrt()


def small_network(inputs: int, outputs: int, hidden: int = 32) -> nn.Sequential:
    """Two layers; the outputs are 0 at the start."""
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), last)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without biases whose outputs are 0 at the start."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(layer.weight)
    return layer
