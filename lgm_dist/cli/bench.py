"""Measures speed and memory on this machine: `lgm-dist bench all --markdown` prints the tables of docs/performance.md.

The parts step, floor, pretraining, memory, growth and gpu need torch and numpy alone; `all` is every part but gpu.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lgm_dist.extras import installed

if TYPE_CHECKING:
    from lgm_dist.bench.measure import Section
    from lgm_dist.config import Split
    from lgm_dist.data.bank import ImageBank


def main(argv: list[str]) -> None:
    """Measure the parts that are asked for, print their tables, and write all figures."""
    flags = make_parser().parse_args(argv)
    if flags.rounds < 1:
        raise ValueError(f"rounds ({flags.rounds}) must be at least 1")
    if flags.model and flags.part != "scaling":
        raise ValueError(f"model goes with scaling, not with {flags.part}; give bench scaling --model")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs each `finally`, which ends the processes of a part
    from lgm_dist.bench import measure  # after parsing: --help needs no torch

    sections: list[Section] = []
    for name in [name for name in PARTS if name != "gpu"] if flags.part == "all" else [flags.part]:
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


def _data(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import loading

    peers = loading.check_peers(flags.against)  # before a data set is prepared
    yield loading.data(_bank(flags, "train"), 4 * flags.rounds + 1, against=peers)


def _stream(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import streaming
    from lgm_dist.data.manifest import read_manifest
    from lgm_dist.data.prepare import ensure_manifest
    from lgm_dist.data.streamed import StreamedSplit

    split = StreamedSplit(read_manifest(ensure_manifest(flags.data, flags.data_root, "")))
    yield streaming.stream(_bank(flags, "train"), split, flags.rounds)


def _step(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import network

    yield network.step(flags.rounds)


def _floor(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import network

    yield network.floor(4 * flags.rounds + 1)


def _pretraining(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench.pretraining import pretraining

    yield pretraining(2 * flags.rounds + 1)


def _memory(_: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import network

    yield network.memory()


def _growth(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import network

    section = network.growth(flags.rounds)
    yield section
    if installed("matplotlib"):
        from lgm_dist.bench.pictures import growth

        growth(section.values, flags.out.with_name("growth.png"))


def _evaluation(flags: argparse.Namespace) -> Iterator[Section]:
    from lgm_dist.bench import loading

    yield loading.evaluation(_bank(flags, "test"), max(flags.rounds // 2, 1))


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
    import torch

    from lgm_dist.bench import gpu

    if not torch.cuda.is_available():
        raise ValueError(
            "gpu: this machine has no CUDA device that torch can use; run it where torch.cuda.is_available()"
        )
    yield gpu.gpu(gpu.random_bank(), flags.rounds)


Part = Callable[[argparse.Namespace], Iterable["Section"]]
PARTS: dict[str, Part] = {
    "data": _data,
    "stream": _stream,
    "step": _step,
    "floor": _floor,
    "pretraining": _pretraining,
    "memory": _memory,
    "growth": _growth,
    "evaluation": _evaluation,
    "scaling": _scaling,
    "train": _train,
    "gpu": _gpu,
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("part", choices=[*PARTS, "all"], help="what to measure")
    add("--rounds", type=int, default=5, help="rounds in which contenders take turns (default: %(default)s)")
    add("--data", default="glyphs", help="data set of data, stream, evaluation and train (default: %(default)s)")
    add("--data-root", default="data", help="folder of the prepared data sets (default: %(default)s)")
    add("--against", nargs="*", metavar="PEER", help="data: libraries to compare with (default: those installed)")
    add("--model", action="store_true", help="scaling: extrapolate to 8 to 1,024 workers")
    add("--markdown", action="store_true", help="print the tables alone, as the documentation holds them")
    add("--out", type=Path, default=Path("runs/bench.json"), help="JSON file of all figures (default: %(default)s)")
    return parser
