"""The three parts of a network, each chosen by name: backbone, generator, head. The interfaces and the registries.

A part is an `nn.Module` with the attributes and methods of its interface below; no base class is needed. Register it under a
name and put that name into `ModelConfig`:

    @register_backbone("tiny")
    class Tiny(nn.Module):
        def __init__(self, config: ModelConfig) -> None:
            super().__init__()
            self.channels = 16
            self.conv = nn.Conv2d(config.channels, 16, 3, stride=4)

        def forward(self, images: Tensor, episodes: int) -> Tensor:
            return self.conv(images).relu()

    model = build_model(ModelConfig(backbone="tiny"))

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, n images, C image channels,
F and G channels of feature maps, h x w their size, E length of a code, Z noise size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from lgm_dist.registry import Registry

Weights = Sequence[tuple[Tensor, ...]]
"""Generated weights: one tuple of tensors (B, ...) for each generated layer, the layer's kernel first."""


class Backbone(Protocol):
    """Images to feature maps. Registered as a function of the `ModelConfig`."""

    channels: int
    """F: channels of the feature maps."""

    def __call__(self, images: Tensor, episodes: int, /) -> Tensor:
        """images (n, C, H, W), channels last in memory -> feature maps (n, F, h, w).

        The images are those of `episodes` episodes, one episode after the other; `Norm` takes this number.
        """


class Generator(Protocol):
    """Support features to weights, and all features through these weights. Registered as a function of the `ModelConfig` and
    the backbone's channels F.

    A generator with trained weights that needs to know the base classes has a method `fit(mean, weights)` too; one without is
    a `Fitted`. The task `generator` calls `fit(mean, weights)` before its first step, with the mean of their features (F,) and
    the weights (base_outputs, F) of the classifier of pretraining, or None without one. Keep what it stores in buffers, so that
    checkpoints hold it.
    """

    channels: int
    """G: channels of the maps that `transform` returns."""

    def encode(self, features: Tensor, episodes: int, /) -> Tensor:
        """Feature maps (n, F, h, w) of the support images of `episodes` episodes -> codes (n, E), one for each image.

        An evaluation encodes each image once and uses the code in every episode that has the image. E may be 0.
        """

    def generate(self, codes: Tensor, ways: int, noise: Tensor | None, /) -> Weights:
        """Codes of the support images (B, S, E), class-major, and noise (B, 2, Z) or None (its mean) -> weights."""

    def transform(self, features: Tensor, weights: Weights, /) -> Tensor:
        """Feature maps (B, S + T, F, h, w), support images first, -> maps (B, S + T, G, h', w')."""


class Head(Protocol):
    """Maps of support and query images to log-probabilities. Registered as a function of the `ModelConfig` and the
    generator's channels G."""

    def __call__(self, support: Tensor, query: Tensor, ways: int, /) -> Tensor:
        """support (B, S, G, h', w'), class-major, and query (B, T, G, h', w') -> log-probabilities (B, T, N).

        Under autocast the maps may be bfloat16; the result is float32.
        """


class UnequalHead(Head, Protocol):
    """A head that knows its answer before the softmax, for classes with any number of support images."""

    def logits(self, support: Tensor, query: Tensor, shots: Sequence[int], /) -> Tensor:
        """support (B, S, G, h', w'), class-major, shots[c] images of class c, query (B, T, G, h', w') -> (B, T, N), whose
        log_softmax is the answer, with all classes equally probable a priori."""


class UnequalGenerator(Generator, Protocol):
    """A generator that takes classes with any number of support images."""

    def generate_unequal(self, codes: Tensor, shots: Sequence[int], noise: Tensor | None, /) -> Weights:
        """As `generate`, for shots[c] support images of class c."""


@runtime_checkable
class Fitted(Protocol):
    """A generator, a head, or a module of a head with statistics of the base classes, which it keeps as buffers.

    A generator of this kind has no trained weights, and its maps may have any size."""

    needs_statistics: bool
    """Whether `fit` has something to find."""

    def fit(self, maps: Tensor, labels: Tensor, /) -> None:
        """Find the statistics from images of the base classes: the backbone's maps (n, F, h, w) and labels (n,) from 0 on."""


BACKBONES: Registry[Callable[..., Backbone]] = Registry("backbone", "model.backbone", "lgm_dist.model.backbones")
GENERATORS: Registry[Callable[..., Generator]] = Registry("generator", "model.generator", "lgm_dist.model.generators")
HEADS: Registry[Callable[..., Head]] = Registry("head", "model.head", "lgm_dist.model.heads")
register_backbone, register_generator, register_head = BACKBONES.register, GENERATORS.register, HEADS.register
