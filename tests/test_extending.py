"""The examples of docs/extending.md, run from outside the package: one part of each kind, and a step that uses all of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lgm_dist
from lgm_dist.config import Config, ModelConfig
from lgm_dist.runs.metrics import read_metrics

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- code: ([\w ]+);[^>]*-->\n```python\n(.*?)```", PAGE, re.DOTALL))
PARTS = ("data set", "backbone", "generator", "head", "augmentation", "Task")


def lines_of(example: str) -> list[str]:
    """Lines of code, without imports and empty lines."""
    return [line for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))]


@pytest.mark.parametrize("part", PARTS)
def test_an_example_has_20_lines_at_most(part: str) -> None:
    assert len(lines_of(EXAMPLES[part])) <= 20


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The examples as a user's module that can be imported by its name."""
    (tmp_path / "my_parts.py").write_text("\n\n".join(EXAMPLES[part] for part in PARTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_parts"
    sys.modules.pop("my_parts", None)


def test_a_step_is_trained_with_a_part_of_each_kind_from_outside_the_package(module: str, tmp_path: Path) -> None:
    parts = ModelConfig(backbone="conv2", generator="scale", head="euclidean", filters=8, channels=0)
    config = Config.of(
        plugins=(module,),
        data="stripes",
        data_root=str(tmp_path / "data"),
        storage=str(tmp_path / "runs"),
        name="outside",
        stages=("smoothed",),
        augmentations=("flip_shift", "invert"),
        model=parts,
        ways=3,
        query=2,
        eval_query=2,
        epochs=1,
        steps_per_epoch=2,
        meta_batch=4,
        eval_every=2,
        eval_episodes=4,
        test_episodes=4,
        workers=0,
        wandb="disabled",
    )
    run = lgm_dist.fit(config)
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["train/loss"] < 100 for row in rows)
    manifest = json.loads((tmp_path / "data/stripes/stripes.json").read_text())
    assert [entry["name"] for entry in manifest["splits"]["val"]["classes"]] == [f"period-{p}" for p in range(10, 16)]
    model = lgm_dist.load_run(run).model
    assert [type(part).__name__ for part in (model.backbone, model.generator, model.head)] == [
        "Conv2",
        "Scale",
        "Euclidean",
    ]


def test_a_plugin_that_cannot_be_imported_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^plugins \('no_such_module'\) must name Python modules .*; check PYTHONPATH$"
    ):
        lgm_dist.fit(Config.of(plugins=("no_such_module",), workers=0, storage=str(tmp_path)))


def test_a_stage_that_is_not_registered_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^stages \('pre'\) must name registered tasks: episodes"):
        lgm_dist.fit(Config.of(stages=("pre",), data=str(tiny), workers=0, storage=str(tmp_path)))
