"""Python modules of a user that register parts: data sets, augmentations, backbones, generators, heads and tasks."""

from __future__ import annotations

import importlib

from lgm_dist.config import Config


def load_plugins(config: Config) -> None:
    """Import the modules of `config.run.plugins`. Raises ValueError for one that cannot be imported."""
    for name in config.run.plugins:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"plugins ({name!r}) must name Python modules that can be imported ({error}); check PYTHONPATH"
            ) from None
