"""The stream of labelled images: each epoch shows each image once, slices fit together, rotations and labels are numpy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lgm_dist.config import Config
from lgm_dist.data import ImageBank, open_bank
from lgm_dist.data.holdout import held_out_classes
from lgm_dist.data.labelled import ImageSampler, check_labelled, classes_learned


@pytest.fixture(scope="module")
def bank(tiny: Path) -> ImageBank:
    return open_bank(str(tiny), "train")


def config(**settings: object) -> Config:
    return Config.of(**{"pretraining.augmentations": (), "pretraining.rotations": 1} | settings)


def test_each_epoch_shows_each_image_once_in_an_order_of_its_own(bank: ImageBank) -> None:
    n = len(bank.images)
    sampler = ImageSampler(bank, config())
    epochs = [sampler(epoch * n, n).images.flatten(1) for epoch in range(3)]
    images = ImageSampler(bank, config())._normalise(bank.tensor, torch.arange(n)).flatten(1)  # (n, C * H * W)
    for epoch in epochs:
        assert torch.equal(epoch.sum(1).sort().values, images.sum(1).sort().values)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(epochs[0], ImageSampler(bank, config(seed=1))(0, n).images.flatten(1))


def test_slices_of_a_range_give_the_same_images_as_the_whole_range(bank: ImageBank) -> None:
    n = len(bank.images)
    augmented = config(**{"pretraining.augmentations": ("flip_shift",), "pretraining.rotations": 4})
    whole = ImageSampler(bank, augmented)(n - 7, 20)  # the range has the end of an epoch in it
    parts = [ImageSampler(bank, augmented)(start, count) for start, count in ((n - 7, 5), (n - 2, 3), (n + 1, 12))]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


def test_labels_are_the_classes_of_the_images(bank: ImageBank) -> None:
    batch = ImageSampler(bank, config())(0, 50)
    images = ImageSampler(bank, config())._normalise(bank.tensor, torch.arange(len(bank.images)))
    for image, label in zip(batch.images, batch.labels, strict=True):
        row = int((images == image).flatten(1).all(1).nonzero()[0, 0])
        assert bank.offsets[label] <= row < bank.offsets[label + 1]


def test_rotations_are_those_of_numpy_and_classes_of_their_own(bank: ImageBank) -> None:
    upright = ImageSampler(bank, config())(3, 5)
    turned = ImageSampler(bank, config(**{"pretraining.rotations": 4}))(3, 5)
    assert turned.images.shape == (20, 3, 16, 16)
    assert turned.images.is_contiguous(memory_format=torch.channels_last)
    for i in range(5):
        for r in range(4):
            expected = np.rot90(upright.images[i].permute(1, 2, 0).numpy(), r)
            assert np.array_equal(turned.images[4 * i + r].permute(1, 2, 0).numpy(), expected)
            assert turned.labels[4 * i + r] == 4 * upright.labels[i] + r


def test_images_are_augmented(bank: ImageBank) -> None:
    plain, moved = (
        ImageSampler(bank, config(**{"pretraining.augmentations": a}))(0, 40) for a in ((), ("flip_shift",))
    )
    assert torch.equal(plain.labels, moved.labels)
    # two flips, nine shifts each way: one image in 162 stays as it is
    assert (plain.images == moved.images).flatten(1).all(1).sum() <= 3


def blank(shape: tuple[int, int, int]) -> ImageBank:
    """Three classes of one black image each."""
    images = np.zeros((3, *shape), np.uint8)
    return ImageBank("blank", "train", images, np.arange(4), ("a", "b", "c"), ("",) * 3, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"pretraining.rotations": 4}, (16, 20, 3), "needs square images, and these are 20 x 16"),
        ({"pretraining.augmentations": ("rotation",)}, (16, 16, 3), "'rotation'.* for episodes alone"),
        ({"pretraining.augmentations": ("flip_shift", "flip_shift")}, (16, 16, 3), "'flip_shift' twice"),
        ({"pretraining.augmentations": ("none",)}, (16, 16, 3), "must be one of"),
        ({"pretraining.holdout": 2}, (16, 16, 3), "must leave 2 of the 3 base classes; lower it to 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labelled(blank(shape), config(**changes))


def test_classes_that_are_left_out_are_not_seen(bank: ImageBank) -> None:
    few = config(**{"pretraining.holdout": 2})
    learned = classes_learned(few, 6)
    assert len(learned) == 4
    assert set(learned) | set(held_out_classes(few, 6)) == set(range(6))
    batch = ImageSampler(bank, few)(0, 4 * 24)  # an epoch
    assert batch.labels.bincount().tolist() == [24] * 4
    images = ImageSampler(bank, config())._normalise(bank.tensor, torch.arange(len(bank.images)))
    for image, label in zip(batch.images[:20], batch.labels[:20], strict=True):
        row = int((images == image).flatten(1).all(1).nonzero()[0, 0])
        assert bank.offsets[learned[label]] <= row < bank.offsets[learned[label] + 1]
