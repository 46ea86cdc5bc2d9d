"""Libraries that only a part of the package uses, which an install without extras lacks. Standard library only."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "matplotlib": "report",
    "optuna": "sweep",
    "pyarrow": "data",
    "ray": "ray",
    "sklearn": "report",
    "threadpoolctl": "report",
    "torchvision": "torchvision",
    "wandb": "wandb",
    "wandb_workspaces": "wandb",
}
"""The extra of lgm-dist that installs a module."""
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "wandb_workspaces": "wandb-workspaces"}
"""What a module is installed as, if that is another name."""


def installed(module: str) -> bool:
    """Return True if the module can be imported."""
    return find_spec(module) is not None


def need(module: str, extra: str, purpose: str) -> None:
    """Raise ValueError if a module is not installed: `need("matplotlib", "report", "to draw pictures")`."""
    if not installed(module):
        raise ValueError(_sentence(module, extra, purpose))


def explain(error: ModuleNotFoundError) -> str:
    """What to install for a module that was not found, in one sentence; empty if no extra installs it."""
    module = (error.name or "").split(".")[0]
    return _sentence(module, EXTRAS[module], "for this") if module in EXTRAS else ""


def _sentence(module: str, extra: str, purpose: str) -> str:
    return f"{_DISTRIBUTIONS.get(module, module)} is needed {purpose}; install lgm-dist[{extra}]"
