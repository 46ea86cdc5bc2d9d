"""A command line that sets every field of Config: presets, a file, single flags. The only tyro import of the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import arg

from lgm_dist.config import PRESETS, Config


@dataclasses.dataclass(frozen=True)
class Flags(Config):
    """Every field of Config as a flag; scripts add their own in a subclass."""

    ways: Annotated[int, arg(aliases=["-w"])] = 5
    """Classes of an episode."""
    shot: Annotated[int, arg(aliases=["-s"])] = 1
    """Support images of each class."""
    epochs: Annotated[int, arg(aliases=["-e"])] = 120
    """Epochs of steps_per_epoch steps."""
    preset: str = "paper"
    """Starting point that the other flags override: paper (the authors' settings) or demo (glyphs, 3 minutes on 2 cores)."""
    config: str = ""
    """Starting point instead of a preset: a JSON file such as a run's config.json or a sweep's best.json."""

    def __post_init__(self) -> None:
        """Nothing yet: Config checks the values outside of tyro, which would wrap the sentence in a box."""


F = TypeVar("F", bound=Flags)


def parse(cls: type[F], argv: list[str]) -> tuple[Config, F]:
    """The configuration that a command line asks for, and all flags. tyro ends the program with status 2 for an unknown flag.

    Raises ValueError for a wrong value.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="paper")
    first.add_argument("--config", default="")
    start = first.parse_known_args(argv)[0]
    base = _read(start.config) if start.config else _preset(start.preset)
    default = cls(**_defaults(cls, base), preset=start.preset, config=start.config)
    flags = tyro.cli(cls, default=default, args=_split_workers(argv))
    return Config(**_fields(flags)), flags


def _defaults(cls: type[Flags], base: Config) -> dict[str, Any]:
    """The base's values; where it has Config's default, that of `cls`, which may be another."""
    ours = {field.name: field.default for field in dataclasses.fields(cls)}
    theirs = {field.name: field.default for field in dataclasses.fields(Config)}
    differ = {name for name in theirs if ours[name] != theirs[name]}
    return {
        name: ours[name] if name in differ and value == theirs[name] else value for name, value in _fields(base).items()
    }


def _preset(name: str) -> Config:
    if name not in PRESETS:
        raise ValueError(f"preset ({name!r}) must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _read(path: str) -> Config:
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"config ({path}) cannot be read ({error}); name a JSON file such as a run's config.json"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"config ({path}) holds no configuration; name a JSON file such as a run's config.json")
    return Config.from_dict(values)


def _split_workers(argv: list[str]) -> list[str]:
    """--workers MIN:MAX -> --workers MIN --max-workers MAX."""
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


def _fields(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
