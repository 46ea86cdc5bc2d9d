"""Runs of several stages: steps numbered through, an optimizer for each stage, exact resume across the end of a stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.stages import bits, history, train

from lgm_dist.config import Config
from lgm_dist.runs import checkpoint
from lgm_dist.runs.folder import read_result
from lgm_dist.runs.job import make_job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.training import tasks
from lgm_dist.training.episodes_task import Episodes
from lgm_dist.training.tasks import Task, make_stages, register_task, total_steps
from lgm_dist.training.worker import Worker


@pytest.fixture(autouse=True)
def _second_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task `more`: five steps of the same episodes with an optimizer of another kind."""
    tasks.TASKS.get("episodes")  # imports the built-in tasks
    monkeypatch.setattr(tasks.TASKS, "_known", dict(tasks.TASKS._known))

    @register_task("more")
    class More(Episodes):
        steps = 5  # type: ignore[assignment]
        eval_every = 3  # type: ignore[assignment]

        def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
            optimizer.param_groups[0]["lr"] = 1e-4 * (step + 1)

    assert issubclass(More, Task)


@pytest.fixture
def config(small: Config, tmp_path: Path) -> Config:
    return small.replace(
        stages=("episodes", "more"), steps_per_epoch=4, eval_every=2, storage=str(tmp_path), name="run"
    )


def test_steps_are_numbered_through(config: Config) -> None:
    assert [(s.name, s.first, s.last) for s in make_stages(config, {}, Worker())] == [
        ("episodes", 0, 4),
        ("more", 4, 9),
    ]
    assert total_steps(config) == 9
    run = train(config)
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["step"] for row in rows if "val/accuracy" in row] == [2, 4, 7, 9], "every 2, every 3, and at the ends"
    assert [row["optim/lr"] for row in rows[4:]] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 5e-4])
    assert (read_result(run)["train/steps"], read_result(run)["train/episodes"]) == (9, 36)


@pytest.mark.parametrize("stop_before", [2, 6, 8, 11])
def test_a_run_that_is_stopped_anywhere_and_resumed_ends_with_the_same_bits(
    config: Config, stop_before: int, tmp_path: Path
) -> None:
    """Heartbeats come before each step and evaluation: 2 is in the first stage, 6 at its end, 8 and 11 in the second."""
    whole = train(config)
    known, rows = bits(whole), history(whole)
    shutil.move(whole, tmp_path / "whole")
    run = train(config, stop_before)
    assert 0 < len(read_metrics(run)) < 9
    assert train(config) == run
    assert history(run) == rows
    assert {name: files for name, files in bits(run).items() if name in known} == {
        name: files for name, files in known.items() if name in bits(run)
    }
    assert checkpoint.newest(run).name == "step-00000009"
    assert bits(run)["step-00000009"] == known["step-00000009"]


def test_another_list_of_stages_is_another_run(config: Config) -> None:
    train(config, stop_before=2)
    with pytest.raises(ValueError, match=r"was started with stages \('episodes', 'more'\), not \('episodes',\)"):
        make_job(config.replace(stages=("episodes",)))
