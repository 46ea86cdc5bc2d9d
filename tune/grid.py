"""Trains and evaluates the ways × shots table: `tune/grid.py --ways 5 20 --shots 1 5`. It goes on after a stop."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

from spaces import budgeted, images_per_step
from tyro.conf import OmitArgPrefixes, Suppress, arg

from lgm_dist.cli.flags import EpisodesFlags, Flags, parse
from lgm_dist.config import Config
from lgm_dist.console import run_command
from lgm_dist.errors import RunFailed


@dataclasses.dataclass(frozen=True)
class CellFlags(EpisodesFlags):
    """The episodes of all cells, without what differs between them."""

    ways: Suppress[int] = 5
    shot: Suppress[int] = 1
    eval_ways: Suppress[int] = 0
    eval_shot: Suppress[int] = 0


@dataclasses.dataclass(frozen=True)
class GridFlags(Flags):
    """Trains one run for each cell of the ways × shots table, evaluates it on its own episodes, and writes the table.

    Every other flag is the configuration of all cells. Each sees as many training images as its 5-way 1-shot cell would.
    """

    episodes: OmitArgPrefixes[CellFlags] = CellFlags()
    table_ways: Annotated[tuple[int, ...], arg(name="ways", aliases=["-w"])] = (5, 20)
    """Ways of the table."""
    table_shots: Annotated[tuple[int, ...], arg(name="shots", aliases=["--shot", "-s"])] = (1, 5)
    """Shots of the table."""
    equal_steps: bool = False
    """All cells take the same number of steps, instead of seeing the same number of images."""
    cross: bool = False
    """Evaluates each network on the test episodes of all other cells too."""


def main(argv: list[str]) -> None:
    """Parses, trains the cells, prints and writes the table of what is finished, whatever happens."""
    config, flags = parse(GridFlags, argv)
    cells = cells_of(config, flags)
    if flags.cross and not config.episodes.test_episodes:
        raise ValueError("test_episodes (0) leaves test alone, but --cross evaluates on it; give --test-episodes 2000")
    from grid_cells import check, cross_evaluate, train  # after parsing: --help and a mistyped flag need no torch
    from grid_tables import report

    check(cells)
    try:
        train(cells)
        if flags.cross:
            cross_evaluate(cells)
    except KeyboardInterrupt:
        raise RunFailed("stopped; the same command goes on") from None
    finally:
        report(cells, flags.cross, shlex.join(["tune/grid.py", *argv]))


def cells_of(config: Config, flags: GridFlags) -> list[Config]:
    """The configuration of each cell, the cheapest first. Raises ValueError for ways or shots that Config refuses."""
    if not flags.table_ways or not flags.table_shots:
        raise ValueError("ways and shots must each name at least one number; such as --ways 5 20 --shots 1 5")
    name = config.run.name or f"{Path(config.data.name).stem}-grid-{config.episodes.protocol}-seed{config.run.seed}"
    whole = config.replace(ways=5, shot=1, eval_ways=0, eval_shot=0, storage=str(Path(config.run.storage) / name))
    cells = []
    for ways, shot in {(ways, shot) for ways in flags.table_ways for shot in flags.table_shots}:
        cell = whole.replace(ways=ways, shot=shot, name=f"{ways}w{shot}s")
        cells.append(cell if flags.equal_steps else budgeted(whole, cell))
    # With equal steps the cost of a cell; with equal images all cost the same but for evaluations, which grow with it too.
    return sorted(cells, key=lambda cell: (images_per_step(cell), cell.episodes.ways))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also between two cells, where no run listens for it
    sys.exit(run_command(main))
