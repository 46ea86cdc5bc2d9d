"""Data sets that can be prepared, one file each. `register_source` adds one from outside the package.

    @register_source("flags")
    def flags(source: str, size: int = 32) -> DataSource:
        \"\"\"Flags of all countries.

        Args:
            source: Folder of the flags.
            size: Height and width of the images.
        \"\"\"
        return DataSource("flags", (size, size, 3), {"train": …, "val": …, "test": …})

The parameters of the function are the options of `lgm-dist prepare flags`; `--source` of the training is passed on as `source`.
A source without required parameters can be prepared from its name alone, as soon as a training asks for it.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping

from lgm_dist.data.source import DataSource
from lgm_dist.registry import Registry

Source = Callable[..., DataSource]
"""A function that returns a data set."""

SOURCES: Registry[Source] = Registry("source", "data", "lgm_dist.data.sources")
register_source = SOURCES.register

GENERIC = "folder"
"""The source that prepares a data set of any name."""


def options_of(source: Source) -> Mapping[str, inspect.Parameter]:
    """The options of `lgm-dist prepare` for this source, by name."""
    return inspect.signature(source).parameters


def needs_nothing(source: Source) -> bool:
    """Return True if the data set can be prepared from its name alone."""
    return all(option.default is not option.empty for option in options_of(source).values())


def prepare_command(name: str, out: str, shape: tuple[int, int, int] | None = None) -> str:
    """The shell command that prepares the data set `name`, of images of `shape` if that is known, in the folder `out`."""
    kind = name if SOURCES.find(name) else GENERIC
    size = str(shape[0]) if shape and shape[0] == shape[1] else ""
    values = {"source": "PATH", "name": shlex.quote(name), "size": size}
    words = ["lgm-dist prepare", kind]
    for option, parameter in options_of(SOURCES.get(kind)).items():
        required = option.upper() if parameter.default is parameter.empty else ""
        if value := values.get(option, required):
            words += [f"--{option.replace('_', '-')}", value]
    return " ".join([*words, "--out", out])
