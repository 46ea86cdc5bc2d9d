"""The settings of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lgm_dist import checks
from lgm_dist.settings.mark import MACHINE, SWEEP, setting


@dataclass(frozen=True)
class RunConfig:
    """The run: its name, workers, storage and time limits."""

    name: str = setting("", basic=True, resumable=True, not_searched=SWEEP)
    """Name of the run and of its folder in storage (empty: made from data, ways, shot, protocol and seed). A run with the
    same name and storage is resumed."""
    storage: str = setting("runs", resumable=True, not_searched=SWEEP)
    """Folder of the runs. On several machines, a shared one."""
    stages: tuple[str, ...] = setting(("episodes",), not_searched="all trials train the same stages")
    """Stages of the run, one after the other: names of registered tasks."""
    start: str = setting("", not_searched="all trials start alike")
    """Run or checkpoint folder whose backbone, and classifier of the base classes, this run starts with (empty: random)."""
    plugins: tuple[str, ...] = setting((), resumable=True, not_searched=SWEEP)
    """Python modules to import, which register data sets, augmentations, backbones, generators, heads or tasks of your own."""
    seed: int = setting(0, basic=True)
    """Seed of the initial weights, of the training images and episodes, their order, augmentation and noise, and of the classes
    that pretraining leaves out."""
    workers: int = setting(1, most=4096, basic=True, resumable=True, not_searched=MACHINE)
    """Ray Train workers; 0 trains in this process, without Ray. On the command line also MIN:MAX, see max_workers."""
    max_workers: int = setting(0, most=4096, resumable=True, not_searched=MACHINE)
    """Elastic training: as many workers as the cluster has room for, from workers to max_workers (0: always workers)."""
    cpus_per_worker: int = setting(0, most=4096, resumable=True, not_searched=MACHINE)
    """CPUs, and so torch threads, of a worker (0: the cores of this machine divided by the workers)."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", resumable=True, not_searched=MACHINE)
    """auto: cuda if this machine has it."""
    wandb: Literal["auto", "online", "offline", "disabled"] = setting("auto", resumable=True, not_searched=SWEEP)
    """Weights & Biases. auto: online with WANDB_API_KEY or a login, else offline."""
    max_failures: int = setting(3, resumable=True, not_searched=SWEEP)
    """How often failed workers, or Ray Train's controller, are replaced before the run gives up."""
    hang_seconds: int = setting(600, resumable=True)
    """Longest time for a worker's step or evaluation. A worker that takes longer hangs, and all workers start again from the
    last checkpoint (0: no limit)."""
    storage_seconds: int = setting(60, resumable=True)
    """How long writing to a failing storage is retried before the run ends."""

    def __post_init__(self) -> None:
        checks.not_negative(self, "workers", "max_workers", "cpus_per_worker", "seed", "max_failures")
        checks.not_negative(self, "hang_seconds", "storage_seconds")
        checks.choice(self, "device", ("auto", "cpu", "cuda"))
        checks.choice(self, "wandb", ("auto", "online", "offline", "disabled"))
        checks.paths(self)
        if not self.stages:
            raise ValueError("stages () must name at least one task; use episodes")
        if self.seed >= 2**64:
            raise ValueError(f"seed ({self.seed}) must be below 2**64")
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name ({self.name!r}) must be a plain folder name; put folders into storage")
        if 0 < self.hang_seconds <= self.storage_seconds:
            raise ValueError(
                f"hang_seconds ({self.hang_seconds}) must be above storage_seconds ({self.storage_seconds}), because a worker "
                "that waits for the storage does not hang, or 0"
            )
