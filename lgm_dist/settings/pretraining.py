"""The settings of the task `pretraining`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lgm_dist import checks
from lgm_dist.settings.mark import LENGTH, setting


@dataclass(frozen=True)
class PretrainingConfig:
    """Classification of the images of the base classes. Its flags begin with `pretraining.`."""

    prefix: ClassVar[str] = "pretraining."

    rotations: int = setting(4)
    """4: each image comes in its four rotations by 90 degrees, and each rotation of a class is a class of its own. 1: no
    rotations."""
    holdout: int = setting(0, most=1_000_000, not_searched="all trials start from the same backbone")
    """Base classes that are left out, chosen by the seed: classes=held_out trains episodes on them."""
    batch: int = setting(128, most=65_536, costly=True)
    """Images of one step, over all workers; each counts once, in all its rotations."""
    steps: int = setting(10_000, basic=True, not_searched=LENGTH)
    """Optimizer steps. An epoch takes images / batch of them: 281 for FC100."""
    eval_every: int = setting(1000, not_searched=LENGTH)
    """Steps between evaluations on val. A checkpoint follows each of them."""
    augmentations: tuple[str, ...] = setting(("crop", "flip", "jitter"), not_searched="all trials augment alike")
    """Names of the augmentations of the images, in this order."""
    optimizer: Literal["sgd", "adam"] = setting("sgd")
    """sgd: with Nesterov momentum. adam: AdamW."""
    lr: float = setting(0.1)
    """Highest learning rate."""
    momentum: float = setting(0.9)
    """Momentum of sgd."""
    weight_decay: float = setting(5e-4)
    """L2 penalty of sgd; decoupled weight decay of adam."""
    schedule: Literal["cosine", "step"] = setting("cosine")
    """cosine: the learning rate falls to 0 at the last step. step: it falls to a tenth at each of the milestones."""
    milestones: tuple[float, ...] = setting((0.6, 0.8), not_searched="it is a tuple")
    """Shares of the steps at which schedule=step lowers the learning rate."""
    warmup: int = setting(0)
    """Steps over which the learning rate rises linearly from 0."""
    label_smoothing: float = setting(0.0)
    """Share of the target that is spread evenly over all classes."""
    mixup: float = setting(0.0)
    """Each image is mixed with another one of the step, the share drawn from Beta(mixup, mixup) (0: off)."""
    ema: float = setting(0.0)
    """Decay of an exponential moving average of the weights, which takes the place of the weights in evaluations and in the
    trained network (0: off)."""
    teacher: str = setting("", not_searched="all trials have the same teacher")
    """Run or checkpoint folder of a network with the same base classes whose predictions are learned too (empty: none)."""
    distillation: float = setting(0.5)
    """Share of the teacher's predictions in the loss."""
    temperature: float = setting(4.0)
    """Temperature at which teacher and student are compared."""

    def __post_init__(self) -> None:
        checks.positive(self, "batch", "steps", "eval_every")
        checks.not_negative(self, "warmup", "holdout")
        checks.choice(self, "rotations", (1, 4))
        checks.choice(self, "optimizer", ("sgd", "adam"))
        checks.choice(self, "schedule", ("cosine", "step"))
        for name in ("momentum", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"pretraining.{name} ({getattr(self, name)}) must be in [0, 1); 0 turns it off")
        checks.between(self, "distillation", 0.0, 1.0)
        if not 0 < self.lr <= checks.LARGEST:
            raise ValueError(f"pretraining.lr ({self.lr}) must be positive; 0.1 suits sgd, 0.001 adam")
        if not 0 <= self.mixup <= checks.LARGEST:
            raise ValueError(f"pretraining.mixup ({self.mixup}) must not be negative; 0 turns it off")
        if not 0 < self.temperature <= checks.LARGEST:
            raise ValueError(f"pretraining.temperature ({self.temperature}) must be positive; 4 is usual")
        if not 0 <= self.weight_decay <= checks.LARGEST:
            raise ValueError(f"pretraining.weight_decay ({self.weight_decay}) must not be negative; 0 turns it off")
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(f"pretraining.milestones {self.milestones} must lie between 0 and 1; use 0.6 0.8")
        if self.warmup >= self.steps:
            raise ValueError(f"pretraining.warmup ({self.warmup}) must be below pretraining.steps ({self.steps})")
