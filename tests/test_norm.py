"""Normalisation against torch's layers; over several workers against BatchNorm2d on all their images together.

The workers here are threads whose all_reduce sums in the order of the ranks; tests/test_workers.py has real processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from helpers.threads import Threads
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model import AllReduce, Norm

FILTERS = 8
T = TypeVar("T")


def make(dtype: torch.dtype = torch.float64, **options: Any) -> Norm:
    """With random scale and shift."""
    return set_affine(Norm(ModelConfig(filters=FILTERS, **options), FILTERS).to(dtype))


def set_affine(layer: T) -> T:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(torch.randn(FILTERS, generator=generator, dtype=torch.float64))
    return layer


def batch_norm(dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    return set_affine(nn.BatchNorm2d(FILTERS, eps=1e-3, momentum=0.01).to(dtype))


def draw(n: int, seed: int = 0, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Images and a gradient for them, (n, F, 5, 4); channels differ in mean and spread, images in mean."""
    generator = torch.Generator().manual_seed(seed)
    x, grad, offset = (torch.randn(n, FILTERS, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    spread = torch.linspace(0.1, 3, FILTERS, dtype=torch.float64)[:, None, None]
    return x * spread + offset[..., :1, :1] + spread + mean, grad


def step(layer: Callable[..., Tensor], x: Tensor, grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Output and gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x, *arguments)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)
    return [y.detach(), *gradients]


def assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor], bound: float = 1e-12) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).detach().abs().max() <= bound * max(1.0, float(b.detach().abs().max()))


def averages(layer: Norm | nn.BatchNorm2d) -> list[Tensor]:
    return [layer.running_mean, layer.running_var]


def over_workers(
    batches: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int], dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[list[list[Tensor]], list[Norm]]:
    """Each batch is split into `sizes` images for the workers. Returns the joined steps (outputs and input gradients
    concatenated, parameter gradients summed) and every worker's layer."""

    def work(rank: int, all_reduce: AllReduce) -> tuple[list[list[Tensor]], Norm]:
        norm = make(dtype, **options)
        norm.all_reduce = all_reduce
        return [
            step(norm, x.to(dtype).split(list(sizes))[rank], g.to(dtype).split(list(sizes))[rank], 1)
            for x, g in batches
        ], norm

    steps, layers = zip(*Threads(len(sizes)).run(work), strict=True)
    joined = []
    for of_workers in zip(*steps, strict=True):
        y, grad_x, grad_weight, grad_bias = zip(*of_workers, strict=True)
        joined.append([torch.cat(y), torch.cat(grad_x), sum(grad_weight), sum(grad_bias)])
    return joined, list(layers)


@pytest.mark.parametrize("scope", ["global", "worker"])
def test_one_worker_is_batch_norm(scope: str) -> None:
    ours, expected = make(norm_scope=scope), batch_norm()
    for seed in range(5):
        x, grad = draw(6, seed)
        assert_close(step(ours, x, grad, 3), step(expected, x, grad))
        assert_close(averages(ours), averages(expected))
    assert not torch.allclose(ours.running_mean, torch.zeros(FILTERS, dtype=torch.float64))
    ours.eval(), expected.eval()
    x, grad = draw(6, 99)
    assert_close(step(ours, x, grad, 3), step(expected, x, grad))


def test_decay_and_epsilon_are_the_configuration_s() -> None:
    ours, expected = make(norm_decay=0.7, norm_epsilon=0.2), nn.BatchNorm2d(FILTERS, eps=0.2, momentum=0.3)
    expected = set_affine(expected.double())
    x, grad = draw(4)
    assert_close(step(ours, x, grad, 2), step(expected, x, grad))
    assert_close(averages(ours), averages(expected))


@pytest.mark.parametrize("scope", ["global", "worker", "episode"])
def test_evaluation_uses_the_moving_averages_and_leaves_them(scope: str) -> None:
    norm = make(norm_scope=scope)
    with torch.no_grad():
        norm.running_mean.fill_(2.0)
        norm.running_var.fill_(8.999)
    norm.eval()
    norm.all_reduce = lambda _: pytest.fail("evaluation must not wait for other workers")
    x = draw(4)[0]
    by_hand = (x - 2) / 3 * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert_close([norm(x, 2)], [by_hand])
    assert norm.running_mean.tolist() == [2.0] * FILTERS
    assert norm.running_var.tolist() == [8.999] * FILTERS


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_group_instance_and_layer_norm(training: bool) -> None:
    x, grad = draw(4)
    layers = {
        ("group", 2): set_affine(nn.GroupNorm(2, FILTERS, eps=1e-3).double()),
        ("group", 4): set_affine(nn.GroupNorm(4, FILTERS, eps=1e-3).double()),
        ("instance", 8): set_affine(nn.InstanceNorm2d(FILTERS, eps=1e-3, affine=True).double()),
    }
    for (kind, groups), expected in layers.items():
        ours = make(norm=kind, norm_groups=groups).train(training)
        assert_close(step(ours, x, grad, 2), step(expected, x, grad))
    ours = make(norm="layer").train(training)
    plain = F.layer_norm(x, x.shape[1:], eps=1e-3)
    assert_close([ours(x, 2)], [plain * ours.weight[:, None, None] + ours.bias[:, None, None]])


