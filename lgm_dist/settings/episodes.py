"""The settings of episodes and of their evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from lgm_dist import checks
from lgm_dist.settings.mark import LENGTH, TARGET, TARGET_SHAPE, Protocol, Split, setting


class EpisodeShape(NamedTuple):
    """The size of an episode."""

    ways: int
    """N: classes."""
    shot: int
    """K: support images of each class."""
    query: int
    """Query images of each class; under protocol paper, of one class only."""
    queries: int
    """T: query images of the episode."""


@dataclass(frozen=True)
class EpisodesConfig:
    """The episodes, how many of them, and how they are evaluated."""

    ways: int = setting(5, basic=True, costly=True)
    """Classes of an episode."""
    shot: int = setting(1, basic=True, costly=True)
    """Support images of each class."""
    query: int = setting(1, costly=True)
    """Query images of each class in training. Time and memory of a step grow with ways * (shot + query). Protocol paper
    always has one query an episode."""
    protocol: Protocol = setting("standard", not_searched=TARGET)
    """standard: no label-dependent augmentation. paper: the authors' own pipeline, which rotates the query with its
    class and so LEAKS the label (angles alone give 67.2 % at 5 ways). Use it only to compare with published figures."""
    augment: bool = setting(True)
    """Augment the training images at random (protocol standard); see augmentations."""
    augmentations: tuple[str, ...] = setting(
        ("flip_shift",), not_searched="all trials augment alike; search over augment"
    )
    """Names of the augmentations of training images, in this order (if augment is on)."""
    classes: Literal["all", "held_out"] = setting("all")
    """Classes of the training episodes: all base classes, or those that pretraining has left out (pretraining.holdout)."""
    noise: Literal["sample", "mean"] = setting("sample")
    """Noise of the generated weights in training: sampled, or fixed at its mean."""
    epochs: int = setting(120, basic=True, resumable=True, not_searched=LENGTH)
    """Epochs of steps_per_epoch steps."""
    steps_per_epoch: int = setting(1000, basic=True, not_searched=LENGTH)
    """Optimizer steps in an epoch."""
    meta_batch: int = setting(32, most=65_536, basic=True, costly=True)
    """Episodes of one step, over all workers."""
    eval_every: int = setting(1000, basic=True, not_searched=LENGTH)
    """Steps between evaluations on val. A checkpoint follows each of them."""
    eval_episodes: int = setting(600, most=1_000_000, not_searched=TARGET)
    """Episodes of an evaluation on val."""
    test_episodes: int = setting(2000, most=1_000_000, not_searched="only the winner is evaluated on test")
    """Episodes of the evaluation on test at the end, with the checkpoint that was best on val (0: no evaluation)."""
    eval_ways: int = setting(0, not_searched=TARGET_SHAPE)
    """Ways of val and test episodes (0: as in training)."""
    eval_shot: int = setting(0, not_searched=TARGET_SHAPE)
    """Shots of val and test episodes (0: as in training)."""
    eval_query: int = setting(15, not_searched=TARGET)
    """Query images of each class in evaluations. Protocol paper always has one query an episode."""
    eval_seed: int = setting(0, not_searched=TARGET)
    """Seed of the val and test episodes. It is separate from seed, so that all runs are evaluated on the same episodes."""
    eval_copies: int = setting(0, most=1000, compared=True, not_searched=TARGET)
    """Random copies (mirrored and shifted) of each support image in evaluations, whose maps are averaged with its own."""
    eval_flips: bool = setting(False, compared=True, not_searched=TARGET)
    """Average the maps of each image with those of its mirror image in evaluations."""

    def __post_init__(self) -> None:
        checks.positive(self, "ways", "shot", "query", "epochs", "steps_per_epoch", "meta_batch", "eval_every")
        checks.positive(self, "eval_episodes", "eval_query")
        checks.not_negative(self, "test_episodes", "eval_ways", "eval_shot", "eval_seed", "eval_copies")
        checks.choice(self, "protocol", get_args(Protocol))
        checks.choice(self, "noise", ("sample", "mean"))
        checks.choice(self, "classes", ("all", "held_out"))
        if self.ways < 2:
            raise ValueError(
                f"ways ({self.ways}) must be at least 2; an episode of one class has nothing to tell apart"
            )
        if self.eval_ways == 1:
            raise ValueError("eval_ways (1) must be at least 2, or 0 for the ways of training")
        if self.eval_seed >= 2**64:
            raise ValueError(f"eval_seed ({self.eval_seed}) must be below 2**64")
        if self.eval_episodes < 2 or self.test_episodes == 1:
            raise ValueError(
                f"eval_episodes ({self.eval_episodes}) and test_episodes ({self.test_episodes}) must be at least 2; "
                "one episode has no confidence interval (test_episodes 0 skips the evaluation on test)"
            )
        if self.steps * self.meta_batch >= 2**63:
            raise ValueError(
                f"epochs ({self.epochs}) of steps_per_epoch ({self.steps_per_epoch}) steps of meta_batch ({self.meta_batch}) "
                "episodes must be below 2**63 episodes; lower epochs"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.epochs * self.steps_per_epoch

    def shape(self, split: Split) -> EpisodeShape:
        """The size of an episode of this split."""
        if split == "train":
            ways, shot, query = self.ways, self.shot, self.query
        else:
            ways, shot, query = self.eval_ways or self.ways, self.eval_shot or self.shot, self.eval_query
        return (
            EpisodeShape(ways, shot, 1, 1)
            if self.protocol == "paper"
            else EpisodeShape(ways, shot, query, ways * query)
        )
