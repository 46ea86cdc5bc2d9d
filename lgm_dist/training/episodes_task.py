"""The task `episodes`: N-way K-shot episodes of the base classes, evaluated on episodes of novel classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import Config, Split
from lgm_dist.data import EpisodeBatch, sample_episodes
from lgm_dist.data.streamed import BaseImages
from lgm_dist.model import LGMNet
from lgm_dist.model.parts import GENERATORS
from lgm_dist.training.device_batches import DeviceBatch, DeviceBatches
from lgm_dist.training.evaluation import Evaluation, evaluate
from lgm_dist.training.tasks import Banks, Task, register_task
from lgm_dist.training.worker import Worker


@register_task("episodes")
class Episodes(Task):
    """Step i trains on episodes i * meta_batch and after, made by numpy on the host or by the worker's GPU."""

    unit = "episodes"

    def __init__(self, config: Config, banks: Banks, worker: Worker) -> None:
        super().__init__(config, banks, worker)
        self._on_device: DeviceBatches | None = None
        if worker.device.startswith("cuda") and "train" in banks:
            self._on_device = DeviceBatches(self.bank("train"), config, worker, self.slice_of(0))

    def describe(self) -> str:
        """The steps and the size of an episode."""
        ways, shot, query, _ = self.config.episode("train")
        return f"{super().describe()} ({ways}-way {shot}-shot {query}-query)"

    def check(self, base: BaseImages) -> None:
        """See Task."""
        del base
        model = self.config.model
        if model.centre or model.shrinkage < 1:
            raise ValueError(
                f"model.centre ({model.centre}) and model.shrinkage ({model.shrinkage}) need statistics of a backbone that "
                "stays as it is; leave them out of stage episodes, or use stage generator"
            )
        if hasattr(GENERATORS.get(model.generator), "fit"):
            raise ValueError(
                f"model.generator ({model.generator!r}) needs to know the base classes; use stage generator, or, for "
                "base_directions, pretraining"
            )

    def batch(self, step: int) -> EpisodeBatch | DeviceBatch:
        """This worker's episodes of the step."""
        if self._on_device:
            return self._on_device(step)
        first, count, _ = self.slice_of(step)
        return sample_episodes(self.bank("train"), self.config, "train", first, count).to(self.worker.device)

    def loss(self, model: nn.Module, batch: EpisodeBatch | DeviceBatch) -> tuple[Tensor, Tensor]:
        """Mean negative log-probability of the queries' labels (), and the accuracy ()."""
        episodes = batch.make() if isinstance(batch, DeviceBatch) else batch
        log_p = log_probabilities(model, episodes, self.config)  # (B, T, N)
        loss = F.nll_loss(log_p.flatten(0, 1), episodes.labels.flatten())  # ()
        return loss, (log_p.argmax(-1) == episodes.labels).float().mean()

    def evaluate(self, model: LGMNet, split: Split) -> Evaluation | None:
        """Accuracy on the episodes of val or test; None if the configuration asks for no test episodes."""
        e = self.config.episodes
        count = e.test_episodes if split == "test" else e.eval_episodes
        return evaluate(model, self.bank(split), self.config, split, count, worker=self.worker) if count else None

    def prepare_graphs(self) -> bool:
        """One worker's step on a GPU is a CUDA graph, and so is the drawing of its episodes."""
        if self._on_device is None or self.worker.world_size > 1:
            return False
        self._on_device.capture()
        return True


def log_probabilities(model: nn.Module, batch: EpisodeBatch, config: Config) -> Tensor:
    """The network's log-probabilities in training, with the noise and precision of `config`: (B, T, N) float32."""
    noise = batch.noise if config.episodes.noise == "sample" else None
    half = config.optim.precision == "bf16"
    # No weight is used twice, so autocast's cache of cast weights would save nothing, and a CUDA graph must not hold it.
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        return model(batch.support, batch.query, config.episodes.ways, noise)  # type: ignore[no-any-return]
