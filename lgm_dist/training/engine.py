"""One training step, the learning-rate schedule, and evaluation with a 95 % confidence interval. Knows torch, not Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import Config, Split
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import EpisodeBatch, draw_noise, draw_rows, load_images, sample_episodes
from lgm_dist.model import AllReduce, LGMNet

BETAS, EPSILON = (0.9, 0.999), 1e-8
METHODS = (("mean noise",), ("single draw",), ("single draw", "vote", "mean probability"))
"""How an evaluation with 0, 1 or more noise draws decides. The single draw is the last one, as in the authors' code."""
IMAGES_AT_ONCE = 1000
"""Images that an evaluation embeds in one go; bounds its memory."""


@dataclass(frozen=True)
class Worker:
    """This process's place among the workers of a run; the default is a run of one process."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    all_reduce: AllReduce | None = None
    """Sums a tensor over the workers in place; None where there is one worker."""

    def slice_of(self, start: int, count: int) -> tuple[int, int]:
        """This worker's consecutive part (start, count) of the range [start, start + count)."""
        first = self.rank * count // self.world_size
        last = (self.rank + 1) * count // self.world_size
        return start + first, last - first

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over the workers, in place."""
        if self.all_reduce is not None:
            self.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """`x` averaged over the workers."""
        return self.sum(x) / self.world_size

    def gather(self, value: float) -> list[float]:
        """Every worker's `value`, by rank."""
        values = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        return self.sum(values).tolist()


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam as in TensorFlow (see `set_rates`), with decoupled weight decay if configured."""
    return torch.optim.AdamW(
        model.parameters(), config.lr, betas=BETAS, eps=EPSILON, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step `step` (from 0): lr_decay to the power of the finished lr_decay_steps, at least lr_min."""
    return max(config.lr * config.lr_decay ** (step // config.lr_decay_steps), config.lr_min)


def set_rates(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Sets the learning rate, the weight decay, and the epsilon that makes torch's Adam TensorFlow's.

    TensorFlow adds epsilon to the square root of the second moment before its bias is corrected, torch after it. A
    checkpoint taken over from another trial brings that trial's weight decay along.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
        group["weight_decay"] = config.weight_decay
        group["eps"] = EPSILON / (1 - BETAS[1] ** (step + 1)) ** 0.5


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: EpisodeBatch,
    config: Config,
    step: int,
    weight: float = 1.0,
) -> Tensor:
    """One optimizer step on this worker's slice of the meta-batch.

    `model` is an LGMNet in training mode, or one wrapped for data-parallel training. Returns (3,): the slice's mean loss
    (-log probability of the label) and its accuracy, both times `weight`, and the L2 norm of the gradient; no host
    synchronisation. Where slices differ in size, a `weight` of slice * world_size / meta_batch makes the workers' means of
    loss, accuracy and gradient those of the whole meta-batch. A gradient that is not finite changes no weight.
    """
    optimizer.zero_grad()
    figures = gradients(model, batch, config, weight)  # (3,)
    apply(optimizer, config, step, figures)
    return figures


def gradients(model: nn.Module, batch: EpisodeBatch, config: Config, weight: float = 1.0) -> Tensor:
    """The part of `train_step` before the optimizer: adds to the parameters' gradients, returns the step's figures (3,)."""
    with arithmetic(tf32=config.precision == "tf32"):
        log_p = log_probabilities(model, batch, config)  # (B, T, N)
        loss = weight * F.nll_loss(log_p.flatten(0, 1), batch.labels.flatten())  # ()
        loss.backward()
    grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])  # ()
    accuracy = weight * (log_p.argmax(-1) == batch.labels).float().mean()  # ()
    return torch.stack([loss.detach(), accuracy, grad_norm])  # (3,)


def apply(optimizer: torch.optim.Optimizer, config: Config, step: int, figures: Tensor) -> None:
    """Step `step` of the optimizer, of gradients that have these figures (3,)."""
    set_rates(optimizer, config, step)
    # fused Adam then leaves weights and its own state alone: those that gave the loss, for `diagnosis` to look at
    optimizer.found_inf = (~torch.isfinite(figures[2])).float()  # type: ignore[attr-defined]  # ()
    optimizer.step()


