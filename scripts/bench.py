"""The benchmark: `scripts/bench.py all --markdown` prints the README's tables.

Its parts step, floor, memory and growth need torch and numpy alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from lgm_dist.bench import loading, measure, network
from lgm_dist.bench.measure import Section
from lgm_dist.cli import status_of
from lgm_dist.config import Split
from lgm_dist.data.bank import ImageBank


def main(argv: list[str]) -> None:
    """Measures what is asked for, prints its tables, writes all figures."""
    flags = _parser().parse_args(argv)
    if flags.rounds < 1:
        raise ValueError(f"rounds ({flags.rounds}) must be at least 1")
    names = list(PARTS) if flags.part == "all" else [flags.part]
    sections = []
    for name in names:
        section = PARTS[name](flags)
        sections.append(section)
        sys.stdout.write(f"{section.markdown}\n" if flags.markdown else f"\n{name}\n{section.markdown}")
        sys.stdout.flush()
        measure.write(sections, flags.out)
    facts = measure.facts()
    sys.stdout.write(
        f"\nCommit {facts['commit'][:10]}, {facts['machine']}, {facts['instructions']}, torch {facts['torch']}.\n"
    )
    sys.stdout.write(f"All figures: {flags.out}\n")


def _bank(flags: argparse.Namespace, split: Split) -> ImageBank:
    from lgm_dist.data import open_bank
    from lgm_dist.data.prepare import ensure_manifest

    return open_bank(ensure_manifest(flags.data, flags.data_root, ""), split)


def _train(flags: argparse.Namespace) -> Section:
    from lgm_dist.bench import training

    return training.train(flags.data, flags.data_root, max(flags.rounds // 2, 1))


def _scaling(flags: argparse.Namespace) -> Section:
    from lgm_dist.bench import training

    return training.scaling(flags.rounds)


PARTS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "data": lambda flags: loading.data(_bank(flags, "train"), 4 * flags.rounds + 1),
    "step": lambda flags: network.step(flags.rounds),
    "floor": lambda flags: network.floor(4 * flags.rounds + 1),
    "memory": lambda _: network.memory(),
    "growth": lambda flags: network.growth(flags.rounds),
    "evaluation": lambda flags: loading.evaluation(_bank(flags, "test"), max(flags.rounds // 2, 1)),
    "scaling": _scaling,
    "train": _train,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("part", choices=[*PARTS, "all"], help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in turn (default: %(default)s)")
    parser.add_argument(
        "--data", default="glyphs", help="data set of `data`, `evaluation` and `train` (default: %(default)s)"
    )
    parser.add_argument("--data-root", default="data", help="its folder (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="tables alone, as the README holds them")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="JSON file (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(status_of(main))
