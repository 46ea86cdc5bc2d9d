"""1, 2 and 4 workers in real processes with gloo take the same training steps and evaluate the same network.

Measured with the paper's network on `tiny` (5 ways, 1 shot, 3 queries, meta-batch 8, 20 steps), 2 and 4 workers against 1:
in float64 at a learning rate of 1e-3 the losses differ by at most 1.6e-14. In float32 at 1e-6 they differ by 2.4e-7, two
units in the last place. In float32 at 1e-3 the first three differ by 3.6e-7 and the worst of twenty by 1e-2: Adam divides
each gradient by its own size, even if that is mostly rounding, so the first steps write the rounding into the weights, after
which ReLU and max-pooling choose differently. The number of workers is not the reason: a single worker with one thread and
with two differs by 5e-7 in the first three steps and by 9e-3 in twenty. So the test in float64 shows that the sums are the
same, and the test in float32 at a small learning rate that they are as precise as float32 allows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worker_processes import run_workers, train

from lgm_dist.config import Config, ModelConfig
from lgm_dist.data import open_bank
from lgm_dist.training.engine import Worker, evaluate
from lgm_dist.training.loop import build_model

STEPS, UNEVEN_STEPS, EVAL_EPISODES = 20, 3, 30
WORLD_SIZES = (1, 2, 4)
SCOPES = {"global": STEPS, "worker": 3, "episode": 3}
"""The steps that are taken in float32, by norm_scope."""


@dataclass(frozen=True)
class Run:
    """The training of one worker."""

    losses: list[float]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one worker saw."""

    float64: Run
    uneven: Run
    """In float64, with a meta-batch of 5 episodes, which 2 and 4 workers cannot divide evenly."""
    float32: dict[str, Run]
    """At a small learning rate, by norm_scope."""
    accuracies: dict[str, list[float]]


def work(worker: Worker, config: Config, weights: Path) -> dict[str, Any]:
    """Everything that the tests compare, so that each number of workers is started once."""
    exact = train(worker, config, torch.float64, STEPS)
    if worker.world_size == 1:
        torch.save(exact[1], weights)
    uneven = train(worker, replace(config, meta_batch=5), torch.float64, UNEVEN_STEPS)
    float32 = {}
    for scope, steps in SCOPES.items():
        slow = replace(config, lr=1e-6, lr_min=0.0, model=replace(config.model, norm_scope=scope))
        float32[scope] = train(worker, slow, torch.float32, steps)
    return {"float64": exact, "uneven": uneven, "float32": float32, "accuracies": accuracies(worker, config, weights)}


def accuracies(worker: Worker, config: Config, weights: Path) -> dict[str, list[float]]:
    """The accuracy of the trained network in every val episode, by protocol and method."""
    model = build_model(config, worker)
    model.load_state_dict(torch.load(weights))
    bank, accuracies_by_method = open_bank(config.data, "val", config.cache), {}
    for protocol, draws in (("standard", 0), ("standard", 3), ("paper", 1)):
        result = evaluate(model, bank, replace(config, protocol=protocol), "val", EVAL_EPISODES, draws, worker)
        for method, values in result.accuracies.items():
            accuracies_by_method[f"{protocol}, {draws} draws, {method}"] = values.tolist()
    return accuracies_by_method


@pytest.fixture(scope="module")
def outcomes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcome]]:
    """What each worker saw, by the number of workers."""
    folder = tmp_path_factory.mktemp("workers")
    small = ModelConfig(filters=8, noise_size=4)
    config = Config(ways=5, shot=1, query=3, eval_query=5, meta_batch=8, data=str(tiny), model=small)
    outcomes_by_size = {}
    for size in WORLD_SIZES:
        results = run_workers(size, folder / str(size), work, config, folder / "trained.pt")
        outcomes_by_size[size] = [
            Outcome(
                Run(*r["float64"]),
                Run(*r["uneven"]),
                {scope: Run(*run) for scope, run in r["float32"].items()},
                r["accuracies"],
            )
            for r in results
        ]
    return outcomes_by_size


