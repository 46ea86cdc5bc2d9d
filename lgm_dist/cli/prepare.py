"""`lgm-dist prepare SOURCE`: writes a data set as WebDataset shards with their manifest NAME.json."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.conf import arg

from lgm_dist.config import SPLITS
from lgm_dist.console import table
from lgm_dist.data.sources import SOURCES, Source, options_of

Out = Annotated[Path, arg(help="Folder of the shards. A data set in data/NAME is found by its name.")]


def main(argv: list[str]) -> None:
    """Parse the arguments and prepare the data set."""
    app = tyro.extras.SubcommandApp()
    for name in SOURCES.names():
        app.command(name=name)(_command(name, SOURCES.get(name)))
    app.cli(
        description="Write a data set as WebDataset shards with their manifest NAME.json.",
        prog="lgm-dist prepare",
        args=argv,
    )


def _command(name: str, source: Source) -> Callable[..., None]:
    """A function with the options of a source and `out`, of which tyro makes a subcommand."""

    def command(out: Path, **options: Any) -> None:
        write(name, out, options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in options_of(source).values()]
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*parameters, inspect.Parameter("out", keyword, annotation=Out)]
    )
    hints = get_type_hints(source, include_extras=True)
    command.__annotations__ = {option: hints.get(option, str) for option in options_of(source)} | {"out": Out}
    command.__doc__ = source.__doc__
    return command


def write(name: str, out: Path, options: dict[str, Any]) -> None:
    """Prepare a data set and print what it holds."""
    from lgm_dist.data.manifest import read_manifest
    from lgm_dist.data.prepare import prepare

    start = time.perf_counter()
    manifest = read_manifest(str(prepare(name, out, **options)))
    seconds = time.perf_counter() - start
    entries = [(split, manifest.splits[split]) for split in SPLITS]
    rows = [(split, str(len(e.classes)), f"{e.images:,}", str(len(e.shards))) for split, e in entries]
    height, width, channels = manifest.shape
    sys.stdout.write(
        table(("split", "classes", "images", "shards"), rows)
        + f"images    {width} x {height}, {'grey' if channels == 1 else 'RGB'}, mean {_numbers(manifest.mean)}, "
        + f"std {_numbers(manifest.std)} (train, 0 to 255)\n"
        + f"manifest  {manifest.location}  ({seconds:.1f} s)\n"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
