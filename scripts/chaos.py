"""What a training survives: `scripts/chaos.py kills` ends its processes at random; the other parts are in PARTS, or all.

Each part trains a tiny network on the built-in glyphs, does the real thing to its processes, its storage or its cluster, and
compares what is left with a run that was left alone, bit for bit. Linux: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lgm_dist.chaos.elastic import elastic
from lgm_dist.chaos.hosts import hosts
from lgm_dist.chaos.processes import FAULTS, finite, kills, memory, resize, starts
from lgm_dist.chaos.storage import storage
from lgm_dist.chaos.trainings import Outcome, Training, markdown
from lgm_dist.console import run_command
from lgm_dist.runs.facts import commit

PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "kills": kills,
    "resize": resize,
    "storage": storage,
    "finite": finite,
    "elastic": elastic,
    "starts": starts,
    "memory": memory,
    "hosts": hosts,
}


def main(argv: list[str]) -> None:
    """Prints the table and writes it as JSON. Raises RunFailed where a training was lost."""
    flags = _parser().parse_args(argv)
    facts = {"commit": commit(), "command": ["scripts/chaos.py", *argv], "cpus": os.cpu_count()}  # as they are now
    with tempfile.TemporaryDirectory() as temporary:
        folder = (flags.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes: list[Outcome] = []
        try:
            for name in list(PARTS) if "all" in flags.parts else flags.parts:
                outcomes += PARTS[name](folder, flags)
        finally:  # what was found before a training was lost, too
            Training.end_all()  # that one may still run
            sys.stdout.write(markdown(outcomes))
            if flags.json:
                found = [asdict(outcome) for outcome in outcomes]
                flags.json.write_text(json.dumps(facts | {"outcomes": found}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos.py", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="part", help=", ".join([*PARTS, "all"]))
    parser.add_argument("--kills", type=int, default=4, help="times of each fault (%(default)s)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="of the part kills (all)")
    parser.add_argument("--workers", type=int, default=2, help="of kills, finite and memory (%(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="of the part kills (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--hang-seconds", type=int, default=10, help="as of scripts/train.py (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where everything goes, kept (a temporary folder, removed)")
    parser.add_argument("--json", type=Path, help="the figures go there too")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
