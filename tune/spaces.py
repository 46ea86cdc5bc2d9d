"""Search spaces: dotted config path -> what to draw from. A user's own file defines SPACE, a dictionary of the same shape."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgm_dist.config import SETTINGS, Config

When = Mapping[str, tuple[Any, ...]]
"""Path of another parameter, which stands before -> its values under which this one means anything."""


@dataclass(frozen=True)
class Choice:
    """One of some values."""

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
    """A positive number between low and high, its logarithm uniform."""

    low: float
    high: float
    when: When = field(default_factory=dict)
    kind = "loguniform"


Param = Choice | Uniform | LogUniform
Space = dict[str, Param]
Sample = dict[str, Any]
"""Dotted config path -> value, for the parameters whose conditions hold."""

WAYS_SHOTS: Space = {"ways": Choice((5, 10, 20)), "shot": Choice((1, 2, 5))}
OPTIM: Space = {
    "lr": LogUniform(1e-4, 1e-2),
    "lr_decay": Choice((1.0, 0.9, 0.7, 0.5)),
    "lr_decay_steps": Choice((50, 100, 200), when={"lr_decay": (0.9, 0.7, 0.5)}),
    "weight_decay": LogUniform(1e-6, 1e-1),
    "meta_batch": Choice((8, 16, 32)),
}
PERTURBED = ("lr", "weight_decay")
"""What population-based training changes on the way."""
NORMALIZATION: Space = {
    "model.norm": Choice(("batch", "group", "instance", "layer")),
    "model.norm_scope": Choice(("global", "worker", "episode"), when={"model.norm": ("batch",)}),
    "model.norm_decay": Choice((0.9, 0.99), when={"model.norm": ("batch",)}),
    "model.weight_norm": Choice((True, False)),
    "noise": Choice(("sample", "mean")),
}
SPACES: dict[str, Space] = {
    "ways_shots": WAYS_SHOTS,
    "optim": OPTIM,
    "normalization": NORMALIZATION,
    "full": {**WAYS_SHOTS, **OPTIM, **NORMALIZATION},
}


def load_space(name: str) -> Space:
    """A named space, or SPACE of a Python file. Raises ValueError for neither."""
    if name in SPACES:
        return SPACES[name]
    path = Path(name)
    if path.suffix != ".py":
        raise ValueError(f"space ({name!r}) must be one of {', '.join(SPACES)}, or a Python file that defines SPACE")
    spec = importlib.util.spec_from_file_location("user_space", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        space = module.SPACE
    except (OSError, SyntaxError, ImportError, AttributeError, NameError, TypeError) as error:
        raise ValueError(f"space ({name}): {error}; it must define SPACE as tune/spaces.py does") from None
    if not isinstance(space, dict) or not space or not all(isinstance(param, Param) for param in space.values()):
        raise ValueError(f"space ({name}): SPACE must be a dictionary of dotted path to Choice, Uniform or LogUniform")
    return space


def check_space(space: Space, base: Config) -> None:
    """Raises ValueError for a path that Config lacks or a sweep owns, a value that Config refuses, a wrong condition."""
    known = list(SETTINGS)
    seen: dict[str, Param] = {}
    for path, param in space.items():
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1) or difflib.get_close_matches(f"model.{path}", known, n=1)
            raise ValueError(
                f"space key {path!r} is no config path; {f'did you mean {near[0]}?' if near else f'use one of {known}'}"
            )
        if reason := SETTINGS[path].field.metadata["not_searched"]:
            raise ValueError(f"space key {path!r} cannot be searched over: {reason}")
        for value in _extremes(path, param):
            try:
                apply(base, _conditions(space, path) | {path: value})
            except (ValueError, TypeError) as error:
                raise ValueError(f"space key {path!r}: {error}") from None
        for other, values in param.when.items():
            parent = seen.get(other)
            if not isinstance(parent, Choice) or not set(values) <= set(parent.values):
                raise ValueError(
                    f"space key {path!r}: its condition on {other!r} must name values of a Choice that stands before it"
                )
        seen[path] = param


def _extremes(path: str, param: Param) -> tuple[Any, ...]:
    if isinstance(param, Choice):
        if not param.values or len(set(param.values)) < len(param.values):
            raise ValueError(f"space key {path!r}: a Choice needs values, each once, not {param.values}")
        return param.values
    if not param.low < param.high or (isinstance(param, LogUniform) and param.low <= 0):
        raise ValueError(
            f"space key {path!r}: low ({param.low}) must be below high ({param.high}), and a logarithm's above 0"
        )
    return (float(param.low), float(param.high))  # draws are floats, whatever the bounds are written as


def _conditions(space: Space, path: str) -> Sample:
    """A sample under which the parameter means something."""
    found: Sample = {}
    for other, values in space[path].when.items():
        if other in space:
            found |= _conditions(space, other) | {other: values[0]}
    return found


def active(param: Param, sample: Sample) -> bool:
    """Whether the parameter means anything beside the values drawn so far."""
    return all(sample.get(other) in values for other, values in param.when.items())


def without_worker_scope(space: Space, workers: int) -> Space:
    """The space without norm_scope=worker where a trial has one worker: its slice is the global meta-batch then."""
    param = space.get("model.norm_scope")
    if workers > 1 or not isinstance(param, Choice) or "worker" not in param.values:
        return space
    kept = tuple(value for value in param.values if value != "worker")
    return space | {"model.norm_scope": dataclasses.replace(param, values=kept)}


def grid(space: Space) -> list[Sample]:
    """Every combination. Raises ValueError for a parameter that is no Choice."""
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
    """One sample, drawn by an optuna trial (or Ray Tune's wrapper of one)."""
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
    """`count` different samples (all there are, where there are fewer), a function of the seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    drawn = (suggest(space, study.ask()) for _ in itertools.count())
    found: list[Sample] = []
    for sample in itertools.islice(drawn, 50 * count):
        if sample not in found:
            found.append(sample)
        if len(found) == count:
            break
    return found


def apply(base: Config, sample: Sample) -> Config:
    """`base` with the sample's values. Raises ValueError for those that Config refuses."""
    return Config.from_dict(base.flat() | sample)


def images_per_step(config: Config) -> int:
    """Training images that go through the network in one step, over all workers."""
    ways, shot, _, queries = config.episode("train")
    return config.episodes.meta_batch * (ways * shot + queries)


def evaluations_of(config: Config) -> int:
    """How often a run is evaluated while it trains."""
    return max(config.episodes.steps // config.episodes.eval_every, 1)


def budgeted(base: Config, config: Config) -> Config:
    """`config` with its steps scaled to the images of `base`, in as many evaluations; so both cost about the same time."""
    evaluations = evaluations_of(base)
    ratio = images_per_step(base) / images_per_step(config)
    every = max(round(base.episodes.steps / evaluations * ratio), 1)
    decay = max(round(config.optim.lr_decay_steps * ratio), 1)
    return config.replace(epochs=1, steps_per_epoch=every * evaluations, eval_every=every, lr_decay_steps=decay)


def describe(space: Space) -> dict[str, dict[str, Any]]:
    """The space as plain values, for sweep.json."""
    return {path: {"kind": param.kind} | dataclasses.asdict(param) for path, param in space.items()}


def read_space(described: dict[str, dict[str, Any]]) -> Space:
    """The inverse of `describe`, also after JSON has made lists of tuples."""
    space: Space = {}
    for path, values in described.items():
        when = {other: tuple(allowed) for other, allowed in values["when"].items()}
        if values["kind"] == Choice.kind:
            space[path] = Choice(tuple(values["values"]), when)
        else:
            between = LogUniform if values["kind"] == LogUniform.kind else Uniform
            space[path] = between(values["low"], values["high"], when)
    return space