@contextmanager
def arithmetic(*, tf32: bool = False) -> Iterator[None]:
    """How a GPU convolves and multiplies meanwhile: the same bits each time, and in float32 to its last bit unless `tf32`."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.fp32_precision, tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        matmul.fp32_precision = before


def log_probabilities(model: nn.Module, batch: EpisodeBatch, config: Config) -> Tensor:
    """What `model` answers in training, with the noise and precision of `config`: (B, T, N) float32."""
    noise = batch.noise if config.noise == "sample" else None
    half = config.precision == "bf16"
    # No weight is used twice, so autocast's cache of cast weights would save nothing, and a CUDA graph must not hold it.
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        return model(batch.support, batch.query, config.ways, noise)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Score:
    """Mean accuracy over episodes with the half-width of its 95 % interval, both in 0 to 1."""

    accuracy: float
    ci95: float

    @classmethod
    def of(cls, accuracies: npt.NDArray[np.float64]) -> Score:
        """accuracies (episodes,): 1.96 * std(ddof=1) / sqrt(episodes)."""
        half_width = 1.96 * accuracies.std(ddof=1) / len(accuracies) ** 0.5
        return cls(float(accuracies.mean()), float(half_width))

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} ± {100 * self.ci95:.2f} %"


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on the first `episodes` episodes of a split."""

    split: Split
    protocol: str
    ways: int
    shot: int
    episodes: int
    draws: int
    """Noise draws of the generated weights; 0: noise at its mean."""
    scores: dict[str, Score]
    """By method (see METHODS), the protocol's own first."""
    accuracies: dict[str, npt.NDArray[np.float64]]
    """For each of `scores`, the accuracy of every episode (episodes,)."""

    @property
    def score(self) -> Score:
        """With the noise at its mean, or of a single draw."""
        return next(iter(self.scores.values()))


@torch.no_grad()
@arithmetic()
def evaluate(
    model: LGMNet,
    bank: ImageBank,
    config: Config,
    split: Split,
    episodes: int,
    draws: int | None = None,
    worker: Worker | None = None,
) -> Evaluation:
    """Evaluates `model` on episodes 0 … `episodes` - 1 of `split`, of config.ways, config.shot and config.protocol.

    `draws` is the number of noise draws (0: noise at its mean; None: the protocol's own, 0 under standard, 1 under paper).
    Features are computed once for all draws, and under standard once for all episodes. All workers call it together and
    get the same result. Leaves the model's mode as it was.
    """
    worker = worker or Worker()
    draws = own_draws(config) if draws is None else draws
    methods = METHODS[min(draws, 2)]
    hits = torch.zeros(len(methods), episodes, dtype=torch.float64, device=worker.device)
    was_training = model.training
    for first, log_p, labels in answers(model.eval(), bank, config, split, episodes, draws, worker):
        hits[:, first : first + len(labels)] = _hits(log_p, labels, draws)
    model.train(was_training)
    accuracies = dict(zip(methods, worker.sum(hits).cpu().numpy(), strict=True))
    scores = {method: Score.of(values) for method, values in accuracies.items()}
    return Evaluation(split, config.protocol, config.ways, config.shot, episodes, draws, scores, accuracies)


def own_draws(config: Config) -> int:
    """The noise draws with which the protocol evaluates: 0 (the noise's mean) under standard, 1 under paper."""
    return 1 if config.protocol == "paper" else 0


