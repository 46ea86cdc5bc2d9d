"""What all trials of a sweep share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgm_dist.config import Config
from lgm_dist.runs.sweep_folder import Sweep, run_of_trial
from lgm_dist.sweeps.spaces import Sample, apply, budgeted, evaluations_of


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share, as plain values, because Ray pickles it."""

    folder: str
    base: dict[str, Any]
    scheduler: str

    @classmethod
    def of(cls, sweep: Sweep) -> Plan:
        """The plan of the sweep in a folder."""
        return cls(str(sweep.folder), sweep.spec["base"], sweep.spec["scheduler"])

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return Path(self.folder)

    @property
    def name(self) -> str:
        """The sweep's name, which is the group of its runs on W&B."""
        return self.path.name

    @property
    def perturbation_interval(self) -> int:
        """Evaluations between two exploits of population-based training."""
        return max(evaluations_of(Config.from_dict(self.base)) // 5, 1)

    def run_of(self, number: int) -> Path:
        """The folder of a trial's run."""
        return run_of_trial(self.path, number)

    def config_of(self, number: int, sample: Sample) -> Config:
        """The trial's configuration: the base with its sample, and the steps that see as many images as the base.

        Under population-based training, all trials take the base's steps, because they exchange checkpoints by step.
        """
        base = Config.from_dict(self.base)
        config = apply(base, sample)
        config = config if self.scheduler == "pbt" else budgeted(base, config)
        run = self.run_of(number)
        return config.replace(name=run.name, storage=str(run.parent))


def identify(trial_id: str, config: dict[str, Any]) -> tuple[int, Sample]:
    """Number and sample of a trial, from the id and the configuration that Ray Tune gives it."""
    if "sample" in config:  # drawn before the sweep: the number is part of the id
        return int(trial_id.rsplit("_", 1)[-1]), dict(config["sample"])
    sample = dict(config)
    return sample.pop("number"), sample
