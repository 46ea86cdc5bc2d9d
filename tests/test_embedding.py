"""Views of images and maps averaged over them; statistics of the base classes; the same for any number of workers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.threads import Threads
from torch import Tensor

from lgm_dist.config import Config, ModelConfig
from lgm_dist.data import ImageBank, check_episodes, open_bank
from lgm_dist.data.episodes import draw_rows, load_images
from lgm_dist.data.views import load_view
from lgm_dist.model import LGMNet, build_model
from lgm_dist.training.base_statistics import base_images, fit_head
from lgm_dist.training.embedding import KeptMaps, embed_images
from lgm_dist.training.evaluation import evaluate
from lgm_dist.training.worker import Worker

CENTRED = {"generator": "none", "head": "class_means", "pool": 1, "centre": True, "shrinkage": 0.5}


@pytest.fixture(scope="module")
def bank(tiny: Path) -> ImageBank:
    return open_bank(tiny, "val")


@pytest.fixture(scope="module")
def base(tiny: Path) -> ImageBank:
    return open_bank(tiny, "train")


def network(small: Config, **settings: Any) -> LGMNet:
    return build_model(replace(small.model, **settings), seed=1).eval()


def pixels(bank: ImageBank, images: Tensor) -> Tensor:
    """Normalised images (n, C, H, W) back to bytes (n, H, W, C)."""
    mean, std = torch.tensor(bank.mean), torch.tensor(bank.std)
    return (images.permute(0, 2, 3, 1) * std + mean).round().byte()


def test_views_show_the_image_its_mirror_image_and_moved_copies(small: Config, bank: ImageBank) -> None:
    rows = torch.tensor([3, 50, 7])
    original = torch.from_numpy(bank.images[rows.numpy()])
    assert torch.equal(pixels(bank, load_view(bank, small, rows, 0)), original)
    assert torch.equal(pixels(bank, load_view(bank, small, rows, -1)), original.flip(2))
    for copy in (1, 2, 40):
        for image, moved in zip(original, pixels(bank, load_view(bank, small, rows, copy)), strict=True):
            assert any(torch.equal(moved, other) for other in all_moves(image))


def all_moves(image: Tensor) -> list[Tensor]:
    """(H, W, C) and its mirror image, moved by up to an eighth of 16 pixels; the border is repeated."""
    found = []
    for side in (image, image.flip(1)):
        padded = np.pad(side.numpy(), ((2, 2), (2, 2), (0, 0)), mode="edge")
        found += [torch.from_numpy(padded[y : y + 16, x : x + 16].copy()) for y in range(5) for x in range(5)]
    return found


def test_a_copy_depends_on_image_number_seed_and_split_alone(small: Config, bank: ImageBank, base: ImageBank) -> None:
    rows = torch.tensor([3, 50, 7, 3])
    copies = [load_view(bank, small, rows, copy) for copy in range(1, 6)]
    for copy, images in enumerate(copies, start=1):
        assert torch.equal(images[0], images[3])
        assert torch.equal(load_view(bank, small.replace(seed=5), rows[2:3], copy)[0], images[2])
    assert not all(torch.equal(images, copies[0]) for images in copies[1:])
    many = torch.arange(100)
    for other in (small.replace(eval_seed=1), small):
        another = bank if other is not small else replace(base, images=bank.images, mean=bank.mean, std=bank.std)
        assert not torch.equal(load_view(another, other, many, 1), load_view(bank, small, many, 1))


@pytest.mark.parametrize(("copies", "flips"), [(0, True), (3, False), (3, True)])
@pytest.mark.parametrize("images_at_once", [1000, 4])
def test_maps_are_means_over_views(
    small: Config, bank: ImageBank, copies: int, flips: bool, images_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgm_dist.training.embedding.IMAGES_AT_ONCE", images_at_once)
    model, config = network(small), small.replace(eval_flips=flips)
    rows = np.array([9, 4, 100, 4, 0])
    features, codes = embed_images(model, bank, config, rows, Worker(), copies)
    for row, found, code in zip(rows, features, codes, strict=True):
        image = load_images(bank, config, np.array([row]))
        views = [image, image.flip(3)] if flips else [image]
        views += [load_view(bank, config, torch.tensor([row]), c) for c in range(1, copies + 1)]
        expected = torch.stack([model.embed(view)[0][0] for view in views]).mean(0)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(code, model.generator.encode(expected[None], 1)[0])


def test_kept_maps_embed_no_view_twice(small: Config, bank: ImageBank, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, real = [], LGMNet.embed

    def counted(self: LGMNet, images: Tensor) -> tuple[Tensor, Tensor]:
        embedded.append(len(images))
        return real(self, images)

    monkeypatch.setattr(LGMNet, "embed", counted)
    rows = np.array([5, 9, 30])
    maps = KeptMaps(network(small), bank, small, rows, Worker())
    for asked in (rows, rows[::-1]):
        for copies, flips in ((0, False), (2, False), (0, True), (2, True)):
            assert len(maps(asked, copies, flips, small.model)) == 3
    assert sum(n for n in embedded if n == 3) == 3 * (1 + 1 + 2), "the image, its mirror image, two copies"
    torch.testing.assert_close(maps(rows, 2, True, small.model)[1], maps(rows[1:2], 2, True, small.model)[0])


def slow(model: LGMNet, bank: ImageBank, config: Config, episodes: int) -> np.ndarray:
    """Accuracy of each val episode: support images are averaged over all views, queries without copies."""
    e, found = config.episodes, []
    drawn = draw_rows(bank, config, "val", 0, episodes)
    for support, query, labels in zip(drawn.support, drawn.query, drawn.labels, strict=True):
        s = embed_images(model, bank, config, support, Worker(), e.eval_copies)
        q = embed_images(model, bank, config, query, Worker())[0]
        log_p = model.classify(torch.cat([s[0], q])[None], s[1][None], config.episode("val").ways)
        found.append((log_p[0].argmax(-1).numpy() == labels).mean())
    return np.array(found)


@pytest.mark.parametrize("settings", [{"eval_copies": 2}, {"eval_flips": True}, {"eval_copies": 2, "eval_flips": True}])
@pytest.mark.parametrize("model", [{}, {"generator": "none", "head": "class_means"}], ids=["paper", "class means"])
def test_evaluation_with_views_against_a_loop(
    small: Config, bank: ImageBank, settings: dict[str, Any], model: dict[str, str]
) -> None:
    net, config = network(small, **model), small.replace(**settings)
    with torch.no_grad():
        expected = slow(net, bank, config, 8)
    np.testing.assert_allclose(evaluate(net, bank, config, "val", 8).accuracies["mean noise"], expected)
    plain = evaluate(net, bank, small, "val", 8).accuracies["mean noise"]
    assert (plain != expected).any()


def test_protocol_paper_has_no_views(small: Config) -> None:
    for settings in ({"eval_copies": 2}, {"eval_flips": True}):
        config = small.replace(protocol="paper", **settings)
        with pytest.raises(ValueError, match=r"^eval_copies \(\d\) and eval_flips \(\w+\) need protocol standard"):
            check_episodes(config, "val", "tiny", [24] * 6)


# Statistics of the base classes


def test_base_images_are_the_first_of_each_class(base: ImageBank) -> None:
    rows, labels = base_images(base, 3)
    assert rows.tolist() == [24 * c + i for c in range(6) for i in range(3)]
    assert labels.tolist() == [c for c in range(6) for _ in range(3)]
    assert len(base_images(base, 100)[0]) == 6 * 24


@pytest.mark.parametrize("flips", [False, True])
def test_statistics_are_those_of_the_base_classes_maps(small: Config, base: ImageBank, flips: bool) -> None:
    model, config = network(small, **CENTRED).train(), small.replace(eval_flips=flips)
    fit_head(model, base, config, images_per_class=5)
    assert all(module.training for module in model.modules())
    model.eval()
    rows, labels = base_images(base, 5)
    images = load_images(base, config, rows)
    with torch.no_grad():
        maps = [model.backbone(x, 1).mean((2, 3)) for x in ((images, images.flip(3)) if flips else (images,))]
    x = torch.stack(maps).mean(0).double()  # (n, F)
    torch.testing.assert_close(model.head.vectors.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    rest = torch.cat([x[labels == c] - x[labels == c].mean(0) for c in range(6)])
    c = rest.T @ rest / (len(x) - 6)
    scale = c.trace() / len(c)
    whitening = model.head.vectors.whitening.double()
    shrunk = 0.5 * c / scale + 0.5 * torch.eye(len(c), dtype=torch.double)
    torch.testing.assert_close(whitening @ shrunk @ whitening.T, torch.eye(len(c)).double(), atol=1e-4, rtol=0)


def test_nothing_is_embedded_for_a_head_without_statistics(small: Config, base: ImageBank) -> None:
    for head in ("class_means", "cosine", "ridge"):
        fit_head(network(small, head=head), base, small, maps=None if head == "cosine" else fail)


def fail(*_: Any) -> Tensor:
    raise AssertionError


def test_statistics_before_a_generator_that_changes_the_size_of_maps_are_refused(
    small: Config, base: ImageBank
) -> None:
    model = network(small, **CENTRED | {"generator": "lgm"})
    with pytest.raises(
        ValueError, match=r"^model\.generator \('lgm'\) changes the size of the maps from \(8, 2, 2\) to "
    ):
        fit_head(model, base, small)


def test_workers_fit_and_evaluate_together_as_one_alone(small: Config, bank: ImageBank, base: ImageBank) -> None:
    """Three workers, in threads that sum over one another."""
    config = small.replace(eval_copies=2, eval_flips=True)

    built = network(small, **CENTRED)  # here: building it in threads would share torch's random numbers

    def work(worker: Worker) -> tuple[Tensor, np.ndarray]:
        model = deepcopy(built)
        fit_head(model, base, config, worker, 4)
        return model.head.vectors.whitening, evaluate(model, bank, config, "val", 7, worker=worker).accuracies[
            "mean noise"
        ]

    whitening, accuracies = work(Worker())
    for ours, theirs in Threads(3).run(lambda rank, all_reduce: work(Worker(rank, 3, all_reduce=all_reduce))):
        torch.testing.assert_close(ours, whitening)
        np.testing.assert_array_equal(theirs, accuracies)


def test_a_model_config_has_limits() -> None:
    for name, value in (("pool", 5), ("power", 0.0), ("power", 5.0), ("shrinkage", 0.0), ("shrinkage", 1.1)):
        with pytest.raises(ValueError, match=rf"^{name} \({value}\) must be "):
            ModelConfig(**{name: value})
