"""Configuration: frozen, complete, serialisable, validated at construction. Standard library only.

One `Config` describes a run. The same dictionary goes to Ray, W&B and the checkpoint. Whatever a user can get wrong
raises ValueError here, before Ray starts, with the field, the value and the fix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Protocol = Literal["standard", "paper"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_MOST = {
    **dict.fromkeys(("filters", "noise_size", "workers", "max_workers", "cpus_per_worker"), 4096),
    "meta_batch": 65_536,
    "eval_episodes": 1_000_000,
    "test_episodes": 1_000_000,
}
"""Beyond these a number is a slip of the hand, which would take all memory."""
_LARGEST = 3e38
"""Of a float32."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the paper's model as its authors wrote it (2,661,376 parameters)."""

    backbone: str = "conv4"
    """Images to feature maps: the name of a registered backbone."""
    generator: str = "lgm"
    """Support features to weights: the name of a registered generator; none switches it off."""
    head: str = "cosine"
    """Maps to log-probabilities: the name of a registered head. cosine: the paper's matching head. class_means: cosine to the
    class means with a learned temperature."""
    kernels: Literal["auto", "reference"] = "auto"
    """auto: the fast version of an operation if the device has one. reference: plain operations only."""
    channels: int = 3
    """Channels of an image."""
    filters: int = 64
    """Filters of each convolution of conv4 and lgm, learned or generated."""
    noise_size: int = 32
    """Z: length of the noise of one generated layer; the context is twice as long (mean, log-variance)."""
    norm: Literal["batch", "group", "instance", "layer"] = "batch"
    """Normalisation of the backbone and the context encoder."""
    norm_scope: Literal["global", "worker", "episode"] = "global"
    """Images over which batch statistics are taken in training: the global meta-batch (the paper's intertask normalisation),
    the worker's slice of it, or each episode. Evaluation always uses the moving averages."""
    norm_decay: float = 0.99
    """Decay of the moving averages: m <- decay * m + (1 - decay) * statistic."""
    norm_epsilon: float = 1e-3
    """Added to the variance before the square root."""
    norm_groups: int = 8
    """Groups of norm=group."""
    weight_norm: bool = True
    """Scale each generated filter to L2 norm 1."""

    def __post_init__(self) -> None:
        for name in ("channels", "filters", "noise_size", "norm_groups"):
            _positive(self, name)
        _choice(self, "kernels", ("auto", "reference"))
        _choice(self, "norm", ("batch", "group", "instance", "layer"))
        _choice(self, "norm_scope", ("global", "worker", "episode"))
        _between(self, "norm_decay", 0.0, 1.0)
        if not 0 < self.norm_epsilon <= _LARGEST:
            raise ValueError(f"norm_epsilon ({self.norm_epsilon}) must be positive; the paper's is 1e-3")
        if self.norm == "group" and self.filters % self.norm_groups:
            fix = max(groups for groups in range(1, self.norm_groups) if self.filters % groups == 0)
            raise ValueError(f"norm_groups ({self.norm_groups}) must divide filters ({self.filters}); use {fix}")


