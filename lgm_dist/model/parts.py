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
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

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
    the backbone's channels F."""

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


Part = TypeVar("Part")
Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(Generic[Part]):
    """The factories of one kind of part, by name."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._factories: dict[str, Callable[..., Part]] = {}

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """A decorator that registers a class or function under `name`. Raises ValueError if another one has the name."""

        def add(factory: Factory) -> Factory:
            known = self._factories.setdefault(name, factory)
            if _origin(known) != _origin(factory):
                raise ValueError(f"{self._kind} {name!r} is registered already; choose another name")
            self._factories[name] = factory
            return factory

        return add

    def build(self, name: str, *arguments: Any) -> Part:
        """The part `name`, made from `arguments`. Raises ValueError for a name that is not registered."""
        if name not in self._factories:
            known = ", ".join(sorted(self._factories))
            raise ValueError(
                f"model.{self._kind} ({name!r}) must be one of {known}; a {self._kind} of your own needs its module "
                f"imported, with @register_{self._kind}({name!r})"
            )
        return self._factories[name](*arguments)


def _origin(factory: Callable[..., Any]) -> tuple[str, str]:
    """Where a factory is defined: the same again if a notebook's cell or a module runs twice."""
    return getattr(factory, "__module__", ""), getattr(factory, "__qualname__", repr(factory))


BACKBONES: Registry[Backbone] = Registry("backbone")
GENERATORS: Registry[Generator] = Registry("generator")
HEADS: Registry[Head] = Registry("head")
register_backbone, register_generator, register_head = BACKBONES.register, GENERATORS.register, HEADS.register
