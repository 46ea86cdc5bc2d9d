"""Search spaces: the name of a setting -> the values to draw from."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgm_dist import checks
from lgm_dist.config import SETTINGS, Config

When = Mapping[str, tuple[Any, ...]]
"""Name of an earlier setting of the space -> the values of it for which this setting is drawn."""


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]
    when: When = field(default_factory=dict)
    kind = "choice"


@dataclass(frozen=True)
class Uniform:
    """A number between low and high."""

    low: float
    high: float
    when: When = field(default_factory=dict)
    kind = "uniform"


@dataclass(frozen=True)
class LogUniform:
    """A positive number between low and high, uniform in its logarithm."""

    low: float
    high: float
    when: When = field(default_factory=dict)
    kind = "loguniform"


Param = Choice | Uniform | LogUniform
Space = dict[str, Param]
"""Settings by flag name."""
Sample = dict[str, Any]
"""The value of each setting whose condition holds."""

WAYS_SHOTS: Space = {"ways": Choice((5, 10, 20)), "shot": Choice((1, 2, 5))}
OPTIM: Space = {
    "lr": LogUniform(1e-4, 1e-2),
    "lr_decay": Choice((1.0, 0.9, 0.7, 0.5)),
    "lr_decay_steps": Choice((50, 100, 200), when={"lr_decay": (0.9, 0.7, 0.5)}),
    "weight_decay": LogUniform(1e-6, 1e-1),
    "meta_batch": Choice((8, 16, 32)),
}
NORMALIZATION: Space = {
    "model.norm": Choice(("batch", "group", "instance", "layer")),
    "model.norm_scope": Choice(("global", "worker", "episode"), when={"model.norm": ("batch",)}),
    "model.norm_decay": Choice((0.9, 0.99), when={"model.norm": ("batch",)}),
    "model.weight_norm": Choice((True, False)),
    "noise": Choice(("sample", "mean")),
}
GENERATOR: Space = {
    "model.generator": Choice(
        (
            *("none", "residual", "low_rank", "class_attention", "base_attention"),
            *("completion", "projection", "metric", "gram"),
        )
    ),
    "classes": Choice(("all", "held_out")),
    "generator.variants": Choice(("none", "rotations"), when={"classes": ("held_out",)}),
    "generator.copies": Choice((1, 4, 8)),
    "lr": LogUniform(1e-4, 1e-2),
    "weight_decay": LogUniform(1e-6, 1e-1),
    "meta_batch": Choice((8, 16, 32)),
}
"""For --stages generator, over the features of a backbone that was pretrained with pretraining.holdout."""
SPACES: dict[str, Space] = {
    "ways_shots": WAYS_SHOTS,
    "optim": OPTIM,
    "normalization": NORMALIZATION,
    "full": {**WAYS_SHOTS, **OPTIM, **NORMALIZATION},
    "generator": GENERATOR,
}
"""The built-in spaces."""
PERTURBED = ("lr", "weight_decay")
"""The settings that population-based training perturbs."""
_FILE = "define a dictionary of setting to Choice, Uniform or LogUniform, such as SPACE = {'ways': Choice((5, 10))}"


def load_space(name: str, spaces: Mapping[str, Space] = SPACES) -> Space:
    """The space called `name`, or SPACE of the Python file `name`. Raises ValueError if there is neither."""
    if name in spaces:
        return spaces[name]
    path = Path(name)
    if path.suffix != ".py":
        raise ValueError(f"space ({name!r}) must be one of {', '.join(spaces)}, or a Python file that defines SPACE")
    spec = importlib.util.spec_from_file_location("user_space", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        space = module.SPACE
    except (OSError, SyntaxError, ImportError, AttributeError, NameError, TypeError) as error:
        raise ValueError(f"space ({name}): {error}; {_FILE}") from None
    if not isinstance(space, dict) or not space or not all(isinstance(param, Param) for param in space.values()):
        raise ValueError(f"space ({name}): SPACE has the wrong type; {_FILE}")
    return space


def check_space(space: Space, base: Config) -> None:
    """Raise ValueError for a setting that cannot be searched, a value that Config refuses, or a wrong condition."""
    earlier: dict[str, Param] = {}
    for path, param in space.items():
        _check_name(path)
        for value in _extremes(path, param):
            try:
                apply(base, _conditions(space, path) | {path: value})
            except (ValueError, TypeError) as error:
                raise ValueError(f"space key {path!r}: {error}") from None
        for other, values in param.when.items():
            parent = earlier.get(other)
            if not isinstance(parent, Choice) or not set(values) <= set(parent.values):
                raise ValueError(
                    f"space key {path!r}: its condition on {other!r} must name values of a Choice that comes before it"
                )
        earlier[path] = param


def _check_name(path: str) -> None:
    if path not in SETTINGS:
        full = f"model.{path}"
        hint = f"did you mean {full}?" if full in SETTINGS else checks.did_you_mean(path, SETTINGS)
        raise ValueError(f"space key {path!r} is not a setting; {hint}")
    if reason := SETTINGS[path].field.metadata["not_searched"]:
        raise ValueError(f"space key {path!r} cannot be searched over: {reason}")


def _extremes(path: str, param: Param) -> tuple[Any, ...]:
    """All values of a choice, both ends of a range."""
    if isinstance(param, Choice):
        if not param.values or len(set(param.values)) < len(param.values):
            raise ValueError(
                f"space key {path!r}: a Choice needs at least one value and none twice, not {param.values}"
            )
        return param.values
    if not param.low < param.high or (isinstance(param, LogUniform) and param.low <= 0):
        raise ValueError(
            f"space key {path!r}: low ({param.low}) must be below high ({param.high}), and above 0 for LogUniform"
        )
    return (float(param.low), float(param.high))  # draws are floats, even if the bounds are integers


def _conditions(space: Space, path: str) -> Sample:
    """A sample with which the setting's condition holds."""
    sample: Sample = {}
    for other, values in space[path].when.items():
        if other in space:
            sample |= _conditions(space, other) | {other: values[0]}
    return sample


