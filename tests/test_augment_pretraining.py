"""Augmentations for pretraining against torchvision, scipy and loops, and the distributions of what they draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from test_episodes import make_bank
from torch import Tensor
from torchvision.transforms import functional

from lgm_dist.config import Config
from lgm_dist.data.augment import AUGMENTATIONS, Augmentation, exact_mean
from lgm_dist.data.augment.crop import Crop
from lgm_dist.data.augment.erase import Erase
from lgm_dist.data.augment.flip import Flip
from lgm_dist.data.augment.jitter import Jitter
from lgm_dist.data.augment.resized_crop import ResizedCrop
from lgm_dist.data.episodes import sample_episodes
from lgm_dist.data.philox import RandomWords

NAMES = ("crop", "flip", "jitter", "resized_crop", "erase")
SHAPES = [(32, 32, 3), (20, 33, 1), (17, 9, 3)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.uint8, torch.float32]
DRAWS = 20_000
CHANCE = 1.95
"""A Kolmogorov-Smirnov distance exceeds this / sqrt(n) by chance once in 1,000 times."""


def noise(n: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Whole pixels, or real ones."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return torch.from_numpy(whole if dtype == torch.uint8 else rng.uniform(0, 255, whole.shape).astype(np.float32))


def drawn(augmentation: Augmentation, n: int, seed: int = 0) -> Tensor:
    """The parameters of n images (n, P)."""
    words = RandomWords(seed, "train", {augmentation.purpose: augmentation.words})(torch.arange(n))
    return augmentation.draw(words[augmentation.purpose])


def applied(augmentation: Augmentation, images: Tensor, parameters: Tensor, device: str = "cpu") -> np.ndarray:
    before = images.clone()
    changed = augmentation.apply(images.to(device), parameters.to(device)).cpu()
    assert torch.equal(images, before), "images that are given stay as they are"
    assert changed.shape == images.shape
    return changed.numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 7, 3)])
def test_crop_is_torchvision_crop_of_the_padded_image(shape: tuple, dtype: torch.dtype, device: str) -> None:
    images, up, left = noise(50, shape, dtype), shape[0] // 8, shape[1] // 8
    crop = Crop(shape)
    parameters = drawn(crop, 50)
    parameters[0], parameters[-1] = torch.zeros(2), torch.tensor([2 * up, 2 * left])
    got = applied(crop, images, parameters, device)
    padded = functional.pad(images.permute(0, 3, 1, 2), [left, up], fill=0)
    for i, (y, x) in enumerate(parameters.tolist()):
        want = functional.crop(padded[i], y, x, *shape[:2])
        np.testing.assert_array_equal(got[i], want.permute(1, 2, 0).numpy(), strict=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_flip_is_numpy_fliplr(shape: tuple, dtype: torch.dtype, device: str) -> None:
    images = noise(20, shape, dtype)
    parameters = drawn(Flip(shape), 20)
    got = applied(Flip(shape), images, parameters, device)
    want = [
        np.fliplr(image) if turn else image for image, (turn,) in zip(images.numpy(), parameters.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(got, np.stack(want), strict=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_jitter_is_torchvision_colour_jitter_in_float(shape: tuple, dtype: torch.dtype, device: str) -> None:
    images = noise(30, shape, dtype)
    images[:5] = images[:5] // 2 + 128  # light enough that brightness is clamped
    parameters = drawn(Jitter(shape), 30)
    got = applied(Jitter(shape), images, parameters, device)
    assert got.dtype == np.float32
    for i, (brightness, contrast, saturation) in enumerate(parameters.tolist()):
        want = images[i].permute(2, 0, 1).double() / 255
        want = functional.adjust_contrast(functional.adjust_brightness(want, brightness), contrast)
        want = functional.adjust_saturation(want, saturation) if shape[2] == 3 else want
        np.testing.assert_allclose(got[i], want.permute(1, 2, 0) * 255, atol=1e-3, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_resized_crop_is_linear_interpolation_of_scipy(shape: tuple, dtype: torch.dtype, device: str) -> None:
    images, (height, width, channels) = noise(30, shape, dtype), shape
    parameters = drawn(ResizedCrop(shape), 30)
    got = applied(ResizedCrop(shape), images, parameters, device)
    assert got.dtype == np.float32
    for i, (top, left, high, wide) in enumerate(parameters.double().tolist()):
        y, x = top + (np.arange(height) + 0.5) * high / height, left + (np.arange(width) + 0.5) * wide / width
        places = np.stack(np.meshgrid(y - 0.5, x - 0.5, indexing="ij"))
        for c in range(channels):
            want = ndimage.map_coordinates(images[i, ..., c].double().numpy(), places, order=1, mode="nearest")
            np.testing.assert_allclose(got[i, ..., c], want, atol=2e-3, rtol=0)


def test_resized_crop_of_whole_pixels_is_that_of_torchvision_but_for_its_edge() -> None:
    images, shape = noise(3, (32, 32, 3)), (32, 32, 3)
    boxes = torch.tensor([[0, 0, 32, 32], [3, 5, 20, 16], [12, 0, 20, 27]])
    got = applied(ResizedCrop(shape), images, boxes.float())
    np.testing.assert_array_equal(got[0], images[0])
    for i, box in enumerate(boxes.tolist()):
        want = functional.resized_crop(images[i].permute(2, 0, 1).double(), *box, size=[32, 32], antialias=False)
        np.testing.assert_allclose(got[i, 2:-2, 2:-2], want.permute(1, 2, 0)[2:-2, 2:-2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_erase_pixel_by_pixel(shape: tuple, dtype: torch.dtype, device: str) -> None:
    images = noise(20, shape, dtype)
    parameters = drawn(Erase(shape), 20)
    got = applied(Erase(shape), images, parameters, device)
    assert got.dtype == images.numpy().dtype
    want = images.numpy().copy()
    for i, (top, left, high, wide) in enumerate(parameters.tolist()):
        mean = images[i].double().numpy().mean(axis=(0, 1))
        for y, x in np.ndindex(shape[:2]):
            if top <= y + 0.5 < top + high and left <= x + 0.5 < left + wide:
                want[i, y, x] = np.round(mean) if dtype == torch.uint8 else mean
    np.testing.assert_allclose(got, want, atol=1e-3 if dtype == torch.float32 else 0, rtol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (17, 9, 3), (9, 130, 1), (224, 224, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_alone_and_in_any_batch(name: str, shape: tuple, dtype: torch.dtype) -> None:
    augmentation = AUGMENTATIONS.get(name)(shape)
    images, parameters = noise(9, shape, dtype), drawn(augmentation, 9, seed=1)
    whole = applied(augmentation, images, parameters)
    for part in (slice(0, 1), slice(3, 4), slice(8, 9), slice(2, 7)):
        np.testing.assert_array_equal(applied(augmentation, images[part], parameters[part]), whole[part], strict=True)


def test_exact_mean() -> None:
    images = noise(3, (100, 30, 3), torch.float32)
    np.testing.assert_allclose(exact_mean(images, (1, 2)), images.double().mean((1, 2)), atol=1e-5, rtol=0)
    shuffled = images.flatten(1, 2)[:, torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(exact_mean(shuffled, 1), exact_mean(images, (1, 2))), "no order of the sum shows in the bits"


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_never_waits_for_the_host(name: str) -> None:
    """Tensors of the meta device have no values: an operation that needs them, as a CUDA graph cannot hold, fails."""
    augmentation = AUGMENTATIONS.get(name)((20, 33, 3))
    parameters = augmentation.draw(torch.empty(4, 5, augmentation.words, dtype=torch.int64, device="meta"))
    changed = augmentation.apply(torch.empty(20, 20, 33, 3, device="meta"), parameters.flatten(0, 1))
    assert changed.is_meta
    assert changed.shape == (20, 20, 33, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_draws_the_same_bits_in_any_batch(name: str, device: str) -> None:
    augmentation = AUGMENTATIONS.get(name)((20, 33, 3))
    words = RandomWords(0, "train", {0: augmentation.words})(torch.arange(999))[0]
    alone = torch.stack([augmentation.draw(row) for row in words])
    assert torch.equal(augmentation.draw(words.to(device)).cpu(), alone)


# ---- distributions ----


def test_crops_and_flips_are_uniform() -> None:
    for augmentation, choices in ((Crop((32, 48, 3)), (9, 13)), (Flip((32, 48, 3)), (2,))):
        parameters = drawn(augmentation, DRAWS).numpy()
        assert parameters.shape == (DRAWS, len(choices))
        flat, cells = np.ravel_multi_index(parameters.T, choices), math.prod(choices)
        expected = DRAWS / cells
        square = ((np.bincount(flat, minlength=cells) - expected) ** 2 / expected).sum()
        assert square < cells - 1 + 5 * math.sqrt(2 * (cells - 1)), (
            "chi-square of all pairs, within 5 standard deviations"
        )


def test_factors_of_jitter_are_uniform_and_independent() -> None:
    factors = drawn(Jitter((32, 32, 3)), DRAWS).numpy()
    for column in factors.T:
        assert stats.kstest(column, stats.uniform(0.6, 0.8).cdf).statistic < CHANCE / math.sqrt(DRAWS)
    correlations = np.corrcoef(factors.T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 4 / math.sqrt(DRAWS)


@pytest.mark.parametrize("shape", [(32, 32, 3), (20, 40, 1)])
@pytest.mark.parametrize(("make", "area", "ratio"), [(ResizedCrop, (0.2, 1.0), 4 / 3), (Erase, (0.02, 0.33), 1 / 0.3)])
def test_boxes_are_torchvision_draws_cut_to_the_image(make: type, area: tuple, ratio: float, shape: tuple) -> None:
    boxes = drawn(make(shape), 2 * DRAWS).numpy()
    if make is Erase:
        assert abs((boxes[:, 2] == 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(2 * DRAWS), (
            "half of the images are left alone"
        )
        boxes = boxes[boxes[:, 2] > 0]
    top, left, high, wide = boxes.T
    (height, width, _), rng, n = shape, np.random.default_rng(0), 200_000
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + high).max() <= height + 1e-4
    assert (left + wide).max() <= width + 1e-4
    # torchvision's draw: a uniform area and the exponential of a uniform number as ratio
    size, turn = (
        rng.uniform(area[0], area[1], n) * height * width,
        np.exp(rng.uniform(-math.log(ratio), math.log(ratio), n)),
    )
    far = CHANCE / math.sqrt(len(boxes))
    for ours, theirs in (
        (high, np.minimum(np.sqrt(size * turn), height)),
        (wide, np.minimum(np.sqrt(size / turn), width)),
    ):
        assert stats.ks_2samp(ours, theirs).statistic < far * 1.1  # 1.1: for the finite sample of theirs
    free = (high < height) & (wide < width)
    for place in (top[free] / (height - high[free]), left[free] / (width - wide[free])):
        assert stats.kstest(place, "uniform").statistic < CHANCE / math.sqrt(free.sum())


def test_episodes_take_all_of_them() -> None:
    bank, config = make_bank([9, 14, 30, 8, 11]), Config.of(ways=3, shot=2, query=2, augmentations=NAMES)
    batch, plain = (sample_episodes(bank, c, "train", 5, 4) for c in (config, config.replace(augment=False)))
    assert batch.images.shape == plain.images.shape
    assert batch.images.isfinite().all()
    assert not (batch.images == plain.images).flatten(2).all(2).any(), "every image is changed"
    mean, std = (torch.tensor(s)[:, None, None] for s in (bank.mean, bank.std))
    pixels = batch.images * std + mean
    assert -0.01 < pixels.min() < pixels.max() < 255.01
    assert torch.equal(batch.images[1:2], sample_episodes(bank, config, "train", 6, 1).images)
