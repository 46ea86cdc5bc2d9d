"""The examples of docs/extending.md, run from outside the package: one part of each kind, and a step that uses all of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lgm_dist
from lgm_dist.config import Config
from lgm_dist.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- code: ([\w ]+);[^>]*-->\n```python\n(.*?)```", PAGE, re.DOTALL))
PARTS = ("data set", "backbone", "generator", "head", "augmentation", "Task")


def lines_of(example: str) -> list[str]:
    """Lines of code, without imports and empty lines."""
    return [line for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))]


@pytest.mark.parametrize("part", PARTS)
def test_an_example_has_20_lines_at_most(part: str) -> None:
    assert len(lines_of(EXAMPLES[part])) <= 20


def test_a_step_is_trained_with_a_part_of_each_kind_from_outside_the_package(tmp_path: Path) -> None:
    """In a process of its own, where no other test has registered parts of these names."""
    (tmp_path / "my_parts.py").write_text("\n\n".join(EXAMPLES[part] for part in PARTS))
    flags = {"plugins": "my_parts", "data": "stripes", "stages": "smoothed", "name": "outside", "model.filters": "8"}
    flags |= {"model.backbone": "conv2", "model.generator": "scale", "model.head": "euclidean"}
    flags |= {"ways": "3", "query": "2", "eval-query": "2", "epochs": "1", "steps-per-epoch": "2", "meta-batch": "4"}
    flags |= {"eval-every": "2", "eval-episodes": "4", "test-episodes": "4", "workers": "0", "wandb": "disabled"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "lgm_dist", "train", *words, "--augmentations", "flip_shift", "invert"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "runs" / "outside")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["train/loss"] < 100 for row in rows)
    manifest = json.loads((tmp_path / "data/stripes/stripes.json").read_text())
    assert [entry["name"] for entry in manifest["splits"]["val"]["classes"]] == [f"period-{p}" for p in range(10, 16)]
    state = torch.load(next((tmp_path / "runs/outside/checkpoints").glob("*/state.pt")), weights_only=True)
    assert {"backbone.conv2.weight", "generator.linear.weight"} <= state["model"].keys(), "Conv2's and Scale's"


def test_a_plugin_that_cannot_be_imported_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^plugins \('no_such_module'\) must name Python modules .*; check PYTHONPATH$"
    ):
        lgm_dist.fit(Config.of(plugins=("no_such_module",), workers=0, storage=str(tmp_path)))


def test_a_stage_that_is_not_registered_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^stages \('pre'\) must be one of .*episodes.*; to use your own, import"):
        lgm_dist.fit(Config.of(stages=("pre",), data=str(tiny), workers=0, storage=str(tmp_path)))
