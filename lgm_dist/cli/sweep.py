"""`lgm-dist sweep`: search a space of settings with Ray Tune."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lgm_dist.cli.flags import Flags, parse
from lgm_dist.config import Config
from lgm_dist.extras import need
from lgm_dist.sweeps.options import SweepOptions
from lgm_dist.sweeps.spaces import SPACES, Space


@dataclass(frozen=True)
class SweepFlags(Flags, SweepOptions):
    """Train trials with settings drawn from a space, and compare them on the same val episodes.

    Every other flag is the base configuration of all trials. A trial trains on as many images as the base would. The default
    of --workers is 0: each trial trains in one process.
    """


def main(argv: list[str], spaces: Mapping[str, Space] = SPACES) -> None:
    """Search the space, evaluate the winner on test, and print and write the results."""
    config, flags = parse(SweepFlags, argv, Config.of(workers=0))
    folder = Path(config.run.storage).absolute() / (config.run.name or f"sweep-{Path(flags.space).stem}")
    for module in ("ray", "optuna", "matplotlib", "sklearn"):
        need(module, "sweep", "for a sweep")
    from lgm_dist.cluster.connection import prepare_for_ray  # after parsing, because torch takes seconds to import

    prepare_for_ray()
    if not flags.resume:
        from lgm_dist.sweeps.setup import set_up

        set_up(folder, config, flags, spaces, shlex.join(["lgm-dist", "sweep", *argv]))
    from lgm_dist.sweeps.driver import search
    from lgm_dist.sweeps.winner import finish

    search(folder)
    finish(folder)
