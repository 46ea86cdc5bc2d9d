"""Fuzzes what reads files of others: manifests, metadata of checkpoints, shards. `python tests/fuzz.py all --seconds 60`.

A reader may refuse its input with ValueError only. Any other exception is printed with the input and ends the search. With
--atheris (`uv run --group fuzz`) the search is guided by coverage, else each input is a valid file with some bytes changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lgm_dist.config import SPLITS, Config
from lgm_dist.console import run_command
from lgm_dist.data import manifest as manifests
from lgm_dist.data import png, shards
from lgm_dist.data.manifest import ClassEntry, Manifest, Shard, SplitEntry, manifest_bytes, parse_manifest
from lgm_dist.data.png import encode
from lgm_dist.data.shards import read_images
from lgm_dist.runs import checkpoint_files
from lgm_dist.runs.checkpoint_files import DamagedCheckpoint, Meta, TrainState, config_of, read_meta

Target = Callable[[bytes, Path], None]
"""Reads an input, with a scratch folder for its files."""
SHAPE = (2, 2, 3)


def manifest(content: bytes, _: Path) -> None:
    """NAME.json of a data set."""
    parse_manifest(content, "x/data.json")


def checkpoint(content: bytes, folder: Path) -> None:
    """state.json of a checkpoint, with the right digest if it is a record."""
    (folder / "state.json").write_bytes(_with_digest(content))
    with contextlib.suppress(DamagedCheckpoint):
        config_of(folder, read_meta(folder))


def shard(content: bytes, folder: Path) -> None:
    """A shard, with the right digest."""
    (folder / "x.tar").write_bytes(content)
    entry = SplitEntry((ClassEntry("a", "", 1),), (Shard("x.tar", hashlib.sha256(content).hexdigest(), 1),))
    found = Manifest("x", SHAPE, (0.0,) * 3, (1.0,) * 3, dict.fromkeys(SPLITS, entry), str(folder / "x.json"), "")
    for _ in read_images(found, "train"):
        pass


def _manifest() -> bytes:
    entries = {
        split: SplitEntry((ClassEntry(f"{split}-a", "g", 2),), (Shard(f"x-{split}-000000.tar", "0" * 64, 2),))
        for split in SPLITS
    }
    return manifest_bytes("x", SHAPE, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), entries)


def _checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Meta(TrainState(1), Config().to_dict(), {"state.pt": "0" * 64}, "").write(Path(folder))
        return (Path(folder) / "state.json").read_bytes()


def _with_digest(content: bytes) -> bytes:
    try:
        record = json.loads(content)
        del record["digest"]
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        return json.dumps(record | {"digest": digest}).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return content


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


SEEDS: dict[Target, Callable[[], bytes]] = {
    manifest: _manifest,
    checkpoint: _checkpoint,
    shard: lambda: _tar({"a.png": encode(np.zeros(SHAPE, np.uint8)), "a.cls": b"0"}),
}
TARGETS = {target.__name__: target for target in SEEDS}


def mutate(seed: bytes, draw: random.Random) -> bytes:
    """`seed` with up to eight pieces overwritten, cut out, doubled or inserted."""
    content = bytearray(seed)
    for _ in range(draw.randint(1, 8)):
        place, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 1, 2, 4, 16, 100))
        pieces = (draw.randbytes(length), bytes(length), b"\xff" * length, content[place : place + length] * 2, b"")
        content[place : place + draw.choice((0, length))] = draw.choice(pieces)
    return bytes(content)


def search(target: Target, seconds: float, seed: int, folder: Path) -> int:
    """Give changed seeds to `target` for some seconds; return how many.

    Raises the first exception that is not a ValueError, with the input in its notes.
    """
    draw, end, count = random.Random(seed), time.monotonic() + seconds, 0
    origin = SEEDS[target]()
    while time.monotonic() < end:
        content, count = mutate(origin, draw), count + 1
        try:
            target(content, folder)
        except ValueError:
            continue
        except BaseException as error:
            error.add_note(f"{target.__name__} was given {content!r}")
            raise
    return count


def search_with_atheris(target: Target, seconds: float, corpus: Path, folder: Path) -> None:
    """As `search`, guided by coverage of the readers and tarfile; ends this process."""
    import atheris

    def refuse_or_read(content: bytes) -> None:
        with contextlib.suppress(ValueError):
            target(content, folder)

    for module in (manifests, checkpoint_files, shards, png, tarfile):
        classes: list[Any] = [
            c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__
        ]
        for owner in (module, *classes):
            for _, function in inspect.getmembers(owner, inspect.isfunction):
                if function.__module__ == module.__name__:
                    atheris.instrument_func(function)
    kept = corpus / target.__name__
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "seed").write_bytes(SEEDS[target]())
    limits = [f"-max_total_time={seconds:.0f}", "-max_len=8192", "-rss_limit_mb=4096", "-timeout=10"]
    limits.append(f"-artifact_prefix={kept}/")
    atheris.Setup([sys.argv[0], *limits, str(kept)], refuse_or_read)
    atheris.Fuzz()


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the program."""
    parser = argparse.ArgumentParser(
        prog="fuzz.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all"], help="what to fuzz (with --atheris, one at a time)")
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each target (60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes, without --atheris (0)")
    parser.add_argument("--atheris", action="store_true", help="guide the search by coverage")
    parser.add_argument(
        "--corpus", type=Path, help="folder in which atheris keeps inputs that reach new code (default: none)"
    )
    return parser


def main(argv: list[str]) -> None:
    """Fuzz one target, or all in turn."""
    flags = make_parser().parse_args(argv)
    if flags.atheris and flags.target == "all":
        raise ValueError("target (all) must be a single target with --atheris, whose search ends the process")
    with tempfile.TemporaryDirectory() as scratch:
        for name in TARGETS if flags.target == "all" else (flags.target,):
            if flags.atheris:
                corpus = flags.corpus or Path(scratch) / "corpus"
                search_with_atheris(TARGETS[name], flags.seconds, corpus, Path(scratch))
            count = search(TARGETS[name], flags.seconds, flags.seed, Path(scratch))
            sys.stdout.write(f"{name}: {count:,} inputs, each read or refused\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
