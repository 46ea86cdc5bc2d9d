"""The groups of settings of a configuration, each checked at construction. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from lgm_dist import checks

Protocol = Literal["standard", "paper"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def setting(
    default: Any,
    *,
    flag: str = "",
    most: int = 0,
    basic: bool = False,
    resumable: bool = False,
    costly: bool = False,
    perturbed: bool = False,
    not_searched: str = "",
) -> Any:
    """A field of a group, with its default and what the rest of the package has to know about it.

    Args:
        flag: Name on the command line, if it differs from the field's name.
        most: Largest value that is accepted; a larger one is a typing error that would exhaust the memory.
        basic: `--help` lists it among the options to look at first.
        resumable: A run may be resumed with another value.
        costly: Larger values make a training step slower and larger; sweeps plan their memory for the largest.
        perturbed: May differ between a checkpoint and the network that takes it over in population-based training.
        not_searched: Why a sweep cannot search over it; empty if it can.
    """
    marks = {"flag": flag, "most": most, "basic": basic, "resumable": resumable, "costly": costly}
    return field(default=default, metadata=marks | {"perturbed": perturbed, "not_searched": not_searched})


_TARGET = "all trials share the target episodes"
_TARGET_SHAPE = f"give --target-ways and --target-shot; {_TARGET}"
_MACHINE = "the sweep shares the machine out among trials"
_LENGTH = "all trials see equally many images; see --epochs"
_SWEEP = "it belongs to the sweep"


@dataclass(frozen=True)
class DataConfig:
    """The data set and where it lies."""

    name: str = setting("fc100", flag="data", basic=True, not_searched=_TARGET)
    """Data set: a name (fc100, glyphs, or one that was prepared under data_root), or the path or URL of a manifest."""
    root: str = setting("data", flag="data_root", resumable=True, not_searched=_SWEEP)
    """Folder of the prepared data sets. A built-in data set that is missing is prepared there."""
    source: str = setting("", resumable=True, not_searched=_SWEEP)
    """Location of the CIFAR-100 archive, folder or parquet files, if fc100 has to be prepared (empty: download)."""
    cache: str = setting("", resumable=True, not_searched=_SWEEP)
    """Folder of the decoded images (empty: LGM_DIST_CACHE, else lgm_dist in the user's cache folder)."""

    def __post_init__(self) -> None:
        checks.paths(self)
        if not self.name:
            raise ValueError("data ('') must name a data set; use fc100, glyphs or the path of a manifest")


class EpisodeShape(NamedTuple):
    """The size of an episode."""

    ways: int
    """N: classes."""
    shot: int
    """K: support images of each class."""
    query: int
    """Query images of each class; under protocol paper, of one class only."""
    queries: int
    """T: query images of the episode."""


@dataclass(frozen=True)
class EpisodesConfig:
    """The episodes, how many of them, and how they are evaluated."""

    ways: int = setting(5, basic=True, costly=True)
    """Classes of an episode."""
    shot: int = setting(1, basic=True, costly=True)
    """Support images of each class."""
    query: int = setting(1, costly=True)
    """Query images of each class in training. Time and memory of a step grow with ways * (shot + query). Protocol paper
    always has one query an episode."""
    protocol: Protocol = setting("standard", not_searched=_TARGET)
    """standard: no label-dependent augmentation. paper: the authors' own pipeline, which rotates the query with its
    class and so LEAKS the label (angles alone give 67.2 % at 5 ways). Use it only to compare with published figures."""
    augment: bool = setting(True)
    """Augment the training images at random (protocol standard); see augmentations."""
    augmentations: tuple[str, ...] = setting(
        ("flip_shift",), not_searched="all trials augment alike; search over augment"
    )
    """Names of the augmentations of training images, in this order (if augment is on)."""
    noise: Literal["sample", "mean"] = setting("sample")
    """Noise of the generated weights in training: sampled, or fixed at its mean."""
    epochs: int = setting(120, basic=True, resumable=True, not_searched=_LENGTH)
    """Epochs of steps_per_epoch steps."""
    steps_per_epoch: int = setting(1000, basic=True, not_searched=_LENGTH)
    """Optimizer steps in an epoch."""
    meta_batch: int = setting(32, most=65_536, basic=True, costly=True)
    """Episodes of one step, over all workers."""
    eval_every: int = setting(1000, basic=True, not_searched=_LENGTH)
    """Steps between evaluations on val. A checkpoint follows each of them."""
    eval_episodes: int = setting(600, most=1_000_000, not_searched=_TARGET)
    """Episodes of an evaluation on val."""
    test_episodes: int = setting(2000, most=1_000_000, not_searched="only the winner is evaluated on test")
    """Episodes of the evaluation on test at the end, with the checkpoint that was best on val (0: no evaluation)."""
    eval_ways: int = setting(0, not_searched=_TARGET_SHAPE)
    """Ways of val and test episodes (0: as in training)."""
    eval_shot: int = setting(0, not_searched=_TARGET_SHAPE)
    """Shots of val and test episodes (0: as in training)."""
    eval_query: int = setting(15, not_searched=_TARGET)
    """Query images of each class in evaluations. Protocol paper always has one query an episode."""
    eval_seed: int = setting(0, not_searched=_TARGET)
    """Seed of the val and test episodes. It is separate from seed, so that all runs are evaluated on the same episodes."""

    def __post_init__(self) -> None:
        checks.positive(self, "ways", "shot", "query", "epochs", "steps_per_epoch", "meta_batch", "eval_every")
        checks.positive(self, "eval_episodes", "eval_query")
        checks.not_negative(self, "test_episodes", "eval_ways", "eval_shot", "eval_seed")
        checks.choice(self, "protocol", get_args(Protocol))
        checks.choice(self, "noise", ("sample", "mean"))
        if self.ways < 2:
            raise ValueError(
                f"ways ({self.ways}) must be at least 2; an episode of one class has nothing to tell apart"
            )
        if self.eval_ways == 1:
            raise ValueError("eval_ways (1) must be at least 2, or 0 for the ways of training")
        if self.eval_seed >= 2**64:
            raise ValueError(f"eval_seed ({self.eval_seed}) must be below 2**64")
        if self.eval_episodes < 2 or self.test_episodes == 1:
            raise ValueError(
                f"eval_episodes ({self.eval_episodes}) and test_episodes ({self.test_episodes}) must be at least 2; "
                "one episode has no confidence interval (test_episodes 0 skips the evaluation on test)"
            )
        if self.steps * self.meta_batch >= 2**63:
            raise ValueError(
                f"epochs ({self.epochs}) of steps_per_epoch ({self.steps_per_epoch}) steps of meta_batch ({self.meta_batch}) "
                "episodes must be below 2**63 episodes; lower epochs"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.epochs * self.steps_per_epoch

    def shape(self, split: Split) -> EpisodeShape:
        """The size of an episode of this split."""
        if split == "train":
            ways, shot, query = self.ways, self.shot, self.query
        else:
            ways, shot, query = self.eval_ways or self.ways, self.eval_shot or self.shot, self.eval_query
        return (
            EpisodeShape(ways, shot, 1, 1)
            if self.protocol == "paper"
            else EpisodeShape(ways, shot, query, ways * query)
        )


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the paper's model as its authors wrote it (2,661,376 parameters)."""

    backbone: str = setting("conv4")
    """Images to feature maps: the name of a registered backbone."""
    generator: str = setting("lgm")
    """Support features to weights: the name of a registered generator; none switches it off."""
    head: str = setting("cosine")
    """Maps to log-probabilities: the name of a registered head. cosine: the paper's matching head. class_means: cosine to the
    class means with a learned temperature."""
    kernels: Literal["auto", "reference"] = setting("auto", resumable=True, not_searched="it changes the speed alone")
    """auto: the fast version of an operation if the device has one. reference: plain operations only."""
    channels: int = setting(0, not_searched="it is the data's")
    """Channels of an image: 1 or 3 (0: as the data set has; 3 for a network that is built without one)."""
    filters: int = setting(64, most=4096)
    """Filters of each convolution of conv4 and lgm, learned or generated."""
    noise_size: int = setting(32, most=4096)
    """Z: length of the noise of one generated layer; the context is twice as long (mean, log-variance)."""
    norm: Literal["batch", "group", "instance", "layer"] = setting("batch")
    """Normalisation of the backbone and the context encoder."""
    norm_scope: Literal["global", "worker", "episode"] = setting("global")
    """Images over which batch statistics are taken in training: the global meta-batch (the paper's intertask normalisation),
    the worker's slice of it, or each episode. Evaluation always uses the moving averages."""
    norm_decay: float = setting(0.99, perturbed=True)
    """Decay of the moving averages: m <- decay * m + (1 - decay) * statistic."""
    norm_epsilon: float = setting(1e-3, perturbed=True)
    """Added to the variance before the square root."""
    norm_groups: int = setting(8)
    """Groups of norm=group."""
    weight_norm: bool = setting(True)
    """Scale each generated filter to L2 norm 1."""

    def __post_init__(self) -> None:
        checks.positive(self, "filters", "noise_size", "norm_groups")
        checks.not_negative(self, "channels")
        checks.choice(self, "kernels", ("auto", "reference"))
        checks.choice(self, "norm", ("batch", "group", "instance", "layer"))
        checks.choice(self, "norm_scope", ("global", "worker", "episode"))
        checks.between(self, "norm_decay", 0.0, 1.0)
        if not 0 < self.norm_epsilon <= checks.LARGEST:
            raise ValueError(f"norm_epsilon ({self.norm_epsilon}) must be positive; the paper's is 1e-3")
        if self.norm == "group" and self.filters % self.norm_groups:
            fix = max(groups for groups in range(1, self.norm_groups) if self.filters % groups == 0)
            raise ValueError(f"norm_groups ({self.norm_groups}) must divide filters ({self.filters}); use {fix}")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its arithmetic."""

    lr: float = setting(1e-3, basic=True)
    """Learning rate of Adam."""
    lr_decay: float = setting(1 / 1.11111)
    """Factor on the learning rate after every lr_decay_steps steps."""
    lr_decay_steps: int = setting(1500, basic=True)
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


@dataclass(frozen=True)
class RunConfig:
    """The run: its name, workers, storage and time limits."""

    name: str = setting("", basic=True, resumable=True, not_searched=_SWEEP)
    """Name of the run and of its folder in storage (empty: made from data, ways, shot, protocol and seed). A run with the
    same name and storage is resumed."""
    storage: str = setting("runs", resumable=True, not_searched=_SWEEP)
    """Folder of the runs. On several machines, a shared one."""
    stages: tuple[str, ...] = setting(("episodes",), not_searched="all trials train the same stages")
    """Stages of the run, one after the other: names of registered tasks."""
    plugins: tuple[str, ...] = setting((), resumable=True, not_searched=_SWEEP)
    """Python modules to import, which register data sets, augmentations, backbones, generators, heads or tasks of your own."""
    seed: int = setting(0, basic=True)
    """Seed of the initial weights and of the training episodes, their augmentation and noise."""
    workers: int = setting(1, most=4096, basic=True, resumable=True, not_searched=_MACHINE)
    """Ray Train workers; 0 trains in this process, without Ray. On the command line also MIN:MAX, see max_workers."""
    max_workers: int = setting(0, most=4096, resumable=True, not_searched=_MACHINE)
    """Elastic training: as many workers as the cluster has room for, from workers to max_workers (0: always workers)."""
    cpus_per_worker: int = setting(0, most=4096, resumable=True, not_searched=_MACHINE)
    """CPUs, and so torch threads, of a worker (0: the cores of this machine divided by the workers)."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", resumable=True, not_searched=_MACHINE)
    """auto: cuda if this machine has it."""
    wandb: Literal["auto", "online", "offline", "disabled"] = setting("auto", resumable=True, not_searched=_SWEEP)
    """Weights & Biases. auto: online with WANDB_API_KEY or a login, else offline."""
    max_failures: int = setting(3, resumable=True, not_searched=_SWEEP)
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
