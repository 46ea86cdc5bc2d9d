"""The settings of the optimizer of an episodic stage, and of the arithmetic of all stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lgm_dist import checks
from lgm_dist.settings.mark import setting


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its arithmetic."""

    lr: float = setting(1e-3, basic=True)
    """Learning rate of Adam."""
    lr_decay: float = setting(1 / 1.11111)
    """Factor on the learning rate after every lr_decay_steps steps."""
    lr_decay_steps: int = setting(1500)
    """Steps between two decays of the learning rate."""
    lr_min: float = setting(1e-6)
    """The learning rate never falls below it."""
    weight_decay: float = setting(0.0)
    """Decoupled weight decay (AdamW)."""
    precision: Literal["float32", "tf32", "bf16"] = setting("float32")
    """tf32: convolutions and matrix products of training round their factors to ten bits, on GPUs from Ampere on. bf16:
    training computes in bfloat16 if that is safe (weights, statistics and the head stay float32), for GPUs and for CPUs with
    AVX512-BF16; other CPUs get slower. Evaluation is always float32."""

    def __post_init__(self) -> None:
        checks.positive(self, "lr_decay_steps")
        checks.choice(self, "precision", ("float32", "tf32", "bf16"))
        if not 0 < self.lr <= checks.LARGEST:
            raise ValueError(f"lr ({self.lr}) must be positive; the paper's is 1e-3")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay ({self.lr_decay}) must be in (0, 1]; 1 keeps the learning rate constant")
        if not 0 <= self.lr_min <= self.lr:
            raise ValueError(f"lr_min ({self.lr_min}) must lie between 0 and lr ({self.lr})")
        if not 0 <= self.weight_decay <= checks.LARGEST:
            raise ValueError(f"weight_decay ({self.weight_decay}) must not be negative; 0 turns it off")
