"""Flips, shifts and rotations against a loop over pixels and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from lgm_dist.data.augment import ANGLES, flip_shift, rotate

Pixels = np.ndarray


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 5, 1)])
def test_flip_shift_pixel_by_pixel(shape: tuple[int, int, int]) -> None:
    rng, (height, width, _) = np.random.default_rng(1), shape
    images = noise(60, *shape)
    before = images.copy()
    flip, dy, dx = rng.random(60) < 0.5, rng.integers(-3, 4, 60), rng.integers(-3, 4, 60)
    got = flip_shift(images, flip, dy, dx)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(images, before)
    for i, y, x in np.ndindex(60, height, width):
        row, column = min(max(y - dy[i], 0), height - 1), min(max(x - dx[i], 0), width - 1)
        assert (got[i, y, x] == images[i, row, width - 1 - column if flip[i] else column]).all()


def test_no_shift_and_no_flip_change_nothing() -> None:
    images, still = noise(4, 6, 7, 3), np.zeros(4, np.int64)
    np.testing.assert_array_equal(flip_shift(images, still > 0, still, still), images)


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