@dataclass(frozen=True)
class Config:
    """One training run."""

    ways: int = 5
    """Classes of an episode."""
    shot: int = 1
    """Support images of each class."""
    query: int = 1
    """Query images of each class in training; time and memory of a step grow with ways * (shot + query). Protocol paper:
    always one query an episode."""
    protocol: Protocol = "standard"
    """standard: no label-dependent augmentation. paper: the authors' own pipeline, which rotates the query with its
    class and so LEAKS the label (angles alone give 67.2 % at 5 ways); only for comparison with published figures."""
    augment: bool = True
    """Random flips and shifts of the training images (protocol standard)."""
    data: str = "fc100"
    """Data set: a name (fc100, glyphs, or one prepared under data_root), or a manifest's path or URL."""
    data_root: str = "data"
    """Folder of the prepared data sets; a known name that is not there yet is prepared into it."""
    source: str = ""
    """Where the CIFAR-100 archive, folder or parquet files lie, should fc100 have to be prepared (empty: download)."""
    cache: str = ""
    """Folder of the decoded image banks (empty: LGM_DIST_CACHE, else lgm_dist in the user's cache folder)."""

    epochs: int = 120
    """Epochs of steps_per_epoch steps."""
    steps_per_epoch: int = 1000
    """Optimizer steps in an epoch."""
    meta_batch: int = 32
    """Episodes of one step, over all workers."""
    eval_every: int = 1000
    """Steps between evaluations on val, each followed by a checkpoint."""
    eval_episodes: int = 600
    """Episodes of an evaluation on val."""
    test_episodes: int = 2000
    """Episodes of the evaluation on test at the end, of the checkpoint that was best on val (0: test is not touched)."""
    eval_ways: int = 0
    """Ways of val and test episodes (0: as in training)."""
    eval_shot: int = 0
    """Shots of val and test episodes (0: as in training)."""
    eval_query: int = 15
    """Query images of each class in evaluations (protocol paper: always one query an episode)."""
    eval_seed: int = 0
    """Seed of the val and test episodes; apart from seed, so that all runs are measured on the same episodes."""

    lr: float = 1e-3
    """Learning rate of Adam."""
    lr_decay: float = 1 / 1.11111
    """Factor on the learning rate after every lr_decay_steps steps."""
    lr_decay_steps: int = 1500
    """Steps between two decays of the learning rate."""
    lr_min: float = 1e-6
    """The learning rate never falls below it."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    noise: Literal["sample", "mean"] = "sample"
    """Noise of the generated weights in training: drawn, or at its mean."""

    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """tf32: training's convolutions and matrix products read their factors to ten bits, on GPUs from Ampere on. bf16: training
    computes in bfloat16 where that is safe (weights, statistics and the matching head stay float32), for GPUs and for CPUs with
    AVX512-BF16; without it a CPU gets slower. Evaluation is always float32."""

    workers: int = 1
    """Ray Train workers; 0 trains in this process, without Ray. On the command line also MIN:MAX, see max_workers."""
    max_workers: int = 0
    """Elastic training: as many workers as the cluster has room for, from workers to max_workers (0: always workers)."""
    cpus_per_worker: int = 0
    """CPUs, and so torch threads, of a worker (0: this machine's cores shared out among the workers)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where this machine has it."""
    seed: int = 0
    """Seed of the initial weights and of the training episodes, their augmentation and noise."""
    name: str = ""
    """Name of the run and of its folder under storage (empty: made from data, ways, shot, protocol and seed). The same
    name and storage go on where the run stopped."""
    storage: str = "runs"
    """Folder of the runs; on several machines a shared one."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. auto: online with WANDB_API_KEY or a login, else offline."""
    max_failures: int = 3
    """How often failed workers are replaced, and Ray Train's controller, before the run gives up."""
    hang_seconds: int = 600
    """Longest that a worker's step or evaluation may take: one that takes longer is hung, and the workers start again from
    the last checkpoint (0: they are waited for)."""
    storage_seconds: int = 60
    """How long a storage that cannot be written is tried again before the run ends."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""

    def __post_init__(self) -> None:
        for name in ("ways", "shot", "query", "epochs", "steps_per_epoch", "meta_batch", "eval_every", "eval_episodes"):
            _positive(self, name)
        for name in ("eval_query", "lr_decay_steps"):
            _positive(self, name)
        for name in ("workers", "max_workers", "cpus_per_worker", "seed", "eval_seed", "max_failures"):
            _not_negative(self, name)
        for name in ("test_episodes", "eval_ways", "eval_shot", "hang_seconds", "storage_seconds"):
            _not_negative(self, name)
        _choice(self, "protocol", get_args(Protocol))
        _choice(self, "noise", ("sample", "mean"))
        _choice(self, "precision", ("float32", "tf32", "bf16"))
        _choice(self, "device", ("auto", "cpu", "cuda"))
        _choice(self, "wandb", ("auto", "online", "offline", "disabled"))
        if self.ways < 2:
            raise ValueError(
                f"ways ({self.ways}) must be at least 2; an episode of one class has nothing to tell apart"
            )
        if self.eval_ways == 1:
            raise ValueError("eval_ways (1) must be at least 2, or 0 for the ways of training")
        if self.seed >= 2**64 or self.eval_seed >= 2**64:
            raise ValueError(f"seed ({self.seed}) and eval_seed ({self.eval_seed}) must be below 2**64")
        if not 0 < self.lr <= _LARGEST:
            raise ValueError(f"lr ({self.lr}) must be positive; the paper's is 1e-3")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay ({self.lr_decay}) must be in (0, 1]; 1 keeps the learning rate constant")
        if not 0 <= self.lr_min <= self.lr:
            raise ValueError(f"lr_min ({self.lr_min}) must lie between 0 and lr ({self.lr})")
        if not 0 <= self.weight_decay <= _LARGEST:
            raise ValueError(f"weight_decay ({self.weight_decay}) must not be negative; 0 turns it off")
        if self.eval_episodes < 2 or self.test_episodes == 1:
            raise ValueError(
                f"eval_episodes ({self.eval_episodes}) and test_episodes ({self.test_episodes}) must be at least 2; "
                "one episode has no confidence interval (test_episodes 0 leaves test alone)"
            )
        if self.max_workers and not 0 < self.workers <= self.max_workers <= self.meta_batch:
            raise ValueError(
                f"max_workers ({self.max_workers}) must lie between workers ({self.workers}), itself at least 1, and "
                f"meta_batch ({self.meta_batch}); give --workers MIN:MAX"
            )
        if self.workers and not self.max_workers and self.meta_batch % self.workers:
            below = self.meta_batch // self.workers * self.workers
            fix = " or ".join(str(m) for m in (below, below + self.workers) if m)
            raise ValueError(f"meta_batch ({self.meta_batch}) must be divisible by workers ({self.workers}); use {fix}")
        if 0 < self.hang_seconds <= self.storage_seconds:
            raise ValueError(
                f"hang_seconds ({self.hang_seconds}) must be above storage_seconds ({self.storage_seconds}), as a worker "
                "that waits for the storage is not hung, or 0"
            )
        if self.steps * self.meta_batch >= 2**63:
            raise ValueError(
                f"epochs ({self.epochs}) of steps_per_epoch ({self.steps_per_epoch}) steps of meta_batch ({self.meta_batch}) "
                "episodes must be below 2**63 episodes; lower epochs"
            )
        for name in ("data", "data_root", "source", "cache", "name", "storage"):
            _path(self, name)
        if not self.data:
            raise ValueError("data ('') must name a data set; use fc100, glyphs or the path of a manifest")
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name ({self.name!r}) must be a plain folder name; put folders into storage")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def evaluation(self) -> Config:
        """The configuration of val and test episodes: eval_ways and eval_shot as its ways and shot."""
        return dataclasses.replace(self, ways=self.eval_ways or self.ways, shot=self.eval_shot or self.shot)

    @property
    def run_name(self) -> str:
        """`name`, or one made from what tells runs apart at a glance."""
        if self.name:
            return self.name
        data = self.data.rsplit("/", 1)[-1].removesuffix(".json")
        return f"{data}-{self.ways}w{self.shot}s-{self.protocol}-seed{self.seed}"

    def flat(self) -> dict[str, Any]:
        """Every setting by its name on the command line: the network's as model.NAME."""
        values = self.to_dict()
        return values | {f"model.{name}": value for name, value in values.pop("model").items()}

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, that `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises ValueError for a key that is no field or a value of another type."""
        values = dict(values)
        model = values.pop("model", {})
        if not isinstance(model, dict):
            raise ValueError(f"model ({model!r}) must be a dictionary of the network's settings")
        _check_keys(cls, values)
        _check_keys(ModelConfig, model)
        return cls(**values, model=ModelConfig(**model))


def differing(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The fields that differ, in words, such as "shot 1, not 5, lr 0.1, not 0.2"; "" where none does."""
    return ", ".join(f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in ours if theirs[name] != ours[name])


def _positive(config: object, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} ({value}) must be a whole number of at least 1")
    _at_most(name, value)


def _not_negative(config: object, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} ({value}) must be a whole number of at least 0")
    _at_most(name, value)


def _at_most(name: str, value: int) -> None:
    if value > _MOST.get(name, value):
        raise ValueError(f"{name} ({value}) must be at most {_MOST[name]:,}")


def _path(config: object, name: str) -> None:
    value: str = getattr(config, name)
    try:
        good = all(byte >= 32 and byte != 127 for byte in value.encode())
    except UnicodeEncodeError:
        good = False
    if not good:
        raise ValueError(f"{name} ({value!r}) must be text without control characters; it names a file or folder")


def _between(config: object, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"{name} ({value}) must lie between {low:g} and {high:g}")


def _choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(choices)}")


def _check_keys(cls: type[Any], values: dict[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{unknown[0]} is no field of {cls.__name__}; the fields are {', '.join(names)}")
    for name, value in values.items():
        expected = type(getattr(cls(), name))
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"{name} ({value!r}) must be of type {expected.__name__}")


PRESETS: dict[str, Config] = {
    "paper": Config(),
    "demo": Config(
        data="glyphs",
        query=3,
        epochs=1,
        steps_per_epoch=300,
        meta_batch=8,
        eval_every=100,
        lr_decay_steps=30,
        name="demo",
        model=ModelConfig(norm_decay=0.95),
    ),
}
"""Named starting points of `scripts/train.py --preset`; single flags override them."""
