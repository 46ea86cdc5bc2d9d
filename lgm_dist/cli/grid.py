"""`lgm-dist grid`: train and evaluate the table of ways × shots."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Suppress, arg

from lgm_dist.cli.flags import EpisodesFlags, Flags, parse
from lgm_dist.config import Config
from lgm_dist.errors import RunFailed
from lgm_dist.sweeps.signals import sigterm_as_ctrl_c
from lgm_dist.sweeps.spaces import budgeted, images_per_step


@dataclass(frozen=True)
class CellFlags(EpisodesFlags):
    """The episodes of all cells, without the settings that differ between cells."""

    ways: Suppress[int] = 5
    shot: Suppress[int] = 1
    eval_ways: Suppress[int] = 0
    eval_shot: Suppress[int] = 0


@dataclass(frozen=True)
class GridFlags(Flags):
    """Train one run for each cell of the ways × shots table, evaluate it on its own kind of episodes, and write the table.

    Every other flag is the configuration of all cells. Each cell trains on as many images as a 5-way 1-shot cell would. If the
    command is stopped, the same command continues.
    """

    episodes: OmitArgPrefixes[CellFlags] = CellFlags()
    table_ways: Annotated[tuple[int, ...], arg(name="ways", aliases=["-w"])] = (5, 20)
    """Ways of the table."""
    table_shots: Annotated[tuple[int, ...], arg(name="shots", aliases=["--shot", "-s"])] = (1, 5)
    """Shots of the table."""
    equal_steps: bool = False
    """Train all cells for the same number of steps instead of on the same number of images."""
    cross: bool = False
    """Also evaluate each network on the test episodes of all other cells."""


def main(argv: list[str]) -> None:
    """Train the cells, and print and write the table of the finished ones, even after a failure or a stop."""
    config, flags = parse(GridFlags, argv)
    cells = cells_of(config, flags)
    if flags.cross and not config.episodes.test_episodes:
        raise ValueError("test_episodes (0) must be at least 2 for --cross, which evaluates on test; use 2000")
    from lgm_dist.sweeps import grid_cells, grid_tables  # after parsing, because torch takes seconds to import

    grid_cells.check(cells)
    try:
        with sigterm_as_ctrl_c():
            grid_cells.train(cells)
            if flags.cross:
                grid_cells.cross_evaluate(cells)
    except KeyboardInterrupt:
        raise RunFailed("stopped; the same command continues") from None
    finally:
        grid_tables.report(cells, flags.cross, shlex.join(["lgm-dist", "grid", *argv]))


def cells_of(config: Config, flags: GridFlags) -> list[Config]:
    """The configuration of each cell, the cheapest first. Raises ValueError for ways or shots that Config refuses."""
    if not flags.table_ways or not flags.table_shots:
        raise ValueError("ways and shots must each have at least one number, such as --ways 5 20 --shots 1 5")
    name = config.run.name or f"{Path(config.data.name).stem}-grid-{config.episodes.protocol}-seed{config.run.seed}"
    whole = config.replace(ways=5, shot=1, eval_ways=0, eval_shot=0, storage=str(Path(config.run.storage) / name))
    cells = []
    for ways, shot in {(ways, shot) for ways in flags.table_ways for shot in flags.table_shots}:
        cell = whole.replace(ways=ways, shot=shot, name=f"{ways}w{shot}s")
        cells.append(cell if flags.equal_steps else budgeted(whole, cell))
    # With equal steps, this is the cost of a cell. With equal images, cells differ in their evaluations, which grow with it.
    return sorted(cells, key=lambda cell: (images_per_step(cell), cell.episodes.ways))
