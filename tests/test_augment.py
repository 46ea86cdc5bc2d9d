"""Flips and shifts against a loop over pixels, rotations against scipy, and augmentations from outside the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_episodes import make_bank
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.augment import AUGMENTATIONS, Augmentation, register_augmentation
from lgm_dist.data.augment.flip_shift import FlipShift
from lgm_dist.data.augment.rotation import ANGLES, Rotation
from lgm_dist.data.episodes import EpisodeSampler, draw_rows, sample_episodes
from lgm_dist.data.philox import bounded

Pixels = np.ndarray
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def rotate(images: Pixels, angle: Pixels) -> Pixels:
    return Rotation(images.shape[1:]).apply(torch.from_numpy(images), torch.from_numpy(angle)[:, None]).numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 5, 1)])
def test_flip_shift_pixel_by_pixel(shape: tuple[int, int, int], dtype: type, device: str) -> None:
    rng, (height, width, _) = np.random.default_rng(1), shape
    images = noise(60, *shape).astype(dtype)
    before = images.copy()
    flip, dy, dx = rng.integers(0, 2, 60), rng.integers(-3, 4, 60), rng.integers(-3, 4, 60)
    parameters = torch.from_numpy(np.stack([flip, dy, dx], axis=1)).to(device)
    got = FlipShift(shape).apply(torch.from_numpy(images).to(device), parameters).cpu().numpy()
    assert got.dtype == dtype
    np.testing.assert_array_equal(images, before)
    for i, y, x in np.ndindex(60, height, width):
        row, column = min(max(y - dy[i], 0), height - 1), min(max(x - dx[i], 0), width - 1)
        assert (got[i, y, x] == images[i, row, width - 1 - column if flip[i] else column]).all()


def test_no_shift_and_no_flip_change_nothing() -> None:
    images = torch.from_numpy(noise(4, 6, 7, 3))
    assert torch.equal(FlipShift((6, 7, 3)).apply(images, torch.zeros(4, 3, dtype=torch.int64)), images)


@pytest.mark.parametrize("size", [(32, 32), (84, 84), (20, 33), (40, 11)])
@pytest.mark.parametrize("angle", range(5))
def test_rotate_is_scipy_rotate(size: tuple[int, int], angle: int) -> None:
    images = noise(2, *size, 3)
    got = rotate(images, np.full(2, angle))
    want = [
        ndimage.rotate(image.astype(np.float64), ANGLES[angle], reshape=False, mode="nearest", order=3)
        for image in images
    ]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.stack(want), atol=1e-3, rtol=0)
    if ANGLES[angle]:
        assert got.min() < 0, "overshoot is not clipped"
        assert got.max() > 255
    else:
        np.testing.assert_array_equal(got, images)


def test_positive_angles_turn_as_rot90_does() -> None:
    image = np.zeros((1, 33, 33, 1), np.uint8)
    image[0, 16, 24:32] = 255  # a bar to the right of the middle
    turned = rotate(image, np.array([ANGLES.index(45.0)]))[0, ..., 0]
    right, up_right = turned[16, 24:32].mean(), np.mean([turned[16 - d, 16 + d] for d in range(7, 11)])
    assert up_right > 150
    assert right < 20
    assert np.rot90(image[0, ..., 0])[1:9, 16].mean() == 255, "np.rot90 takes right to up"


def test_rotate_does_not_depend_on_the_rest_of_the_batch() -> None:
    images, angle = noise(23, 16, 16, 3), np.random.default_rng(2).integers(0, 5, 23)
    alone = [rotate(images[i : i + 1], angle[i : i + 1])[0] for i in range(23)]
    np.testing.assert_array_equal(rotate(images, angle), np.stack(alone))


# ---- from outside the package ----


@register_augmentation("invert")
class Invert(Augmentation):
    """Inverts half of the images."""

    purpose = 2000

    def draw(self, words: Tensor) -> Tensor:
        return bounded(words, 2)  # (..., 1)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        return torch.where(parameters[..., None, None] == 1, 255 - images, images)


def philox_word(seed: int, purpose: int, episode: int, position: int) -> int:
    """One word of the train split, in Python's integers."""
    c, k = [position // 4, episode, 0, purpose], [seed, 0]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high % 2**32, low >> 32 ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[position % 4]


@pytest.mark.parametrize("device", DEVICES)
def test_an_augmentation_from_outside_follows_its_own_stream(device: str) -> None:
    bank = make_bank([9, 14, 30, 8, 11])
    config = Config.of(ways=3, shot=1, query=2, seed=11, augmentations=("invert",))
    pixels = EpisodeSampler(bank, config, device, resident=True)(7, 1).images[0].permute(0, 2, 3, 1).cpu().numpy()
    drawn = draw_rows(bank, config, "train", 7, 1)
    inverted = 0
    for place, row in enumerate([*drawn.support[0], *drawn.query[0]]):
        turn = philox_word(11, 2000, 7, place) >> 31
        image = 255 - bank.images[row] if turn else bank.images[row]
        np.testing.assert_array_equal(pixels[place], (image - np.float32(bank.mean)) / np.float32(bank.std))
        inverted += turn
    assert 0 < inverted < 9


def test_augmentations_follow_each_other_and_leave_other_streams_alone() -> None:
    bank, config = make_bank([9, 14, 30, 8, 11]), Config.of(ways=3, shot=1, query=2)
    plain = sample_episodes(bank, config, "train", 0, 20)
    both = sample_episodes(bank, config.replace(augmentations=("flip_shift", "invert")), "train", 0, 20)
    mean, std = (torch.tensor(s)[:, None, None] for s in (bank.mean, bank.std))
    before, after = ((batch.images * std + mean).round() for batch in (plain, both))
    same = (before == after).flatten(2).all(2)  # (20, S + T)
    assert torch.equal(after[~same], 255 - before[~same])
    assert 0.3 < float(same.float().mean()) < 0.7
    assert torch.equal(plain.noise, both.noise)


def test_augmentations_that_cannot_be_used_are_explained() -> None:
    bank, config = make_bank([9, 14, 30, 8, 11]), Config.of(ways=3)
    for names, sentence in (
        (
            ("mirror",),
            r"augmentations \('mirror'\) must be one of crop, .*flip_shift, .*rotation; to use your own",
        ),
        (("rotation",), r"augmentations \('rotation'\) changes all images of a class alike and so leaks the label"),
        (("invert", "flip_shift", "invert"), "augmentations names 'invert' twice"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sample_episodes(bank, config.replace(augmentations=names), "train", 0, 1)
        sample_episodes(bank, config.replace(augmentations=names, augment=False), "train", 0, 1)
    for purpose, sentence in (
        (4, r"purpose \(4\) of augmentation 'other' must lie between 1000 and 65535"),
        (2**16, r"purpose \(65536\) of augmentation 'other' must lie"),
        (2000, r"purpose \(2000\) of augmentation 'other' is that of 'invert'; choose another number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            register_augmentation("other")(type("Other", (Invert,), {"purpose": purpose}))
    with pytest.raises(ValueError, match="augmentation 'invert' is registered already; choose another name"):
        register_augmentation("invert")(type("Other", (Invert,), {}))
    assert {"flip_shift", "invert", "rotation"} <= set(AUGMENTATIONS.names())
