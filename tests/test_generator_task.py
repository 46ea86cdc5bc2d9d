"""The task `generator`: it trains generator and head alone, over features that are those of the frozen backbone."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lgm_dist.config import Config, ModelConfig, Split
from lgm_dist.data import ImageBank, open_bank, sample_episodes
from lgm_dist.data.images import load_images
from lgm_dist.model import LGMNet, build_model
from lgm_dist.training.evaluation import evaluate
from lgm_dist.training.frozen import backbone_digest, features_of
from lgm_dist.training.generator_task import GeneratorTask
from lgm_dist.training.step import gradients, train_step
from lgm_dist.training.worker import Worker

Banks = dict[Split, ImageBank]


@pytest.fixture
def config(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("LGM_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # two threads only wait for each other where the machine is busy
    model = ModelConfig(channels=3, filters=8, noise_size=4, head="class_means", map_size=2)
    return small.replace(meta_batch=4, noise="mean", model=model, **{"generator.copies": 2})


@pytest.fixture
def banks(tiny: Path, config: Config) -> Banks:
    splits: tuple[Split, ...] = ("train", "val", "test")
    return {split: open_bank(tiny, split, config.data.cache) for split in splits}


def trained_like(config: Config) -> LGMNet:
    """A network whose moving averages are not the initial ones, in training mode as the loop's."""
    model = build_model(config.model, seed=1)
    with torch.no_grad():
        model.backbone(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 1)  # type: ignore[operator]
    return model.train()


def states(model: LGMNet) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def train(config: Config, banks: Banks, steps: range, model: LGMNet | None = None) -> LGMNet:
    task, model = GeneratorTask(config, banks, Worker()), model or trained_like(config)
    module, optimizer = task.module(model).train(), task.optimizer(model)
    for step in steps:
        train_step(task, module, optimizer, task.batch(step), step)
    return model


def test_generator_and_head_learn_and_the_backbone_stays(config: Config, banks: Banks) -> None:
    before = states(trained_like(config))
    model = train(config, banks, range(3))
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == (name.startswith(("generator.", "head."))), name
    assert model.backbone.training, "as the loop had it"


def test_the_features_are_those_of_the_backbone(config: Config, banks: Banks) -> None:
    model = trained_like(config)
    val = features_of(model, banks["val"], config, Worker())
    model.eval()
    maps = model.backbone(load_images(banks["val"], config, np.array([3, 50])), 1)  # (2, 8, 2, 2)
    assert val.features.shape == (144, 1, 2, 2, 8)
    torch.testing.assert_close(torch.from_numpy(val.features[[3, 50], 0]).permute(0, 3, 1, 2), maps.detach())
    assert features_of(model, banks["train"], config, Worker()).features.shape == (144, 2, 2, 2, 8)


def test_an_evaluation_over_features_is_one_over_images(config: Config, banks: Banks) -> None:
    task, model = GeneratorTask(config, banks, Worker()), trained_like(config)
    for split in ("val", "test"):
        found, episodes = task.evaluate(model, split), 6
        wanted = evaluate(model, banks[split], config, split, episodes)  # type: ignore[arg-type]
        assert found is not None
        np.testing.assert_array_equal(found.accuracies["mean noise"], wanted.accuracies["mean noise"])
    assert task.evaluate(model, "val") is not None
    assert GeneratorTask(config.replace(test_episodes=0), banks, Worker()).evaluate(model, "test") is None


def test_the_loss_is_that_of_the_whole_network_on_the_same_images(config: Config, banks: Banks) -> None:
    """Without augmentation, and with the backbone in evaluation mode."""
    config = config.replace(augment=False)
    task, model = GeneratorTask(config, banks, Worker()), trained_like(config)
    module = task.module(model).eval()
    images = sample_episodes(banks["train"], config, "train", 8, 4)
    wanted = model.eval()(images.support, images.query, 3)  # (B, T, N)
    batch = task.batch(2)
    torch.testing.assert_close(module(batch.support, batch.query, 3), wanted, atol=1e-5, rtol=1e-5)


def test_slices_of_workers_are_the_whole_and_gradients_too(config: Config, banks: Banks) -> None:
    config = config.replace(**{"model.generator": "none"})
    whole = GeneratorTask(config, banks, Worker())
    parts = [GeneratorTask(config, banks, Worker(rank=rank, world_size=2)) for rank in range(2)]
    grads = []
    for task in (whole, *parts):
        module = task.module(trained_like(config)).train()
        gradients(task, module, task.batch(5))
        grads.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], (grads[1] + grads[2]) / 2)
    both = torch.cat([task.batch(5).images for task in parts])
    assert torch.equal(whole.batch(5).images, both)


def test_a_stage_that_is_resumed_ends_with_the_same_bits(config: Config, banks: Banks) -> None:
    config = config.replace(**{"generator.alternate_shot": 1})
    whole, task = train(config, banks, range(4)), GeneratorTask(config, banks, Worker())
    model = trained_like(config)
    module, optimizer = task.module(model).train(), task.optimizer(model)
    for step in range(2):
        train_step(task, module, optimizer, task.batch(step), step)
    saved, moments = states(model), copy.deepcopy(optimizer.state_dict())

    again, task = build_model(config.model, seed=7), GeneratorTask(config, banks, Worker())
    optimizer = task.optimizer(again)  # made before the weights are there, as when a run is resumed
    again.load_state_dict(saved)
    optimizer.load_state_dict(moments)
    module = task.module(again).train()
    for step in range(2, 4):
        train_step(task, module, optimizer, task.batch(step), step)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_shots_take_turns(config: Config, banks: Banks) -> None:
    task = GeneratorTask(config.replace(**{"generator.alternate_shot": 5}), banks, Worker())
    task.module(trained_like(config))
    assert [task.batch(step).support.shape[1] for step in range(4)] == [6, 15, 6, 15]


def test_the_digest_is_that_of_the_backbone(config: Config) -> None:
    model = trained_like(config)
    digest = backbone_digest(model)
    other = build_model(config.replace(**{"model.generator": "none", "model.head": "cosine"}).model, seed=1)
    other.backbone.load_state_dict(model.backbone.state_dict())  # type: ignore[attr-defined]
    assert backbone_digest(other) == digest
    with torch.no_grad():
        next(iter(model.backbone.parameters()))[0] += 1  # type: ignore[attr-defined]
    assert backbone_digest(model) != digest
    assert backbone_digest(LGMNet(config.replace(**{"model.map_size": 1}).model)) != backbone_digest(
        LGMNet(config.model)
    )


def test_protocol_paper_is_refused(config: Config) -> None:
    with pytest.raises(
        ValueError, match=r"^stages \('generator'\) needs protocol standard: the images of protocol paper"
    ):
        GeneratorTask(config.replace(protocol="paper"), {}, Worker())
