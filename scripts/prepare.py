"""Prepare a data set: WebDataset shards and their manifest NAME.json, from CIFAR-100, class folders or built-in glyphs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tyro

from lgm_dist.config import SPLITS
from lgm_dist.console import run_command, table
from lgm_dist.data.source import DataSource

app = tyro.extras.SubcommandApp()


@app.command(name="fc100")
def fc100(out: Path, source: str = "") -> None:
    """FC100: CIFAR-100 split by superclass (TADAM, NeurIPS 2018).

    Args:
        out: Folder of the shards.
        source: cifar-100-python.tar.gz, its unpacked folder, or a folder of Hugging Face parquet files; without it the
            archive is downloaded.
    """
    from lgm_dist.data.sources.fc100 import fc100_source

    _prepare(fc100_source(source), out)


@app.command(name="folder")
def folder(source: Path, out: Path, name: str, size: int | None = None) -> None:
    """Any data set of class folders.

    Args:
        source: Folder with train/, val/ and test/, each with a folder of images per class.
        out: Folder of the shards; data/NAME makes the data set known by its name.
        name: Name of the data set.
        size: Resize every image to size x size pixels.
    """
    from lgm_dist.data.sources.folder import folder_source

    _prepare(folder_source(str(source), name, size), out)


@app.command(name="glyphs")
def glyphs(out: Path) -> None:
    """The built-in data set of letters, made offline.

    Args:
        out: Folder of the shards.
    """
    from lgm_dist.data.sources.glyphs import glyphs_source

    _prepare(glyphs_source(), out)


def _prepare(source: DataSource, out: Path) -> None:
    from lgm_dist.data.shards import read_manifest, write_shards

    start = time.perf_counter()
    manifest = read_manifest(str(write_shards(source, out)))
    seconds = time.perf_counter() - start
    entries = [(split, manifest.splits[split]) for split in SPLITS]
    rows = [(split, str(len(e.classes)), f"{e.images:,}", str(len(e.shards))) for split, e in entries]
    height, width, _ = manifest.shape
    sys.stdout.write(
        table(("split", "classes", "images", "shards"), rows)
        + f"images    {width} x {height}, mean {_numbers(manifest.mean)}, std {_numbers(manifest.std)} (train, 0 to 255)\n"
        + f"manifest  {manifest.location}  ({seconds:.1f} s)\n"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def main(argv: list[str]) -> None:
    """Runs the subcommand."""
    app.cli(description=__doc__, prog="prepare.py", args=argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