@pytest.mark.parametrize("episodes", [1, 3])
def test_episode_scope_is_a_batch_norm_for_each_episode(episodes: int) -> None:
    ours = make(norm_scope="episode")
    running = [torch.zeros(FILTERS, dtype=torch.float64), torch.ones(FILTERS, dtype=torch.float64)]
    for seed in range(3):
        x, grad = draw(4 * episodes, seed)
        alone = [batch_norm() for _ in range(episodes)]
        steps = [step(*args) for args in zip(alone, x.chunk(episodes), grad.chunk(episodes), strict=True)]
        y, grad_x, grad_weight, grad_bias = zip(*steps, strict=True)
        expected = [torch.cat(y), torch.cat(grad_x), sum(grad_weight), sum(grad_bias)]
        assert_close(step(ours, x, grad, episodes), expected)
        # A new BatchNorm2d moves a hundredth of the way from its start, 0 or 1, to its episode's statistic;
        # ours moves towards the mean of the episodes' statistics.
        for value, start, which in zip(running, (0.0, 1.0), ("running_mean", "running_var"), strict=True):
            statistics = [start + (getattr(layer, which) - start) / 0.01 for layer in alone]
            value.mul_(0.99).add_(sum(statistics) / episodes, alpha=0.01)
        assert_close(averages(ours), running)


# Images of each worker. In training all workers have about as many, but the statistics do not depend on it.
SIZES = [(4, 4), (2, 2, 2, 2), (3, 3, 2), (1, 7), (12, 1, 5)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_global_scope_is_batch_norm_on_all_workers_images(sizes: tuple[int, ...]) -> None:
    batches = [draw(sum(sizes), seed) for seed in range(4)]
    joined, layers = over_workers(batches, sizes)
    expected = batch_norm()
    for ours, (x, grad) in zip(joined, batches, strict=True):
        assert_close(ours, step(expected, x, grad))
    for layer in layers:
        assert_close(averages(layer), averages(expected))
        assert all(map(torch.equal, averages(layer), averages(layers[0])))  # the same bits on every worker


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_global_scope_with_large_means_in_float32(memory: torch.memory_format) -> None:
    """Means of 1e4 with standard deviations of about 1 to 3: squares in float32 would lose the variance altogether.

    The error of a float32 result is its distance from float64 on the same images; it may be three times that of torch's
    float32 kernel on contiguous images. (Measured: output 3.7e-5 against 5.1e-5, gradient of the images 2.8e-5 against
    1.2e-5, moving variance 1.7e-6 against 5e-8. On channels_last images torch's error is 20 times larger.)
    """
    x, grad = (t.float() for t in draw(24, mean=1e4))
    x = x.contiguous(memory_format=memory)
    truth_layer, native_layer = batch_norm(), batch_norm(torch.float32)
    truth, native = step(truth_layer, x.double(), grad.double()), step(native_layer, x.contiguous(), grad)
    joined, layers = over_workers([(x, grad)], (8, 16), torch.float32)
    native += averages(native_layer)
    truth += averages(truth_layer)
    for ours, theirs, exact in zip(joined[0] + averages(layers[0]), native, truth, strict=True):
        scale = float(exact.abs().max())
        error, usual = (float((t - exact).abs().max()) / scale for t in (ours.double(), theirs.double()))
        assert error <= max(3 * usual, 2e-6)


def test_global_scope_of_huge_constant_images() -> None:
    """Mean square - square of the mean is rounding error here, -4 to 4; a negative variance would make everything NaN."""
    x = 1e8 * torch.linspace(1, 2, 8, dtype=torch.float64).sqrt()[:, None, None].expand(6, FILTERS, 5, 4)
    joined, layers = over_workers([(x, torch.ones_like(x))], (1, 3, 2))
    y, *gradients = joined[0]
    assert (y - make().bias[:, None, None]).abs().max() < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert layers[0].running_var.min() >= 0.99


@pytest.mark.parametrize("scope", ["worker", "episode"])
def test_other_scopes_normalise_a_slice_alone_but_keep_common_averages(scope: str) -> None:
    """The averages follow the mean of the workers' statistics, so every worker evaluates the same network."""
    batches = [draw(8, seed) for seed in range(3)]
    joined, layers = over_workers(batches, (4, 4), norm_scope=scope)
    running = [torch.zeros(FILTERS, dtype=torch.float64), torch.ones(FILTERS, dtype=torch.float64)]
    for ours, (x, grad) in zip(joined, batches, strict=True):
        alone = [batch_norm(), batch_norm()]
        steps = [step(*args) for args in zip(alone, x.chunk(2), grad.chunk(2), strict=True)]
        y, grad_x, grad_weight, grad_bias = zip(*steps, strict=True)
        assert_close(ours, [torch.cat(y), torch.cat(grad_x), sum(grad_weight), sum(grad_bias)])
        for value, which in zip(running, ("running_mean", "running_var"), strict=True):
            statistic = [(getattr(n, which) - 0.99 * getattr(batch_norm(), which)) / 0.01 for n in alone]
            value.mul_(0.99).add_(sum(statistic) / 2, alpha=0.01)
    for layer in layers:
        assert_close(averages(layer), running, 1e-11)  # a hundred times the rounding of the statistics
        assert all(map(torch.equal, averages(layer), averages(layers[0])))


def test_gradient_of_the_global_scope_numerically() -> None:
    """Central differences over two workers: a value of one worker changes the output of both."""
    x, grad = draw(4)

    def objective(moved: Tensor) -> float:
        joined, _ = over_workers([(moved, grad)], (2, 2))
        return float((joined[0][0] * grad).sum())

    gradient = over_workers([(x, grad)], (2, 2))[0][0][1]
    for index in [(0, 0, 0, 0), (3, 5, 2, 1), (1, 7, 4, 3)]:
        up, down = x.clone(), x.clone()
        up[index] += 1e-5
        down[index] -= 1e-5
        assert (objective(up) - objective(down)) / 2e-5 == pytest.approx(float(gradient[index]), rel=1e-6, abs=1e-8)