def furthest(ours: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("workers", WORLD_SIZES[1:])
def test_losses_in_float64(outcomes: dict[int, list[Outcome]], workers: int) -> None:
    alone = outcomes[1][0].float64.losses
    assert len(alone) == STEPS
    assert alone[-1] < alone[0] - 0.05  # the steps learn
    assert furthest(outcomes[workers][0].float64.losses, alone) < 1e-9


@pytest.mark.parametrize("workers", WORLD_SIZES[1:])
def test_weights_in_float64(outcomes: dict[int, list[Outcome]], workers: int) -> None:
    """The bound is 1e-8; a step is up to 1e-3. The largest difference, 2e-11, is in biases before a normalisation: their true
    gradient is 0, and its rounding of about 1e-16 over Adam's epsilon of 7e-8 to 3e-7 makes steps of up to 1e-12."""
    alone, together = (outcomes[size][0].float64.state for size in (1, workers))
    assert alone.keys() == together.keys()
    for name, value in together.items():
        assert (value - alone[name]).abs().max() < 1e-8, name


@pytest.mark.parametrize("workers", WORLD_SIZES[1:])
def test_slices_of_unequal_size_in_float64(outcomes: dict[int, list[Outcome]], workers: int) -> None:
    """Weighted by their sizes, the slices make the same steps as the whole meta-batch. The bounds are those above."""
    alone, together = (outcomes[size][0].uneven for size in (1, workers))
    assert len(alone.losses) == UNEVEN_STEPS
    assert furthest(together.losses, alone.losses) < 1e-9
    for name, value in together.state.items():
        assert (value - alone.state[name]).abs().max() < 1e-8, name


@pytest.mark.parametrize("workers", WORLD_SIZES[1:])
def test_losses_in_float32(outcomes: dict[int, list[Outcome]], workers: int) -> None:
    ours, alone = (outcomes[size][0].float32["global"].losses for size in (workers, 1))
    assert abs(ours[0] - alone[0]) < 1e-6
    assert furthest(ours, alone) < 1e-5


@pytest.mark.parametrize("workers", WORLD_SIZES[1:])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_worker_holds_the_same_bits(outcomes: dict[int, list[Outcome]], scope: str, workers: int) -> None:
    first, *others = (outcome.float32[scope] for outcome in outcomes[workers])
    assert (first.state["extractor.norms.0.running_var"] - 1).abs().max() > 1e-3
    for other in others:
        assert other.losses == first.losses
        for name, value in first.state.items():
            assert torch.equal(other.state[name], value), name


@pytest.mark.parametrize("workers", WORLD_SIZES[1:])
def test_scopes_differ_between_numbers_of_workers_as_they_should(
    outcomes: dict[int, list[Outcome]], workers: int
) -> None:
    """With scope "worker", the statistics are over a slice, which shrinks with the number of workers."""
    ours, alone = (outcomes[size][0].float32 for size in (workers, 1))
    difference = {scope: abs(ours[scope].losses[0] - alone[scope].losses[0]) for scope in SCOPES}
    assert difference["global"] < 1e-6
    assert difference["episode"] < 1e-6
    assert difference["worker"] > 1e-5
    assert len({ours[scope].losses[0] for scope in SCOPES}) == 3


@pytest.mark.parametrize("workers", WORLD_SIZES[1:])
def test_evaluation_gives_every_episode_the_same_accuracy(outcomes: dict[int, list[Outcome]], workers: int) -> None:
    alone = outcomes[1][0].accuracies
    assert len(alone) == 5  # mean noise; single draw, vote and mean probability; the paper's single draw
    for method, values in alone.items():
        assert len(values) == EVAL_EPISODES, method
        assert len(set(values)) > 1, method  # equal accuracies could not differ between workers
    for outcome in outcomes[workers]:
        assert outcome.accuracies == alone
