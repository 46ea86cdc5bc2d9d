"""The task `pretraining`: classify the images of the base classes and their rotations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import Config, Split
from lgm_dist.data import ImageBank
from lgm_dist.data.labelled import ImageSampler, check_labelled
from lgm_dist.data.philox import Purpose
from lgm_dist.data.streamed import BaseImages
from lgm_dist.model import LGMNet
from lgm_dist.model.parts import Fitted
from lgm_dist.training import averaging, schedule
from lgm_dist.training.base_statistics import IMAGES_PER_CLASS, fit_head, needs_statistics
from lgm_dist.training.evaluation import Evaluation, evaluate
from lgm_dist.training.tasks import Banks, LoadNetwork, Task, register_task
from lgm_dist.training.worker import Worker


class Batch(NamedTuple):
    """A worker's slice of a step: n images, rotations included."""

    images: Tensor
    """(n, C, H, W) float32, normalised, possibly mixed."""
    labels: Tensor
    """(n,) int64"""
    others: Tensor
    """(n,) int64: the labels of the images that were mixed in; those of `labels` without mixup."""
    share: float
    """Share of the first image and label in the mixture."""


class BaseClassifier(nn.Module):
    """The backbone and the linear classifier of a network; their parameters are shared with it, not copied."""

    def __init__(self, model: LGMNet) -> None:
        super().__init__()
        assert model.classifier is not None, "the configuration of a run with this stage sets model.base_outputs"
        self.backbone, self.classifier = model.backbone, model.classifier

    def forward(self, images: Tensor) -> Tensor:
        """images (n, C, H, W) -> logits (n, base_outputs)."""
        features = self.backbone(images.contiguous(memory_format=torch.channels_last), 1)  # (n, F, h, w)
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))  # (n, base_outputs)
        return logits


