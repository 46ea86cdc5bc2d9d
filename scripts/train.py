"""Trains LGM-Net: `scripts/train.py --data fc100 --ways 5 --shot 1`. The same name and storage go on where a run stopped."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from lgm_dist.cli import leak_note, status_of, table
from lgm_dist.config import PRESETS, Config


@dataclasses.dataclass(frozen=True)
class Flags(Config):
    """Trains LGM-Net data-parallel under Ray Train, evaluates it on test episodes, and leaves all in storage/name."""

    ways: Annotated[int, arg(aliases=["-w"])] = 5
    """Classes of an episode."""
    shot: Annotated[int, arg(aliases=["-s"])] = 1
    """Support images of each class."""
    epochs: Annotated[int, arg(aliases=["-e"])] = 120
    """Epochs of steps_per_epoch steps."""
    preset: str = "paper"
    """Starting point that the other flags override: paper (the authors' settings) or demo (glyphs, 3 minutes on 2 cores)."""

    def __post_init__(self) -> None:
        """Nothing yet: Config checks the values outside of tyro, which would wrap the sentence in a box."""


def main(argv: list[str]) -> None:
    """Parses, trains, prints the test accuracy and where everything lies."""
    config = parse(argv)
    from lgm_dist.ray_train import fit, read_result  # after parsing: --help and a mistyped flag need no torch

    run = fit(config)
    result = read_result(run)
    accuracy = f"{100 * result['test/accuracy']:.2f} ± {100 * result['test/ci95']:.2f} %"
    row = [
        *(config.run_name, config.protocol, f"{config.ways}-way {config.shot}-shot", accuracy),
        *(f"{result['test/episodes']:,}", f"{result['train/episodes']:,}", f"{result['train/seconds'] / 60:.1f} min"),
        f"{result['memory/peak_bytes'] / 2**30:.2f} GiB",
    ]
    header = ("run", "protocol", "episodes", "test accuracy", "test episodes", "trained on", "time", "memory a worker")
    sys.stdout.write("\n" + table(header, [row]) + leak_note(config.protocol))
    for name in ("result.json", "metrics.jsonl", "curves.png", "episode.png", "checkpoints"):
        sys.stdout.write(f"{name:>14}  {run / name}\n")


def parse(argv: list[str]) -> Config:
    """The configuration that a command line asks for. tyro ends the program with status 2 for a flag it does not know."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="paper")
    preset = first.parse_known_args(argv)[0].preset
    if preset not in PRESETS:
        raise ValueError(f"preset ({preset!r}) must be one of {', '.join(PRESETS)}")
    flags = tyro.cli(Flags, default=Flags(**_fields(PRESETS[preset]), preset=preset), args=argv)
    return Config(**_fields(flags))


def _fields(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}


if __name__ == "__main__":
    sys.exit(status_of(main))
