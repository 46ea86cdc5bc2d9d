"""Libraries that only a part of the package uses, which an install without extras lacks. Standard library only."""

from __future__ import annotations

from importlib.util import find_spec

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "wandb_workspaces": "wandb-workspaces"}
"""What a module is installed as, if that is another name."""


def installed(module: str) -> bool:
    """Return True if the module can be imported."""
    return find_spec(module) is not None


def need(module: str, extra: str, purpose: str) -> None:
    """Raise ValueError if a module is not installed: `need("matplotlib", "report", "to draw pictures")`.

    `extra` is the extra of lgm-dist that installs it.
    """
    if not installed(module):
        name = _DISTRIBUTIONS.get(module, module)
        raise ValueError(f"{name} is needed {purpose}; install lgm-dist[{extra}]")
