"""Steps on batches that the host makes, that the device makes, and as a CUDA graph: all take the same steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from helpers.steps import gradients, train_step
from test_episodes import make_bank
from torch import Tensor

from lgm_dist.config import Config, ModelConfig, Protocol
from lgm_dist.data import sample_episodes
from lgm_dist.model import LGMNet
from lgm_dist.training.device_batches import AHEAD, DeviceBatches
from lgm_dist.training.episodes_task import Episodes
from lgm_dist.training.schedule import make_optimizer
from lgm_dist.training.step import EagerStep, GraphStep, make_step
from lgm_dist.training.worker import Worker

Precision = Literal["float32", "tf32", "bf16"]
Steps = Callable[[int], Tensor]
SMALL = Config.of(ways=3, shot=1, query=2, meta_batch=4, model=ModelConfig(filters=8))


def trained(device: str, config: Config) -> tuple[LGMNet, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LGMNet(config.model).train().to(device)
    return model, make_optimizer(model, config)


def task_of(config: Config, worker: Worker, on_device: bool) -> Episodes:
    """The task whose batches numpy makes, or, also on a CPU, torch on the device."""
    bank = make_bank([9, 14, 30, 8, 11])
    task = Episodes(config, {"train": bank}, worker)
    task._on_device = DeviceBatches(bank, config, worker, task.slice_of(0)) if on_device else None
    return task


def graph_steps(model: LGMNet, optimizer: torch.optim.Optimizer, config: Config) -> Steps:
    task = Episodes(config, {"train": make_bank([9, 14, 30, 8, 11])}, Worker(device="cuda"))
    take_step = make_step(task, model, model, optimizer, 0)
    assert isinstance(take_step, GraphStep)
    return lambda step: take_step(task.batch(step), step)


@pytest.mark.parametrize(
    ("device", "graph"),
    [("cpu", False), *(pytest.param("cuda", g, marks=pytest.mark.gpu) for g in (False, True))],
)
@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_steps_made_on_the_device_are_the_steps(device: str, graph: bool, protocol: Protocol) -> None:
    """Losses, accuracies and gradient norms of the steps whose episodes numpy makes, and the averages after them."""
    config, worker = SMALL.replace(protocol=protocol), Worker(device=device)
    (first, ours), (second, known) = (trained(device, config) for _ in range(2))
    task, host = task_of(config, worker, True), task_of(config, worker, False)
    take_step = make_step(task, first, first, ours, 0) if graph else EagerStep(task, first, ours)
    plain = EagerStep(host, second, known)
    for step in (AHEAD - 2, AHEAD - 1, AHEAD, 5 * AHEAD + 3, 0):  # within a block, into the next, elsewhere and back
        batch = task.batch(step)
        torch.testing.assert_close(take_step(batch, step), plain(host.batch(step), step), rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.make().images, host.batch(step).images)  # type: ignore[union-attr]
    for mine, theirs in zip(first.buffers(), second.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_worker_takes_its_own_slice_and_weight() -> None:
    """Of 4 episodes 3 workers take 1, 1 and 2, weighted so that the mean of the workers' means is that of the episodes."""
    bank = make_bank([9, 14, 30, 8, 11])
    for rank, (first, count, weight) in enumerate([(0, 1, 3 / 4), (1, 1, 3 / 4), (2, 2, 6 / 4)]):
        wanted = sample_episodes(bank, SMALL, "train", 4 * 40 + first, count)
        known = train_step(*trained("cpu", SMALL), wanted, SMALL, 40, weight)
        for on_device in (True, False):
            task = task_of(SMALL, Worker(rank, 3), on_device)
            batch = task.batch(40)
            made = batch.make() if on_device else batch  # type: ignore[union-attr]
            assert torch.equal(made.images, wanted.images)
            assert torch.equal(made.labels, wanted.labels)
            model, optimizer = trained("cpu", SMALL)
            take_step = (
                make_step(task, model, model, optimizer, 40) if not on_device else EagerStep(task, model, optimizer)
            )
            assert isinstance(take_step, EagerStep)
            torch.testing.assert_close(take_step(batch, 40), known)


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["standard", "paper"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_same_steps_have_the_same_bits_wherever_they_begin(precision: Precision, protocol: Protocol) -> None:
    """10 steps, and 4 of them in one process and 6 in the next, which begins with what the first has left."""
    config = SMALL.replace(precision=precision, protocol=protocol)
    (whole, optimizer), (part, before) = (trained("cuda", config) for _ in range(2))
    steps = graph_steps(whole, optimizer, config)
    first = graph_steps(part, before, config)
    known, found = [steps(step) for step in range(10)], [first(step) for step in range(4)]
    resumed, after = trained("cuda", config)
    resumed.load_state_dict(part.state_dict())
    after.load_state_dict(before.state_dict())
    second = graph_steps(resumed, after, config)
    found += [second(step) for step in range(4, 10)]
    assert torch.equal(torch.stack(known), torch.stack(found))
    for mine, theirs in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_float32_is_float32() -> None:
    """The loss and gradient of float64 to 1e-5; TF32, which keeps ten bits, is farther from them."""
    norms = {}
    for precision in ("float64", "float32", "tf32"):
        config = Config.of(meta_batch=4, precision="float32" if precision == "float64" else precision)  # type: ignore[arg-type]
        model, _ = trained("cuda", config)
        batch = sample_episodes(make_bank([9, 14, 30, 8, 11]), config, "train", 0, 4).to("cuda")
        if precision == "float64":
            model, batch = model.double(), replace(batch, images=batch.images.double(), noise=batch.noise.double())
        norms[precision] = gradients(model, batch, config)[[0, 2]].double()
    error = {name: float((value / norms["float64"] - 1).abs().max()) for name, value in norms.items()}
    assert error["float32"] < 1e-5
    assert 1e-5 < error["tf32"] < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("norm", ["batch", "group", "instance", "layer", "per episode"])
def test_every_normalisation_trains_as_one_graph(norm: str, precision: Precision) -> None:
    kind = {"norm_scope": "episode"} if norm == "per episode" else {"norm": norm}
    config = SMALL.replace(precision=precision, model=ModelConfig(filters=8, **kind))  # type: ignore[arg-type]
    steps = graph_steps(*trained("cuda", config), config)
    losses = torch.stack([steps(step) for step in range(3)])
    assert torch.isfinite(losses).all()
