"""LGM-Net: a network that reads the support set of an episode and generates the weights of a matching network for it.

Li et al., "LGM-Net: Learning to Generate Matching Networks for Few-Shot Learning", ICML 2019 (arXiv 1905.06331), as in the
authors' code (github.com/likesiwell/LGM-Net at 55c035f), vectorised over the episodes of a meta-batch.

    images (B, S + T, C, H, W) -> backbone -> feature maps (B, S + T, F, h, w)
    feature maps of the support images -> generator -> weights
    feature maps, weights -> generator -> maps (B, S + T, G, h', w') -> head -> log-probabilities (B, T, N)

Shape legend: see `lgm_dist.model.parts`, where the three parts are defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.backbones.conv4 import Conv4
from lgm_dist.model.norm import AllReduce, Norm
from lgm_dist.model.parts import (
    BACKBONES,
    GENERATORS,
    HEADS,
    Backbone,
    Generator,
    Head,
    UnequalGenerator,
    UnequalHead,
)

Parts = tuple[Backbone, Generator, Head]

FORMER_NAMES = {"extractor.": "backbone.", "context_encoder.": "generator.encoder.", "generators.": "generator.layers."}
"""How state_dict keys began in checkpoints written before the parts had names, and how they begin now."""


def build_model(config: ModelConfig, seed: int = 0) -> LGMNet:
    """The network that `config` names, with the initial weights of `seed`; torch's global generators stay as they are.

    Raises ValueError for a part that is not registered.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LGMNet(config)


