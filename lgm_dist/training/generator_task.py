"""The task `generator`: generator and head on episodes over the stored features of a frozen backbone."""

from __future__ import annotations

import torch
from torch import nn

from lgm_dist.config import Config, Split
from lgm_dist.data import EpisodeBatch, check_episodes
from lgm_dist.data.features import FeatureBank, FeatureSampler, check_variants
from lgm_dist.data.streamed import BaseImages
from lgm_dist.model import LGMNet, build_model
from lgm_dist.model.parts import Fitted
from lgm_dist.training import schedule
from lgm_dist.training.base_statistics import fit_head
from lgm_dist.training.episodes_task import Episodes
from lgm_dist.training.evaluation import Evaluation, evaluate
from lgm_dist.training.frozen import features_of
from lgm_dist.training.tasks import Banks, register_task
from lgm_dist.training.worker import Worker


@register_task("generator")
class GeneratorTask(Episodes):
    """Step i trains on episodes i * meta_batch and after of the feature bank of split train; the backbone stays as the stages
    before, or another run, have left it.

    The evaluations on val see the images alone, that on test their copies and mirror images too, if configured.
    """

    def __init__(self, config: Config, banks: Banks, worker: Worker) -> None:
        super().__init__(config, {}, worker)  # without banks: it makes no batches of images
        self.banks = banks
        if config.episodes.protocol == "paper":
            raise ValueError(
                "stages ('generator') needs protocol standard: the images of protocol paper differ by episode"
            )
        self._model: LGMNet | None = None
        self._features: dict[Split, FeatureBank] = {}
        self._samplers: list[FeatureSampler] = []

    def check(self, base: BaseImages) -> None:
        """See Task."""
        config = self.config
        if not config.run.start and config.run.stages[0] == "generator":
            raise ValueError(
                "stages ('generator') needs a trained backbone; give --start RUN, or put pretraining before it"
            )
        model = build_model(config.model)
        if not any(True for _ in model.on_features().parameters()):
            raise ValueError(
                f"stages ('generator'): neither model.generator ({config.model.generator!r}) nor model.head "
                f"({config.model.head!r}) has weights to train; use --model.generator low_rank"
            )
        check_variants(base.shape, config)
        if other := config.generator.alternate_shot:
            check_episodes(config.replace(shot=other), "train", base.name, base.counts.tolist(), base.classes)

    def module(self, model: LGMNet) -> nn.Module:
        """Generator and head, as a network whose images are feature maps."""
        self._model = self._model or model
        model.requires_grad_(False)
        return model.on_features().requires_grad_(True)

    def optimizer(self, model: LGMNet) -> torch.optim.Optimizer:
        """The episodic optimizer for generator and head."""
        return schedule.make_optimizer(self.module(model), self.config)

    def batch(self, step: int) -> EpisodeBatch:
        """This worker's episodes of the step, of feature maps."""
        assert self._model is not None, "module comes first"
        if not self._samplers:
            self._samplers = self._make_samplers(self._model)
        first, count, _ = self.slice_of(step)
        return self._samplers[step % len(self._samplers)](first, count)

    def evaluate(self, model: LGMNet, split: Split) -> Evaluation | None:
        """Accuracy on the episodes of val, over its features, or of test, over its images."""
        if split != "val":
            return super().evaluate(model, split)
        maps, network = self._features_of(model, split).as_images(), model.on_features()
        config = self.config.replace(
            eval_copies=0, eval_flips=False
        )  # the stored features are those of the images alone
        return evaluate(network, maps, config, split, config.episodes.eval_episodes, worker=self.worker)

    def _features_of(self, model: LGMNet, split: Split) -> FeatureBank:
        # not before the first step: the weights of the stages before are not there when the task is made
        if split not in self._features:
            self._features[split] = features_of(model, self.bank(split), self.config, self.worker)
        return self._features[split]

    def _make_samplers(self, model: LGMNet) -> list[FeatureSampler]:
        """One for each number of shots, which steps take in turn."""
        fit_head(model, self.bank("train"), self.config, self.worker)
        bank, other = self._features_of(model, "train"), self.config.generator.alternate_shot
        fit = getattr(model.generator, "fit", None)
        if fit is not None and not isinstance(model.generator, Fitted):  # `fit_head` fits those
            classifier = getattr(model, "classifier", None)
            mean = bank.tensor.mean(dim=(0, 1, 2)).to(self.worker.device)  # (F,)
            fit(mean, None if classifier is None else classifier.weight.detach())
        configs = [self.config, self.config.replace(shot=other)] if other else [self.config]
        return [FeatureSampler(bank, config, self.worker.device) for config in configs]
