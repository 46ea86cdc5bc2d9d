"""Episodes are the same wherever they are made, and so are training steps on them. Other tests check those of the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from helpers.steps import gradients, train_step
from lgm_dist.training.steps import AHEAD, DeviceSteps, HostSteps, make_steps
from test_episodes import make_bank

from lgm_dist.config import Config, ModelConfig, Protocol, Split
from lgm_dist.data import sample_episodes
from lgm_dist.data.episodes import EpisodeSampler
from lgm_dist.model import LGMNet
from lgm_dist.training.schedule import make_optimizer
from lgm_dist.training.worker import Worker

Precision = Literal["float32", "tf32", "bf16"]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = Config.of(ways=3, shot=1, query=2, meta_batch=4, model=ModelConfig(filters=8))
CONFIG = Config.of(ways=4, shot=2, query=3, eval_query=5, seed=2**63 + 5, eval_seed=7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("protocol", "augment"), [("standard", True), ("standard", False), ("paper", True)])
@pytest.mark.parametrize("start", [0, 2**40 + 3])
def test_resident_images_give_the_same_episodes(
    device: str, split: Split, protocol: Protocol, augment: bool, start: int
) -> None:
    bank, config = make_bank([9, 14, 30, 8, 11], split), CONFIG.replace(protocol=protocol, augment=augment)
    resident = EpisodeSampler(bank, config, device, resident=True)(start, 6)
    mapped = sample_episodes(bank, config, split, start, 6)
    assert torch.equal(resident.images.cpu(), mapped.images)
    assert torch.equal(resident.support.cpu(), mapped.support)
    assert torch.equal(resident.query.cpu(), mapped.query)
    assert torch.equal(resident.labels.cpu(), mapped.labels)
    np.testing.assert_allclose(resident.noise.cpu(), mapped.noise, rtol=1e-6, atol=1e-7 if device == "cuda" else 0)
    assert resident.images.stride() == mapped.images.stride(), "channels last"


def test_episodes_do_not_depend_on_their_neighbours() -> None:
    sampler = EpisodeSampler(make_bank([9, 14, 30, 8, 11]), CONFIG)
    whole, part = sampler(100, 8), sampler(103, 2)
    for name in ("images", "labels", "noise"):
        assert torch.equal(getattr(whole, name)[3:5], getattr(part, name))


def test_impossible_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 ways need 6 classes"):
        EpisodeSampler(make_bank([9, 14, 30, 8, 11]), CONFIG.replace(ways=6))


def trained(device: str, config: Config) -> tuple[LGMNet, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LGMNet(config.model).train().to(device)
    return model, make_optimizer(model, config)


def device_steps(
    model: LGMNet, optimizer: torch.optim.Optimizer, config: Config, worker: Worker, *, graph: bool = False
) -> DeviceSteps:
    sampler = EpisodeSampler(make_bank([9, 14, 30, 8, 11]), config, worker.device, resident=True)
    return DeviceSteps(model, model, optimizer, sampler, worker, graph=graph)


@pytest.mark.parametrize(
    ("device", "graph"),
    [("cpu", False), *(pytest.param("cuda", g, marks=pytest.mark.gpu) for g in (False, True))],
)
@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_steps_made_on_the_device_are_the_steps(device: str, graph: bool, protocol: Protocol) -> None:
    """Losses, accuracies and gradient norms are those of steps whose episodes are made on the host, and so are the averages."""
    config, worker = SMALL.replace(protocol=protocol), Worker(device=device)
    (first, ours), (second, known) = (trained(device, config) for _ in range(2))
    steps = device_steps(first, ours, config, worker, graph=graph)
    plain = HostSteps(second, known, make_bank([9, 14, 30, 8, 11]), config, worker)
    for step in (AHEAD - 2, AHEAD - 1, AHEAD, 5 * AHEAD + 3, 0):  # in a block, in the next one, elsewhere and back
        torch.testing.assert_close(steps(step), plain(step), rtol=1e-4, atol=1e-5)
        assert torch.equal(steps.batch(step).images, plain.batch(step).images)
    for mine, theirs in zip(first.buffers(), second.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_worker_takes_its_own_slice_and_weight() -> None:
    """Of 4 episodes 3 workers take 1, 1 and 2, weighted so that the mean of the workers' means is that of the episodes."""
    bank = make_bank([9, 14, 30, 8, 11])
    for rank, (first, count, weight) in enumerate([(0, 1, 3 / 4), (1, 1, 3 / 4), (2, 2, 6 / 4)]):
        worker = Worker(rank, 3)
        wanted = sample_episodes(bank, SMALL, "train", 4 * 40 + first, count)
        known = train_step(*trained("cpu", SMALL), wanted, SMALL, 40, weight)
        for steps in (
            device_steps(*trained("cpu", SMALL), SMALL, worker),
            HostSteps(*trained("cpu", SMALL), bank, SMALL, worker),
        ):
            assert torch.equal(steps.batch(40).images, wanted.images)
            assert torch.equal(steps.batch(40).labels, wanted.labels)
            torch.testing.assert_close(steps(40), known)
    assert make_steps(*(object(),) * 3, bank, SMALL, Worker()).__class__ is HostSteps  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["standard", "paper"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_same_steps_have_the_same_bits_wherever_they_begin(precision: Precision, protocol: Protocol) -> None:
    """10 steps, and 4 of them followed by 6 in a process that begins where the first one ended."""
    config = SMALL.replace(precision=precision, protocol=protocol)
    (whole, optimizer), (part, before) = (trained("cuda", config) for _ in range(2))
    steps = device_steps(whole, optimizer, config, Worker(device="cuda"), graph=True)
    first = device_steps(part, before, config, Worker(device="cuda"), graph=True)
    known, found = [steps(step) for step in range(10)], [first(step) for step in range(4)]
    resumed, after = trained("cuda", config)
    resumed.load_state_dict(part.state_dict())
    after.load_state_dict(before.state_dict())
    second = device_steps(resumed, after, config, Worker(device="cuda"), graph=True)
    found += [second(step) for step in range(4, 10)]
    assert torch.equal(torch.stack(known), torch.stack(found))
    for mine, theirs in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_float32_is_float32() -> None:
    """Loss and gradient are those of float64 to 1e-5; TF32, which keeps ten bits, is farther away."""
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
    steps = device_steps(*trained("cuda", config), config, Worker(device="cuda"), graph=True)
    losses = torch.stack([steps(step) for step in range(3)])
    assert torch.isfinite(losses).all()
