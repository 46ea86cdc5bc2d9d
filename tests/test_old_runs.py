"""Run folders written by commit 82eed57 (tests/fixtures/runs-82eed57) still load, evaluate as recorded, and train on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lgm_dist.config import Split
from lgm_dist.data import open_bank
from lgm_dist.data.prepare import ensure_manifest
from lgm_dist.model import build_model
from lgm_dist.runs import checkpoint
from lgm_dist.runs.folder import read_config
from lgm_dist.training.evaluation import evaluate
from lgm_dist.training.schedule import make_optimizer

RUNS = Path(__file__).parent / "fixtures/runs-82eed57"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ensure_manifest("glyphs", str(tmp_path_factory.mktemp("data")), "")


def accuracies(run: Path, manifest: str, split: Split) -> np.ndarray:
    """Accuracy of each of the split's 20 episodes, by the newest checkpoint."""
    model, config, _ = checkpoint.load_model(checkpoint.newest(run))
    found = evaluate(model, open_bank(manifest, split), config, split, 20)
    return found.accuracies[next(iter(found.scores))]


@pytest.mark.parametrize(("name", "queries"), [("standard", 75), ("paper", 1)])
def test_a_checkpoint_decides_as_recorded(name: str, queries: int, manifest: str) -> None:
    """Rounding on another machine may change two close decisions."""
    kept = np.load(checkpoint.newest(RUNS / name) / "val.npy")
    assert np.abs(accuracies(RUNS / name, manifest, "val") - kept).sum() * queries < 2.5


def test_the_test_accuracy_is_that_of_the_result(manifest: str) -> None:
    """The newest checkpoint of standard is its best; 20 episodes of 75 queries."""
    result = json.loads((RUNS / "standard/result.json").read_text())
    assert result["test/accuracy"] == pytest.approx(0.214)
    assert accuracies(RUNS / "standard", manifest, "test").mean() == pytest.approx(0.214, abs=2.5 / 1500)


@pytest.mark.parametrize("name", ["standard", "paper"])
def test_a_run_can_be_resumed(name: str, tmp_path: Path) -> None:
    """Weights, averages and moments of Adam are those of the file, in its order of parameters; without kernels too."""
    run = Path(shutil.copytree(RUNS / name, tmp_path / name))
    config = read_config(run)
    model = build_model(replace(config.model, kernels="reference"), seed=9)
    optimizer = make_optimizer(model, config)
    assert checkpoint.restore(run, model, lambda _: optimizer)[0].step == 4
    state = torch.load(checkpoint.newest(run) / "state.pt", weights_only=True)
    for ours, theirs in zip(model.state_dict().values(), state["model"].values(), strict=True):
        assert torch.equal(ours, theirs)
    for i, parameter in enumerate(model.parameters()):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], state["optimizer"]["state"][i]["exp_avg"])
