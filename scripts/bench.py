"""The benchmark: `scripts/bench.py all --markdown` prints the README's tables.

Its parts step, floor, memory, growth and gpu (not in `all`) need torch and numpy alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from lgm_dist.bench import loading, measure, network
from lgm_dist.bench.measure import Section
from lgm_dist.config import Split
from lgm_dist.console import run_command
from lgm_dist.data.bank import ImageBank


def main(argv: list[str]) -> None:
    """Measures what is asked for, prints its tables, writes all figures."""
    flags = _parser().parse_args(argv)
    if flags.rounds < 1:
        raise ValueError(f"rounds ({flags.rounds}) must be at least 1")
    if flags.model and flags.part != "scaling":
        raise ValueError(f"model goes with scaling, not with {flags.part}; give bench.py scaling --model")
    names = [name for name in PARTS if name != "gpu"] if flags.part == "all" else [flags.part]
    sections: list[Section] = []
    for name in names:
        for section in PARTS[name](flags):
            sections.append(section)
            sys.stdout.write(f"{section.markdown}\n" if flags.markdown else f"\n{section.name}\n{section.markdown}")
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


def _growth(flags: argparse.Namespace) -> Iterator[Section]:
    section = network.growth(flags.rounds)
    yield section
    if importlib.util.find_spec("matplotlib"):
        from lgm_dist.bench.pictures import growth

        growth(section.values, flags.out.with_name("growth.png"))


def _scaling(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import scaling

    if not flags.model:
        yield scaling.scaling(flags.rounds)
    if flags.model or flags.part == "all":
        yield scaling.model()


def _train(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import training

    yield training.train(flags.data, flags.data_root, max(flags.rounds // 2, 1))


def _gpu(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import gpu

    if not torch.cuda.is_available():
        raise ValueError(
            "gpu: this machine has no CUDA device that torch can use; run it where torch.cuda.is_available()"
        )
    yield gpu.gpu(gpu.random_bank(), flags.rounds)


Part = Callable[[argparse.Namespace], Iterable[Section]]
PARTS: dict[str, Part] = {
    "data": lambda flags: [loading.data(_bank(flags, "train"), 4 * flags.rounds + 1, against=flags.against)],
    "step": lambda flags: [network.step(flags.rounds)],
    "floor": lambda flags: [network.floor(4 * flags.rounds + 1)],
    "memory": lambda _: [network.memory()],
    "growth": _growth,
    "evaluation": lambda flags: [loading.evaluation(_bank(flags, "test"), max(flags.rounds // 2, 1))],
    "scaling": _scaling,
    "train": _train,
    "gpu": _gpu,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("part", choices=[*PARTS, "all"], help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in turn (default: %(default)s)")
    parser.add_argument(
        "--data", default="glyphs", help="data set of `data`, `evaluation` and `train` (default: %(default)s)"
    )
    parser.add_argument("--data-root", default="data", help="its folder (default: %(default)s)")
    parser.add_argument(
        "--against",
        nargs="*",
        choices=list(loading.PEERS),
        help="data: peers to time in turn (default: those installed)",
    )
    parser.add_argument("--model", action="store_true", help="scaling: 8 to 1,024 workers on paper")
    parser.add_argument("--markdown", action="store_true", help="tables alone, as the README holds them")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="JSON file (default: %(default)s)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through each `finally`, which ends what was started
    sys.exit(run_command(main))