@torch.no_grad()
def answers(
    model: LGMNet, bank: ImageBank, config: Config, split: Split, episodes: int, draws: int, worker: Worker
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What `model`, in evaluation mode, answers in this worker's slice of episodes 0 … `episodes` - 1 of `split`.

    Yields, for consecutive episodes, the first one's number, log-probabilities (M, B, T, N) of the M = max(draws, 1) noise
    draws, and the labels (B, T).
    """
    embed = _embed_each_image_once if config.protocol == "standard" else _embed_episodes
    for first, features, codes, labels in embed(model, bank, config, split, episodes, worker):
        noise = draw_noise(config, split, first, len(labels), draws).to(worker.device) if draws else [None]
        log_p = [model.classify(features, codes, config.ways, n) for n in noise]
        yield first, torch.stack(log_p), labels


def _hits(log_p: Tensor, labels: Tensor, draws: int) -> Tensor:
    """log_p (M, B, T, N), labels (B, T) -> accuracy of each episode by each method (methods, B), in float64."""
    guesses = log_p.argmax(-1)  # (M, B, T)
    if draws < 2:
        return (guesses == labels).double().mean(-1)  # (1, B)
    votes = F.one_hot(guesses, log_p.shape[-1]).sum(0).argmax(-1)  # (B, T); a tie goes to the smallest label, as theirs
    mean = log_p.exp().mean(0).argmax(-1)  # (B, T)
    return (torch.stack([guesses[-1], votes, mean]) == labels).double().mean(-1)  # (3, B)


Embedded = Iterator[tuple[int, Tensor, Tensor, Tensor]]
"""First episode, feature maps (B, S + T, F, h, w), codes of the support images (B, S, E) and labels (B, T) of consecutive
episodes."""


def _embed_each_image_once(
    model: LGMNet, bank: ImageBank, config: Config, split: Split, episodes: int, worker: Worker
) -> Embedded:
    """Without augmentation an image is the same in all episodes: each is embedded once, by one of the workers."""
    everything = draw_rows(bank, config, split, 0, episodes)
    rows = np.concatenate([everything.support, everything.query], axis=1)  # (E, S + T)
    unique, positions = np.unique(rows, return_inverse=True)  # (n,), (E, S + T)
    features, codes = embed_images(model, bank, config, unique, worker)  # (n, F, h, w), (n, E)
    labels, where = torch.from_numpy(everything.labels), torch.from_numpy(positions.reshape(rows.shape))
    for first, last in _pieces(worker.slice_of(0, episodes), rows.shape[1]):
        index = where[first:last].to(worker.device)  # (B, S + T)
        support = codes[index[:, : everything.support.shape[1]]]  # (B, S, E)
        yield first, features[index], support, labels[first:last].to(worker.device)


@torch.no_grad()
def embed_images(
    model: LGMNet, bank: ImageBank, config: Config, rows: npt.NDArray[np.int64], worker: Worker
) -> tuple[Tensor, Tensor]:
    """Feature maps (n, F, h, w) and codes (n, E) of the bank's rows (n,); each worker embeds its share of them.

    `model` must be in evaluation mode; images are not augmented.
    """
    f, c = model.embed(load_images(bank, config, rows[:1]).to(worker.device))  # only for their shapes
    features, codes = f.new_zeros(len(rows), *f.shape[1:]), c.new_zeros(len(rows), c.shape[1])
    for i, j in _pieces(worker.slice_of(0, len(rows)), 1):
        features[i:j], codes[i:j] = model.embed(load_images(bank, config, rows[i:j]).to(worker.device))
    return worker.sum(features), worker.sum(codes)


def _embed_episodes(
    model: LGMNet, bank: ImageBank, config: Config, split: Split, episodes: int, worker: Worker
) -> Embedded:
    """Protocol paper rotates the images of each episode anew."""
    images = config.ways * config.shot + 1
    for first, last in _pieces(worker.slice_of(0, episodes), images):
        batch = sample_episodes(bank, config, split, first, last - first).to(worker.device)
        both = torch.cat([batch.support, batch.query], dim=1)  # (B, S + T, C, H, W)
        features, codes = (x.unflatten(0, (last - first, images)) for x in model.embed(both.flatten(0, 1)))
        yield first, features, codes[:, : images - 1], batch.labels  # (B, S + T, F, h, w), (B, S, E), (B, T)


def _pieces(span: tuple[int, int], images: int) -> Iterator[tuple[int, int]]:
    """Cuts the range (start, count) of things of `images` images each into [first, last) of about IMAGES_AT_ONCE images."""
    start, count = span
    size = max(IMAGES_AT_ONCE // images, 1)
    for first in range(start, start + count, size):
        yield first, min(first + size, start + count)
