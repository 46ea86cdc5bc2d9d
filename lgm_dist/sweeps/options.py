"""The options of a sweep. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SweepOptions:
    """What to search, how, and what all trials are evaluated on."""

    space: str = "normalization"
    """Space to search: ways_shots, optim, normalization, full, generator, or a Python file that defines SPACE."""
    samples: int = 8
    """Number of trials. --search grid ignores it."""
    search: Literal["random", "tpe", "grid"] = "random"
    """random: values at random. tpe: Optuna's TPE, which learns from the results so far. grid: every combination."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """asha stops trials that fall behind. pbt is population-based training: bad trials continue from the checkpoints of good
    ones, with perturbed lr and weight_decay."""
    target_ways: int = 5
    """Ways of the episodes on which all trials are evaluated: val, and test for the winner."""
    target_shot: int = 1
    """Shots of those episodes."""
    max_concurrent: int = 0
    """Largest number of trials at a time (0: as many as fit the cores and the memory)."""
    resume: bool = False
    """Resume the sweep of this --name and --storage. All other settings are read from its sweep.json."""

    def check(self) -> None:
        """Raise ValueError for a wrong value."""
        if self.samples < 1:
            raise ValueError(f"samples ({self.samples}) must be at least 1")
        if self.max_concurrent < 0:
            raise ValueError(f"max_concurrent ({self.max_concurrent}) must be at least 0")
        if self.scheduler == "pbt" and self.search == "tpe":
            raise ValueError("search (tpe) cannot be used with pbt, which draws its own values; use --search random")
