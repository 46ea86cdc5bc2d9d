"""The command line of `python tests/chaos`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import chaos
from chaos.elastic import elastic
from chaos.hosts import hosts
from chaos.processes import FAULTS, finite, kills, memory, resize, starts
from chaos.storage import storage
from chaos.trainings import Outcome, Training, markdown
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
    """Print the table of outcomes and write it as JSON. Raises RunFailed if a training does not recover."""
    flags = make_parser().parse_args(argv)
    facts = {"commit": commit(), "command": ["tests/chaos", *argv], "cpus": os.cpu_count()}  # as they are now
    with tempfile.TemporaryDirectory() as temporary:
        folder = (flags.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes: list[Outcome] = []
        try:
            for name in list(PARTS) if "all" in flags.parts else flags.parts:
                outcomes += PARTS[name](folder, flags)
        finally:  # also print the outcomes before a training that did not recover
            Training.end_all()
            sys.stdout.write(markdown(outcomes))
            if flags.json:
                rows = [asdict(outcome) for outcome in outcomes]
                flags.json.write_text(json.dumps(facts | {"outcomes": rows}, indent=1) + "\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="tests/chaos", description=chaos.__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="part", help=", ".join([*PARTS, "all"]))
    parser.add_argument("--rounds", type=int, default=4, help="kills: how often each fault happens (%(default)s)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="kills: which faults (all)")
    parser.add_argument("--workers", type=int, default=2, help="kills, finite, memory: Ray workers (%(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="kills: steps of the training (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=100, help="kills: steps between checkpoints (%(default)s)")
    parser.add_argument("--hang-seconds", type=int, default=10, help="kills: as in scripts/train.py (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="kills: seed of the times and the victims (%(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for all files, which is kept (a temporary folder)")
    parser.add_argument("--json", type=Path, help="file to which the outcomes are written as JSON")
    return parser