class LGMNet(nn.Module):
    """Backbone, generator and head in one network; without an argument, the paper's.

    Call it as `model(support, query, ways, noise=None)`; see `forward`. `parts` are used instead of new ones.
    """

    def __init__(self, config: ModelConfig | None = None, parts: Parts | None = None) -> None:
        super().__init__()
        config = config or ModelConfig()
        self.config = replace(config, channels=config.channels or 3)
        self.backbone, self.generator, self.head = parts or _build_parts(self.config)
        self.classifier: nn.Linear | None = None
        """Average features of an image (n, F) -> logits (n, base_outputs) of the base classes; trained by pretraining alone."""
        if self.config.base_outputs and not parts:
            self.classifier = nn.Linear(self.backbone.channels, self.config.base_outputs)

    def forward(self, support: Tensor, query: Tensor, ways: int, noise: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, T, N) of the classes for each query image.

        support (B, S, C, H, W) float, class-major; query (B, T, C, H, W); noise (B, 2, Z), standard normal, for the
        generated weights, or None for their mean. Raises ValueError for shapes that do not fit.

        In training the queries take part in the backbone's batch statistics, as in the authors' code; the codes and the
        generated weights do not depend on them otherwise.
        """
        self._check(support, query, ways, noise)
        episodes, shots = support.shape[:2]
        images = torch.cat([support, query], dim=1).flatten(0, 1)  # (B * (S + T), C, H, W)
        features = self._features(images, episodes).unflatten(0, (episodes, -1))  # (B, S + T, F, h, w)
        codes = self.generator.encode(features[:, :shots].flatten(0, 1), episodes)  # (B * S, E)
        return self.classify(features, codes.unflatten(0, (episodes, shots)), ways, noise)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (n, C, H, W) -> feature maps (n, F, h, w) and codes (n, E) of the single images.

        For evaluation, where images do not influence each other: embed each image once, however many episodes use it.
        """
        assert not self.training, "in training the statistics tie the images of a meta-batch together"
        features = self._features(images, 1)  # (n, F, h, w)
        return features, self.generator.encode(features, 1)

    def classify(self, features: Tensor, codes: Tensor, ways: int, noise: Tensor | None = None) -> Tensor:
        """The part of `forward` after embedding: feature maps (B, S + T, F, h, w), support images first, and the codes of
        the support images (B, S, E), noise (B, 2, Z) or None -> log-probabilities (B, T, N)."""
        shots = codes.shape[1]
        weights = self.generator.generate(codes, ways, noise)
        maps = self.generator.transform(features, weights)  # (B, S + T, G, h', w')
        return self.head(maps[:, :shots], maps[:, shots:], ways)

    def logits(self, features: Tensor, codes: Tensor, shots: Sequence[int]) -> Tensor:
        """As `classify` with the noise at its mean, before the softmax and for classes of shots[c] support images each.

        A head that does not tell its logits gives its log-probabilities. Raises ValueError for unequal shots if a part of the
        network needs equal ones.
        """
        first, equal = codes.shape[1], len(set(shots)) == 1
        if not equal and (part := self.needs_equal_shots()):
            raise ValueError(f"{part} needs the same number of images of each class; give each class as many")
        if equal:
            weights = self.generator.generate(codes, len(shots), None)
        else:
            weights = cast(UnequalGenerator, self.generator).generate_unequal(codes, shots, None)
        maps = self.generator.transform(features, weights)  # (B, S + T, G, h', w')
        if hasattr(self.head, "logits"):
            return cast(UnequalHead, self.head).logits(maps[:, :first], maps[:, first:], shots)  # (B, T, N)
        return self.head(maps[:, :first], maps[:, first:], len(shots))  # (B, T, N)

    def needs_equal_shots(self) -> str:
        """The part that cannot take classes of unequal size, as messages name it; empty if both can."""
        if not hasattr(self.generator, "generate_unequal"):
            return f"model.generator ({self.config.generator!r})"
        return "" if hasattr(self.head, "logits") else f"model.head ({self.config.head!r})"

    def without_generator(self) -> LGMNet:
        """This network with its generator switched off; backbone and head are shared with it, not copied. After a generator
        that works on vectors, the head is a new one, with the generator's vectors.

        For evaluation: the difference between the two, over the same episodes, is what the generated weights add.
        """
        config = replace(self.config, generator="none")
        generator = GENERATORS.get("none")(config, channels_of(config, self.backbone))
        head = self.head
        if vectors := _vectors_of(self.generator):  # the head takes them over
            head = _build_head(config, generator)
            self._take_over(head, self.head)
            cast(Any, head).vectors = vectors
        return LGMNet(config, (self.backbone, generator, head)).train(self.training)

    def with_head(self, config: ModelConfig) -> LGMNet:
        """This network with head, rotations and blocks as `config` says; the backbone is shared, not copied.

        A generator with trained weights is shared too. One without takes the place of this network's, and both head and
        generator take over tensors of the same name and shape, such as a learned temperature. Raises ValueError as
        `build_model`, and for a generator or maps that the trained weights do not fit.
        """
        generator = self._generator_for(config)
        head = _build_head(config, generator)
        self._take_over(head, self.head)
        return LGMNet(config, (self.backbone, generator, head)).train(self.training)

    def _generator_for(self, config: ModelConfig) -> Generator:
        """The generator that `config` names: this network's, or a new one without trained weights."""
        ours = self.config
        if config.generator == ours.generator and _has_weights(self.generator):
            if (config.rotations, config.blocks) != (ours.rotations, ours.blocks):
                raise ValueError(
                    f"model.rotations ({config.rotations}) and model.blocks ({config.blocks}) must be {ours.rotations} and "
                    f"{ours.blocks}, for which the generator {ours.generator!r} was trained; use model.generator none"
                )
            return self.generator
        wanted = GENERATORS.get(config.generator)(config, channels_of(config, self.backbone))
        if _has_weights(wanted):
            raise ValueError(
                f"model.generator ({config.generator!r}) must be none, base_directions or the network's own, "
                f"{ours.generator}; another one takes training"
            )
        self._take_over(wanted, self.generator)
        return wanted

    def _take_over(self, part: Any, former: Any) -> None:
        """Move `part` to the network's device, with those tensors of `former` that have the name and shape of one of its."""
        new, old = part.state_dict(), former.state_dict()
        part.load_state_dict(new | {name: x for name, x in old.items() if name in new and x.shape == new[name].shape})
        part.to(next((p.device for p in self.parameters()), torch.device("cpu")))

    def on_features(self) -> LGMNet:
        """This network without its backbone: its images are feature maps (B, n, F, h, w), as `embed` returns them. Generator
        and head are shared with it, not copied."""
        channels = channels_of(self.config, self.backbone)
        bare = replace(self.config, rotations=1, blocks=1, map_size=0, base_outputs=0)
        config = replace(bare, backbone="none", channels=channels)
        backbone = BACKBONES.get("none")(config)
        return LGMNet(config, (backbone, self.generator, self.head)).train(self.training)

    def on_vectors(self) -> tuple[nn.Module, LGMNet] | None:
        """What makes vectors of maps (B, n, F, h, w) -> (B, n, D), and this network for maps (B, n, D, 1, 1) that are vectors.

        For evaluation, where an image is in many episodes and its vector is the same in all. None if the network compares maps
        as they are, or if its generator changes the maps before. The backbone and the statistics are shared, not copied.
        """
        vectors, generator, head = _vectors_of(self.generator), self.generator, self.head
        if vectors:
            generator = cast(Any, generator).on_vectors()
        elif self.config.generator == "none" and getattr(
            vectors := getattr(head, "vectors", None), "changes_images", False
        ):
            generator = GENERATORS.get("none")(self.config, cast(Any, vectors).size)
            head = HEADS.get(self.config.head)(_without_vectors(self.config), cast(Any, vectors).size)
            self._take_over(head, self.head)
        else:
            return None
        assert vectors is not None
        return vectors, LGMNet(self.config, (self.backbone, generator, head)).train(self.training)

    def reduce_over(self, all_reduce: AllReduce | None) -> None:
        """Take the normalisation's statistics over all workers: `all_reduce` sums a tensor over them in place."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.all_reduce = all_reduce

    def _features(self, images: Tensor, episodes: int) -> Tensor:
        turned = [rotated(images, r) for r in range(self.config.rotations)]
        maps = [m for x in turned for m in self._maps(x.contiguous(memory_format=torch.channels_last), episodes)]
        found = maps[0] if len(maps) == 1 else torch.cat(maps, 1)  # (n, R * F, h, w)
        size = self.config.map_size
        return F.adaptive_avg_pool2d(found, size) if size else found  # (n, R * F, size, size)

    def _maps(self, images: Tensor, episodes: int) -> list[Tensor]:
        """The backbone's maps of the images alone, (n, F, h, w) for each block that the head sees."""
        if self.config.blocks == 1:
            return [self.backbone(images, episodes)]
        assert isinstance(self.backbone, Conv4)
        return self.backbone.last_maps(images, episodes, self.config.blocks)

    def _check(self, support: Tensor, query: Tensor, ways: int, noise: Tensor | None) -> None:
        if support.ndim != 5 or query.ndim != 5 or support.shape[2:] != query.shape[2:] or len(support) != len(query):
            raise ValueError(
                f"support {tuple(support.shape)} and query {tuple(query.shape)} must be (B, S, C, H, W) and (B, T, C, H, W)"
            )
        if support.shape[2] != self.config.channels:
            raise ValueError(f"images have {support.shape[2]} channels, the model's channels is {self.config.channels}")
        if ways < 1 or support.shape[1] % ways:
            raise ValueError(f"ways ({ways}) must divide the {support.shape[1]} support images of an episode")
        if noise is not None and noise.shape != (len(support), 2, self.config.noise_size):
            raise ValueError(f"noise {tuple(noise.shape)} must be {(len(support), 2, self.config.noise_size)}")


