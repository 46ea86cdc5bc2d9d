"""What imports what: torch with its torchvision, the layers of the design, and what runs with torch and numpy alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    **dict.fromkeys(("checks", "errors", "extras", "philox", "registry"), 0),
    "settings": 1,
    "config": 2,
    **dict.fromkeys(("console", "plugins"), 3),
    **dict.fromkeys(("data", "model"), 4),
    "training": 5,
    "runs": 6,
    "adapt": 7,
    "report": 8,
    "tracking": 9,
    "cluster": 10,
    "sweeps": 11,
    "bench": 12,
    "cli": 13,
    **dict.fromkeys(("__main__", "scripts", "tune"), 14),
}
"""The direction of imports: a part imports from itself and from lower layers."""
OWNERS = {
    "ray": (
        *("cluster/trainer", "cluster/connection", "cluster/ray_internals", "cluster/rendezvous", "cluster/worker"),
        *("cluster/jobs", "sweeps"),
    ),
    "optuna": ("sweeps",),
    "wandb": ("tracking",),
    "wandb_workspaces": ("tracking/dashboard",),
    "webdataset": ("data/shards",),
    "safetensors": ("adapt/learner_file",),
    "tyro": ("cli",),
    "torchvision": ("data/sources/cifar_archive", "model/backbones/torchvision_models"),
    "triton": ("model/kernels/triton_kernels",),
}
"""The modules or folders of the package that may import a library; scripts may import any."""
FILES = [path for folder in ("lgm_dist", "scripts", "tune") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_torch_and_torchvision_fit_together() -> None:
    """A torchvision built for another torch fails to import, or lacks its compiled operators."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])  # IoU of the first two: 81 / 100
    assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.9).tolist() == [1, 0, 2]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it; `from lgm_dist import x` counts as lgm_dist.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, which this test does not follow"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "lgm_dist" else (module,)


def part_of(path: Path) -> str:
    """lgm_dist/data/bank.py -> data, lgm_dist/config.py -> config, scripts/train.py -> scripts."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return rest[0] if top == "lgm_dist" else top


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        return  # `test_the_package_itself_loads_no_library`
    assert own in LAYERS, f"give {own} a layer"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "lgm_dist" and len(parts) > 1:
            assert parts[1] == own or LAYERS[parts[1]] < LAYERS[own], f"{own} imports {name}"
        else:
            assert parts[0] not in ("scripts", "tune") or own == parts[0], f"{own} imports {name}"


def owns(module: str, library: str) -> bool:
    return any(module == owner or module.startswith(f"{owner}/") for owner in OWNERS[library])


@pytest.mark.parametrize("path", [p for p in FILES if "lgm_dist" in p.relative_to(ROOT).parts], ids=lambda p: p.name)
def test_libraries_have_one_owner(path: Path) -> None:
    module = path.relative_to(ROOT / "lgm_dist").with_suffix("").as_posix()
    used = {name.split(".")[0] for name in imported(path)}
    assert [library for library in used & OWNERS.keys() if not owns(module, library)] == []
    outside = used - set(sys.stdlib_module_names) - {"lgm_dist"}
    standard_library = {
        "checks",
        "settings",
        "config",
        "errors",
        "extras",
        "console",
        "plugins",
        "runs/files",
        "runs/metrics",
        "runs/stop",
    }
    if part_of(path) == "model":
        assert outside <= {"torch", "numpy", "triton", "torchvision"}
    elif part_of(path) == "training":
        assert outside <= {"torch", "numpy"}
    elif module in standard_library:
        assert not outside


def test_every_owner_imports_its_library() -> None:
    """Else the rules above watch over nothing."""
    for library, owners in OWNERS.items():
        for owner in owners:
            path = ROOT / "lgm_dist" / owner
            files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
            names = {name.split(".")[0] for file in files for name in imported(file)}
            assert library in names, (library, owner)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_network_and_its_benchmark_need_torch_and_numpy_alone() -> None:
    blocked = ("ray", "wandb", "webdataset", "pyarrow", "matplotlib", "tyro", "tqdm", "PIL", "torchvision", "triton")
    modules = "lgm_dist.model, lgm_dist.data.bank, lgm_dist.data.episodes, lgm_dist.training.loop"
    # One by one, in processes of their own, would tell no more: an import that fails is named in the error.
    done = python(f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {modules}")
    assert done.returncode == 0, done.stderr
    assert python("import sys\nsys.modules['webdataset'] = None\nimport lgm_dist.data.shards").returncode == 1


def test_config_and_command_line_helpers_load_no_library() -> None:
    code = (
        "import sys, lgm_dist.config, lgm_dist.console\nprint(*{'torch', 'numpy', 'ray', 'tyro'} & sys.modules.keys())"
    )
    assert python(code).stdout == "\n"


HEAVY = ("torch", "numpy", "ray", "wandb", "tyro", "matplotlib", "tqdm")


def test_the_package_itself_loads_no_library() -> None:
    assert python(f"import sys, lgm_dist\nprint(*set({HEAVY}) & sys.modules.keys())").stdout == "\n"


def test_the_package_offers_its_public_names() -> None:
    import lgm_dist
    from lgm_dist import config, data, model
    from lgm_dist.adapt import classifier, learner
    from lgm_dist.cluster import fit
    from lgm_dist.training import evaluation

    assert fit.fit is lgm_dist.fit
    assert config.Config is lgm_dist.Config
    assert data.open_bank is lgm_dist.open_bank
    assert data.sample_episodes is lgm_dist.sample_episodes
    assert model.LGMNet is lgm_dist.LGMNet
    assert classifier.Classifier is lgm_dist.Classifier
    assert learner.load is lgm_dist.load
    assert learner.learners is lgm_dist.learners
    assert learner.Learner is lgm_dist.Learner
    assert evaluation.evaluate is lgm_dist.evaluate
    names = (
        "Classifier",
        "Config",
        "LGMNet",
        "Learner",
        "__version__",
        "evaluate",
        "fit",
        "learners",
        "load",
        "open_bank",
    )
    assert dir(lgm_dist) == [*names, "sample_episodes"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", lgm_dist.__version__)
    with pytest.raises(AttributeError, match="module 'lgm_dist' has no attribute 'fitt'"):
        _ = lgm_dist.fitt
