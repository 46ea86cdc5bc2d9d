"""Private names of Ray are in lgm_dist/cluster/ray_internals.py and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lgm_dist.cluster.connection import prepare_for_ray

ROOT = Path(__file__).parents[1]
INTERNALS = ROOT / "lgm_dist/cluster/ray_internals.py"
FILES = [path for folder in ("lgm_dist", "scripts", "tune") for path in sorted((ROOT / folder).rglob("*.py"))]


def private_names(source: str) -> Iterator[str]:
    """The private names of Ray in a module: in its imports, and attributes like `ray._private`."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            parts = name.split(".")
            private = any(part.startswith("_") and not part.endswith("__") for part in parts)
            if parts[0] == "ray" and (private or parts[1:3] == ["train", "v2"]):
                yield name


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from ray.train.torch import TorchTrainer", []),
        ("from ray._private import worker", ["ray._private.worker"]),
        ("import ray.train.v2.api", ["ray.train.v2.api"]),
        ("import ray\nray.init(ray._raylet.KEY)", ["ray._raylet.KEY", "ray._raylet"]),
        ("import ray\nray.__file__", []),
        ("from raylib import _x", []),
    ],
)
def test_private_names_are_recognised(source: str, names: list[str]) -> None:
    assert list(private_names(source)) == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_private_names(path: Path) -> None:
    assert bool(list(private_names(path.read_text()))) == (path == INTERNALS)


def test_the_scaling_policy_is_left_alone_if_ray_has_renamed_its_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_for_ray()  # before Ray is imported
    from lgm_dist.cluster import ray_internals

    assert ray_internals._hooks_exist()
    monkeypatch.delattr(ray_internals.FixedScalingPolicy.__mro__[1], "_maybe_send_resource_request")
    assert not ray_internals._hooks_exist()
