"""A command line with a flag for every setting of Config: presets, a file, single flags."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, arg

from lgm_dist.config import GROUPS, PRESETS, SETTINGS, Config
from lgm_dist.settings import (
    DataConfig,
    EpisodesConfig,
    GeneratorConfig,
    ModelConfig,
    OptimConfig,
    PretrainingConfig,
    RunConfig,
)


class _Unchecked:
    """Config checks the values after parsing. Inside tyro the message would be wrapped in a box."""

    def __post_init__(self) -> None:
        """No checks."""


@dataclasses.dataclass(frozen=True)
class DataFlags(_Unchecked, DataConfig):
    """The data set and where it lies."""

    name: Annotated[str, arg(name="data")] = "fc100"
    """Data set: a name (fc100, glyphs, or one that was prepared under data_root), or the path or URL of a manifest."""
    root: Annotated[str, arg(name="data-root")] = "data"
    """Folder of the prepared data sets. A built-in data set that is missing is prepared there."""


@dataclasses.dataclass(frozen=True)
class EpisodesFlags(_Unchecked, EpisodesConfig):
    """The episodes, how many of them, and how they are evaluated."""

    ways: Annotated[int, arg(aliases=["-w"])] = 5
    """Classes of an episode."""
    shot: Annotated[int, arg(aliases=["-s"])] = 1
    """Support images of each class."""
    epochs: Annotated[int, arg(aliases=["-e"])] = 120
    """Epochs of steps_per_epoch steps."""


@dataclasses.dataclass(frozen=True)
class PretrainingFlags(_Unchecked, PretrainingConfig):
    """Classification of the images of the base classes."""


@dataclasses.dataclass(frozen=True)
class GeneratorFlags(_Unchecked, GeneratorConfig):
    """Episodes over the stored features of a frozen backbone."""


@dataclasses.dataclass(frozen=True)
class ModelFlags(_Unchecked, ModelConfig):
    """The network."""


@dataclasses.dataclass(frozen=True)
class OptimFlags(_Unchecked, OptimConfig):
    """The optimizer and its arithmetic."""


@dataclasses.dataclass(frozen=True)
class RunFlags(_Unchecked, RunConfig):
    """The run: its name, workers, storage and time limits."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Every setting of Config as a flag. Commands add flags of their own in a subclass."""

    data: OmitArgPrefixes[DataFlags] = DataFlags()
    episodes: OmitArgPrefixes[EpisodesFlags] = EpisodesFlags()
    pretraining: PretrainingFlags = PretrainingFlags()
    generator: GeneratorFlags = GeneratorFlags()
    model: ModelFlags = ModelFlags()
    optim: OmitArgPrefixes[OptimFlags] = OptimFlags()
    run: OmitArgPrefixes[RunFlags] = RunFlags()
    preset: str = "paper"
    """Starting point that the other flags override: paper (the authors' settings), strong (FC100, the most accurate; an hour
    on 2 cores), quick (the same in 12 minutes) or demo (glyphs, 2 minutes on 2 cores)."""
    config: str = ""
    """Starting point instead of a preset: a JSON file such as a run's config.json or a sweep's best.json."""


F = TypeVar("F", bound=Flags)


def parse(cls: type[F], argv: list[str], base: Config | None = None) -> tuple[Config, F]:
    """The configuration that a command line asks for, and all flags.

    Args:
        cls: Flags of the command.
        argv: The arguments.
        base: Defaults of this command, if they differ from Config's; a preset or file that sets a value overrides them.

    Raises ValueError for a wrong value. tyro ends the program with status 2 for an unknown flag.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="paper")
    first.add_argument("--config", default="")
    start = first.parse_known_args(argv)[0]
    chosen = _read(start.config) if start.config else _preset(start.preset)
    defaults = _with_defaults(chosen, base or Config())
    groups = {name: _as_flags(type(getattr(cls(), name)), getattr(defaults, name)) for name in GROUPS}
    default = cls(**groups, preset=start.preset, config=start.config)
    flags = tyro.cli(cls, default=default, args=_split_workers(argv), description=_description(cls))
    return Config.of(**{name: _as_config(name, getattr(flags, name)) for name in GROUPS}), flags


def _with_defaults(chosen: Config, base: Config) -> Config:
    """`chosen` with the values of `base` for the settings that `chosen` leaves at Config's default."""
    theirs, ours = chosen.flat(), base.flat()
    return chosen.replace(
        **{name: ours[name] for name, place in SETTINGS.items() if theirs[name] == place.field.default != ours[name]}
    )


def _as_flags(cls: type[Any], values: Any) -> Any:
    return cls(**{field.name: getattr(values, field.name) for field in dataclasses.fields(values)})


def _as_config(group: str, flags: Any) -> Any:
    cls = GROUPS[group]
    return cls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)})


def _description(cls: type[Flags]) -> str:
    """What the command does, and the options that a newcomer needs first."""
    names = [f"--{name.replace('_', '-')}" for name, place in SETTINGS.items() if place.field.metadata["basic"]]
    return f"{inspect.getdoc(cls)}\n\nLook at these first: --preset, {', '.join(names)}."


def _preset(name: str) -> Config:
    if name not in PRESETS:
        raise ValueError(f"preset ({name!r}) must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _read(path: str) -> Config:
    fix = "name a JSON file such as a run's config.json"
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"config ({path}) cannot be read ({error}); {fix}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config ({path}) holds no configuration; {fix}")
    return Config.from_dict(values)


def _split_workers(argv: list[str]) -> list[str]:
    """Replace --workers MIN:MAX by --workers MIN --max-workers MAX."""
    out: list[str] = []
    for word in argv:
        previous = out[-1] if out else ""
        name, _, value = word.partition("=")
        spec = word if previous == "--workers" else value if name == "--workers" else ""
        low, colon, high = spec.partition(":")
        if not colon:
            out.append(word)
        elif previous == "--workers":
            out += [low, "--max-workers", high]
        else:
            out += [f"--workers={low}", "--max-workers", high]
    return out