@register_task("pretraining")
class Pretraining(Task):
    """Step i trains on images i * batch and after of the stream of `lgm_dist.data.labelled`, each in all its rotations."""

    unit = "images"
    streams = True

    def __init__(self, config: Config, banks: Banks, worker: Worker) -> None:
        super().__init__(config, banks, worker)
        self._sampler = ImageSampler(banks["train"], config, worker.device) if "train" in banks else None
        self._teacher: LGMNet | None = None
        self._first: ImageBank | None = None

    @property
    def meta_batch(self) -> int:
        """Images of one step over all workers; each counts once."""
        return self.config.pretraining.batch

    @property
    def items_per_step(self) -> int:
        """Images that the network sees in a step, rotations included."""
        return self.meta_batch * self.config.pretraining.rotations

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.config.pretraining.steps

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations on val."""
        return self.config.pretraining.eval_every

    def describe(self) -> str:
        """The steps and the rotations."""
        turned = " in 4 rotations" if self.config.pretraining.rotations == 4 else ""
        return f"{super().describe()}{turned}"

    def check(self, base: BaseImages) -> None:
        """See Task."""
        check_labelled(base, self.config)
        model = self.config.model
        if model.norm == "batch" and model.norm_scope == "episode":
            raise ValueError(
                "model.norm_scope ('episode') does not suit stage pretraining, which has no episodes; use global"
            )
        with torch.device("meta"):
            generator = LGMNet(model).generator
        assert isinstance(generator, nn.Module)
        if self.config.run.stages[-1] == "pretraining" and any(True for _ in generator.parameters()):
            raise ValueError(
                f"model.generator ({model.generator!r}) is not trained by stage pretraining; add a stage that trains it, or "
                "use --model.generator none or base_directions"
            )

    def module(self, model: LGMNet) -> nn.Module:
        """The backbone and the classifier."""
        return BaseClassifier(model).requires_grad_(True)

    def begin(self, load_network: LoadNetwork) -> None:
        """Load the teacher."""
        if self.config.pretraining.teacher:
            self._teacher = load_network(self.config.pretraining.teacher).to(self.worker.device).eval()

    def batch(self, step: int) -> Batch:
        """This worker's images of the step."""
        assert self._sampler is not None, "the task was made without banks"
        first, count, _ = self.slice_of(step)
        images, labels = self._sampler(first, count)
        if not self.config.pretraining.mixup:
            return Batch(images, labels, labels, 1.0)
        share, shift = self._mixture(step)
        # the image `shift` places on within the step, so that the mixture does not depend on the workers
        start = step * self.meta_batch
        begin = start + (first - start + shift) % self.meta_batch
        turn = min(start + self.meta_batch - begin, count)
        parts = [self._sampler(begin, turn)] + ([self._sampler(start, count - turn)] if turn < count else [])
        others = torch.cat([part.images for part in parts])  # (n, C, H, W)
        return Batch(torch.lerp(others, images, share), labels, torch.cat([part.labels for part in parts]), share)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (), with the teacher's predictions if there is one, and the accuracy () on `labels`."""
        p = self.config.pretraining
        logits = self._logits(model, batch.images)  # (n, base_outputs) float32
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=p.label_smoothing)  # ()
        if batch.share < 1:
            other = F.cross_entropy(logits, batch.others, label_smoothing=p.label_smoothing)  # ()
            loss = torch.lerp(other, loss, batch.share)
        if self._teacher is not None:
            loss = torch.lerp(loss, self._divergence(logits, batch.images), p.distillation)
        return loss, (logits.argmax(1) == batch.labels).float().mean()

    def evaluate(self, model: LGMNet, split: Split) -> Evaluation | None:
        """Accuracy on the episodes of val or test, without a generator that a later stage trains.

        Head and generator get the statistics of the base classes that they need.
        """
        e = self.config.episodes
        count = e.test_episodes if split == "test" else e.eval_episodes
        if not count:
            return None
        self._fit_head(model)
        network = model if isinstance(model.generator, Fitted) else model.without_generator()
        return evaluate(network, self.bank(split), self.config, split, count, 0, self.worker)

    def optimizer(self, model: LGMNet) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum, or AdamW, for backbone and classifier; with averages of the weights if asked for."""
        optimizer = schedule.pretraining_optimizer(self.module(model), self.config.pretraining)
        if self.config.pretraining.ema:
            averaging.keep_averages(optimizer, self.config.pretraining.ema)
        return optimizer

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of step `step` of the stage."""
        for group in optimizer.param_groups:
            group["lr"] = schedule.pretraining_rate(self.config.pretraining, step)

    def exchange(self, optimizer: torch.optim.Optimizer) -> None:
        """Exchange the weights and their averages."""
        if self.config.pretraining.ema:
            averaging.exchange(optimizer)

    def _fit_head(self, model: LGMNet) -> None:
        base = self.banks["train"]
        if needs_statistics(model):
            if self._first is None and not isinstance(base, ImageBank):
                self._first = base.first_images(IMAGES_PER_CLASS, self.worker.heartbeat)
            elif isinstance(base, ImageBank):
                self._first = base
            assert self._first is not None
            fit_head(model, self._first, self.config, self.worker)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        half = self.config.optim.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            logits: Tensor = model(images)  # (n, base_outputs)
        return logits.float() if half else logits

    def _divergence(self, logits: Tensor, images: Tensor) -> Tensor:
        """t * t times the Kullback-Leibler divergence () from the teacher at the temperature t (Hinton et al., 2015)."""
        t = self.config.pretraining.temperature
        assert self._teacher is not None
        with torch.no_grad():
            wanted = self._logits(BaseClassifier(self._teacher), images)  # (n, base_outputs)
        return t * t * F.kl_div((logits / t).log_softmax(1), (wanted / t).softmax(1), reduction="batchmean")

    def _mixture(self, step: int) -> tuple[float, int]:
        """The share and the shift of mixup in a step. A pure function of (seed, step)."""
        alpha, seed = self.config.pretraining.mixup, self.config.run.seed
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, Purpose.MIXUP]))
        return float(random.beta(alpha, alpha)), int(random.integers(1, max(self.meta_batch, 2)))
