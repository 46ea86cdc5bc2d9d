"""Tasks: what a stage of a run trains. The loop, checkpoints, metrics, Ray and exact resume know tasks only.

A task is registered by name, and `config.run.stages` lists the names of a run's stages:

    @register_task("contrastive")
    class Contrastive(Task):
        def steps(self): ...
        def batch(self, step): ...
        def loss(self, model, batch): ...
        def evaluate(self, model, split): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lgm_dist.config import Config, Split
from lgm_dist.data import ImageBank
from lgm_dist.data.streamed import BaseImages
from lgm_dist.model import LGMNet
from lgm_dist.registry import Registry
from lgm_dist.training import schedule
from lgm_dist.training.evaluation import Evaluation
from lgm_dist.training.worker import Slice, Worker

Banks = Mapping[Split, BaseImages]
"""The images of each split; those of train may stay in their shards."""
LoadNetwork = Callable[[str], LGMNet]
"""Loads the network of a run's folder."""


class Task(ABC):
    """What a stage trains: the batch of a step, its loss, and how the network is evaluated.

    A batch is a pure function of the seed and the step, so that any worker makes any part of it and a resumed run goes on
    with the same batches. Steps are counted from the start of the stage.
    """

    unit = "items"
    """What a batch consists of, in the plural, such as episodes or images."""
    streams = False
    """Whether the stage can train on a train split that stays in its shards (`data.stream`)."""

    def __init__(self, config: Config, banks: Banks, worker: Worker) -> None:
        self.config, self.banks, self.worker = config, banks, worker

    def bank(self, split: Split) -> ImageBank:
        """The images of a split, for a task that needs any of them at any time."""
        bank = self.banks[split]
        assert isinstance(bank, ImageBank), "a run is refused if one of its stages cannot stream"
        return bank

    @property
    def meta_batch(self) -> int:
        """Items of one step over all workers."""
        return self.config.episodes.meta_batch

    @property
    def items_per_step(self) -> int:
        """Items that the network sees in a step, for figures of speed."""
        return self.meta_batch

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.config.episodes.steps

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations on val."""
        return self.config.episodes.eval_every

    def slice_of(self, step: int) -> Slice:
        """This worker's part of the items of a step."""
        return self.worker.slice_of(step * self.meta_batch, self.meta_batch)

    def describe(self) -> str:
        """The size of the stage in words."""
        return f"{self.steps:,} steps of {self.meta_batch:,} {self.unit}"

    def check(self, base: BaseImages) -> None:
        """Raise ValueError if the configuration does not suit the stage or its images. Called before a run starts."""
        del base

    def module(self, model: LGMNet) -> nn.Module:
        """The part of the network that the stage trains. It shares its parameters with `model`; those that its forward pass
        does not use must not require a gradient."""
        model.requires_grad_(True)
        if model.classifier is not None:
            model.classifier.requires_grad_(False)
        return model

    def begin(self, load_network: LoadNetwork) -> None:
        """Called once before the first step that this process takes of the stage; `load_network` reads other runs."""
        del load_network

    @abstractmethod
    def batch(self, step: int) -> Any:
        """This worker's slice of the batch of step `step`, on the worker's device."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The mean loss (), differentiable, and the accuracy () of a batch, in 0 to 1.

        `model` is what `module` returned, in training mode, possibly wrapped for data-parallel training.
        """

    @abstractmethod
    def evaluate(self, model: LGMNet, split: Split) -> Evaluation | None:
        """The evaluation on val or test; None if the stage has none. All workers call it together and get the same."""

    def optimizer(self, model: LGMNet) -> torch.optim.Optimizer:
        """The optimizer of the stage for the whole network `model`."""
        return schedule.make_optimizer(model, self.config)

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the optimizer's rates for step `step`."""
        schedule.set_rates(optimizer, self.config, step)

    def exchange(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the weights that are evaluated and kept in the place of those that are trained; a second call undoes the first.

        They are the same, unless the stage averages weights.
        """
        del optimizer

    def prepare_graphs(self) -> bool:
        """Return True if a step can be captured in a CUDA graph, after preparing the batches for it."""
        return False


TASKS: Registry[type[Task]] = Registry("task", "stages", "lgm_dist.training.built_in")
register_task = TASKS.register


@dataclass(frozen=True)
class Stage:
    """A part of the run with one task; its steps are numbered through the run."""

    name: str
    task: Task
    first: int
    """Steps of the run before it."""

    @property
    def last(self) -> int:
        """Steps of the run up to its end."""
        return self.first + self.task.steps


def make_stages(config: Config, banks: Banks, worker: Worker) -> list[Stage]:
    """The stages of a run. Raises ValueError for an unknown task."""
    stages: list[Stage] = []
    for name in config.run.stages:
        stages.append(Stage(name, TASKS.get(name)(config, banks, worker), stages[-1].last if stages else 0))
    return stages


def stage_of(config: Config, step: int) -> int:
    """Number of the stage in which step `step` (from 1) of the run is taken."""
    return sum(step > stage.last for stage in make_stages(config, {}, Worker()))


def trained_on(config: Config, step: int) -> dict[str, int]:
    """Items of the first `step` steps of the run by their unit, such as {"images": 1280, "episodes": 320}."""
    counts: dict[str, int] = {}
    for stage in make_stages(config, {}, Worker()):
        steps = min(max(step - stage.first, 0), stage.task.steps)
        counts[stage.task.unit] = counts.get(stage.task.unit, 0) + steps * stage.task.meta_batch
    return counts


def in_words(counts: dict[str, int]) -> str:
    """Counts by unit in words: "1,280 images, 320 episodes"."""
    return ", ".join(f"{count:,} {unit}" for unit, count in counts.items() if count) or f"0 {next(iter(counts))}"


def total_steps(config: Config) -> int:
    """Optimizer steps of all stages."""
    return make_stages(config, {}, Worker())[-1].last