def channels_of(config: ModelConfig, backbone: Backbone) -> int:
    """Channels of the maps that generator and head get. Raises ValueError for blocks that the backbone does not give."""
    if config.blocks > 1 and not isinstance(backbone, Conv4):
        raise ValueError(
            f"model.blocks ({config.blocks}) needs the backbone conv4, not {config.backbone!r}; use --model.blocks 1"
        )
    return backbone.channels * config.rotations * config.blocks


def rotated(images: Tensor, turns: int) -> Tensor:
    """Images (n, C, H, W), square, rotated counter-clockwise by `turns` times 90 degrees."""
    return images.rot90(turns, (2, 3)) if turns else images


def upgrade_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state_dict with today's keys; `tensors` may have those of an earlier version, see FORMER_NAMES."""
    return {_todays_name(name): tensor for name, tensor in tensors.items()}


def _todays_name(name: str) -> str:
    for former, today in FORMER_NAMES.items():
        if name.startswith(former):
            return today + name.removeprefix(former)
    return name


def _build_parts(config: ModelConfig) -> Parts:
    backbone = BACKBONES.get(config.backbone)(config)
    generator = GENERATORS.get(config.generator)(config, channels_of(config, backbone))
    return backbone, generator, _build_head(config, generator)


def _build_head(config: ModelConfig, generator: Generator) -> Head:
    """The head that `config` names. After a generator that works on vectors, it takes them as they are."""
    if _vectors_of(generator):
        config = _without_vectors(config)
        if config.head == "ridge":
            raise ValueError(
                f"model.head ('ridge') compares the places of maps, and model.generator ({config.generator!r}) has none; use "
                "another head, or --model.generator none"
            )
    return HEADS.get(config.head)(config, generator.channels)


def _has_weights(generator: Generator) -> bool:
    """Return True if the generator has weights to train."""
    return any(True for _ in cast(nn.Module, generator).parameters())


def _without_vectors(config: ModelConfig) -> ModelConfig:
    """`config` for a head that gets vectors and takes them as they are."""
    return replace(config, pool=0, power=1.0, centre=False, shrinkage=1.0, rotations=1, blocks=1)


def _vectors_of(generator: Generator) -> nn.Module | None:
    """What makes vectors of maps, if the generator does so in the place of the head."""
    return getattr(generator, "vectors", None)