def active(param: Param, sample: Sample) -> bool:
    """Return True if the condition of `param` holds for the values drawn so far."""
    return all(sample.get(other) in values for other, values in param.when.items())


def without_worker_scope(space: Space, workers: int) -> Space:
    """The space without norm_scope=worker if a trial has one worker, whose slice is the global meta-batch."""
    param = space.get("model.norm_scope")
    if workers > 1 or not isinstance(param, Choice) or "worker" not in param.values:
        return space
    kept = tuple(value for value in param.values if value != "worker")
    return space | {"model.norm_scope": dataclasses.replace(param, values=kept)}


def all_samples(space: Space) -> list[Sample]:
    """Every combination of values. Raises ValueError if a setting is not a Choice."""
    samples: list[Sample] = [{}]
    for path, param in space.items():
        if not isinstance(param, Choice):
            raise ValueError(
                f"space key {path!r} has infinitely many values; use --search random or tpe, or give it a Choice"
            )
        samples = list(
            itertools.chain.from_iterable(
                [sample | {path: value} for value in param.values] if active(param, sample) else [sample]
                for sample in samples
            )
        )
    return samples


def suggest(space: Space, trial: Any) -> Sample:
    """A sample drawn by an Optuna trial, or by Ray Tune's wrapper of one."""
    sample: Sample = {}
    for path, param in space.items():
        if not active(param, sample):
            continue
        if isinstance(param, Choice):
            sample[path] = trial.suggest_categorical(path, param.values)
        else:
            sample[path] = trial.suggest_float(path, param.low, param.high, log=isinstance(param, LogUniform))
    return sample


def random_samples(space: Space, count: int, seed: int) -> list[Sample]:
    """`count` different samples, or all that the space has if these are fewer. A function of the seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    samples: list[Sample] = []
    for _ in range(50 * count):
        sample = suggest(space, study.ask())
        if sample not in samples:
            samples.append(sample)
        if len(samples) == count:
            break
    return samples


def apply(base: Config, sample: Sample) -> Config:
    """`base` with the values of the sample. Raises ValueError for values that Config refuses."""
    return Config.from_dict(base.flat() | sample)


def images_per_step(config: Config) -> int:
    """Training images of one step, over all workers."""
    ways, shot, _, queries = config.episode("train")
    return config.episodes.meta_batch * (ways * shot + queries)


def evaluations_of(config: Config) -> int:
    """Number of evaluations on val during training."""
    return max(config.episodes.steps // config.episodes.eval_every, 1)


def budgeted(base: Config, config: Config) -> Config:
    """`config` with the number of steps that trains on as many images as `base`, and as many evaluations as `base`."""
    evaluations = evaluations_of(base)
    ratio = images_per_step(base) / images_per_step(config)
    every = max(round(base.episodes.steps / evaluations * ratio), 1)
    decay = max(round(config.optim.lr_decay_steps * ratio), 1)
    return config.replace(epochs=1, steps_per_epoch=every * evaluations, eval_every=every, lr_decay_steps=decay)


def describe(space: Space) -> dict[str, dict[str, Any]]:
    """The space as plain values, for sweep.json."""
    return {path: {"kind": param.kind} | dataclasses.asdict(param) for path, param in space.items()}


def read_space(described: dict[str, dict[str, Any]]) -> Space:
    """The space that `describe` made, also after JSON has turned tuples into lists."""
    space: Space = {}
    for path, values in described.items():
        when = {other: tuple(allowed) for other, allowed in values["when"].items()}
        if values["kind"] == Choice.kind:
            space[path] = Choice(tuple(values["values"]), when)
        else:
            between = LogUniform if values["kind"] == LogUniform.kind else Uniform
            space[path] = between(values["low"], values["high"], when)
    return space
