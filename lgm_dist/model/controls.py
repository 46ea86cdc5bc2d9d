"""Networks that show what a generator's weights add: see also `LGMNet.without_generator`."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lgm_dist.model.lgmnet import LGMNet
from lgm_dist.model.parts import Generator, Weights


class OtherContext(nn.Module):
    """A generator that gives each episode of a batch the weights of the episode before it, and the first those of the last.

    A batch needs two episodes.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.channels = generator.channels
        if vectors := getattr(generator, "vectors", None):
            self.vectors = vectors

    def on_vectors(self) -> OtherContext:
        """See `BaseDirections`."""
        return OtherContext(cast(Any, self.generator).on_vectors())

    def encode(self, features: Tensor, episodes: int) -> Tensor:
        """As the generator."""
        return self.generator.encode(features, episodes)

    def generate(self, codes: Tensor, ways: int, noise: Tensor | None) -> Weights:
        """The generator's weights from the codes (B, S, E) of the other episodes. Raises ValueError for one episode alone."""
        if len(codes) < 2:
            raise ValueError(
                "context=other needs two episodes in a batch; lower the number of workers, or leave it out"
            )
        return self.generator.generate(codes.roll(1, 0), ways, noise)

    def transform(self, features: Tensor, weights: Weights) -> Tensor:
        """As the generator."""
        return self.generator.transform(features, weights)


def with_other_context(model: LGMNet) -> LGMNet:
    """`model` with the weights that another episode's support images generate; all parts are shared with it, not copied.

    For evaluation: if a generator uses what is in an episode, this is worse than `model`, over the same episodes.
    """
    parts = (model.backbone, OtherContext(model.generator), model.head)
    return LGMNet(model.config, parts).train(model.training)
