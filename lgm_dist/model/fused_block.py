"""What follows a convolution of the extractor, on one GPU in training: batch norm, ReLU and 2 x 2 max-pool, in Triton.

Plain operations pass over the feature map about ten times, and every pass waits for memory. Here the map is read twice on
the way forward (statistics; normalise, ReLU and pool) and once on the way back, where its gradient is written:

- A window's largest normalised value is where the map is largest, or smallest under a negative scale. That value of the
  map, the window's peak, is kept, so that the sums of the backward pass run over peaks: a quarter of the map.
- Which of the four it was, and whether ReLU let it through, is found again from the map.

No atomic operations: programs write partial results, which one kernel combines in a fixed order, so that the same input
gives the same bits. Nothing waits for the device: a CUDA graph can capture all of it. The arithmetic is in float32.

Triton is imported by the first call of `available` that needs it: the package does without it, and so does a CPU.

Shapes: n images, F filters, h x w pixels. In memory a map is a matrix (rows, F) whose rows are its n * h * w pixels.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lgm_dist.model.norm import Norm

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

PROGRAMS = 512
"""At most so many partial results: about four programs for each of an H200's 132 multiprocessors, and a power of two."""
_DTYPES = (torch.float32, torch.bfloat16)


def available(x: Tensor) -> bool:
    """Whether `norm_relu_pool` takes tensors of x's device and type: those of CUDA, or any under TRITON_INTERPRET=1."""
    if x.dtype not in _DTYPES:
        return False
    return _load() and _starts() if x.is_cuda else os.environ.get("TRITON_INTERPRET") == "1" and _load()


def norm_relu_pool(y: Tensor, conv_bias: Tensor, norm: Norm, pool: bool) -> Tensor:
    """y (n, F, h, w), a convolution's output without its bias (F,) -> (n, F, ceil(h / 2), ceil(w / 2)), or (n, F, h, w)
    where `pool` is False; of y's type, channels last in memory.

    Normalisation takes the bias off again: it only moves the running mean, and its gradient is zero. Wants `available(y)`,
    and a `norm` in training, of kind batch, not per episode, with no other worker.
    """
    assert available(y)
    assert norm.training
    assert norm.kind == "batch"
    assert norm.scope != "episode"
    assert norm.all_reduce is None
    out: Tensor = _NormReluPool.apply(y, conv_bias, norm.weight, norm.bias, norm, pool)
    return out


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, norm: Norm, pool: bool) -> Tensor:
        assert y.numel() < 2**30 * y.shape[1], "rows are counted in 32 bits"
        assert {t.dtype for t in (conv_bias, weight, bias, norm.running_mean, norm.running_var)} == {torch.float32}
        y = y.contiguous(memory_format=torch.channels_last)
        n, filters, height, width = y.shape
        size = (n, -(-height // 2), -(-width // 2), filters) if pool else (n, height, width, filters)
        out = y.new_empty(size).permute(0, 3, 1, 2)  # (n, F, ceil(h / 2), ceil(w / 2)) or (n, F, h, w), channels last
        peaks = torch.empty_like(out) if pool else y
        with torch.cuda.device_of(y):
            mean, inverse_std = _normalisation(y, conv_bias, norm)  # (F,)
            _on_windows(_apply, y, out, pool, mean, inverse_std, weight, bias, out, peaks)
        ctx.save_for_backward(y, peaks, mean, inverse_std, weight, bias)
        ctx.pool = pool
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, peaks, mean, inverse_std, weight, bias = ctx.saved_tensors
        norm = mean, inverse_std, weight, bias
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_y, grad_weight, grad_bias = torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias)
        with torch.cuda.device_of(y):
            partial, _ = _partial_results(_gradient_sums, peaks, grad, *norm)
            _combine(_combine_gradient_sums, partial, inverse_std, grad_weight, grad_bias)
            _on_windows(_input_gradient, y, grad, ctx.pool, *norm, grad_weight, grad_bias, grad, grad_y, _rows(y))
        return grad_y, torch.zeros_like(grad_bias), grad_weight, grad_bias, None, None


def _normalisation(y: Tensor, conv_bias: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation (F,) of y (n, F, h, w); moves the averages."""
    found = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_var)
    partial, each = _partial_results(_moments, y)
    settings = (float(norm.momentum), float(norm.epsilon), _rows(y), each)
    _combine(_combine_moments, partial, conv_bias, norm.running_mean, norm.running_var, *found, *settings)
    return found


def _partial_results(kernel: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, int]:
    """Two numbers a channel from each program: (programs, 2, F). And how many rows of x (n, F, h, w) a program takes.

    A tile has 8 KiB and the next two are always on their way: with four programs on a multiprocessor that is 64 KiB, about
    twice what an H200's memory can bring in the time that it takes to answer.
    """
    filters, rows, channels = x.shape[1], _rows(x), _channels(x)
    tile = 8192 // (channels * x.element_size())
    each = -(-rows // min(PROGRAMS, -(-rows // tile)))
    programs = -(-rows // each)
    partial = x.new_empty(programs, 2, filters, dtype=torch.float32)
    grid = (programs, -(-filters // channels))
    _run(kernel, grid, 8, x, *tensors, partial, rows, each, filters, tile, channels)
    return partial, each


def _combine(kernel: Any, partial: Tensor, *arguments: Tensor | float) -> None:
    """Eight channels a program, as memory hands out 32 bytes at least: one program for all would be slower."""
    programs, _, filters = partial.shape
    _run(kernel, (-(-filters // 8),), 8, partial, *arguments, programs, filters, _power_of_two(programs), 8)


def _on_windows(kernel: Any, y: Tensor, pooled: Tensor, pool: bool, *arguments: Tensor | int) -> None:
    """Runs over the windows of y (n, F, h, w), of which `pooled` has one value each, or over its pixels.

    A tile has eight values a thread of each of a window's four pixels: all are asked for at once, and the registers are few
    enough for five programs or more on a multiprocessor.
    """
    filters, rows, channels = y.shape[1], _rows(pooled), _channels(y)
    tile = 1024 // channels
    grid = (-(-rows // tile), -(-filters // channels))
    _run(kernel, grid, 4, y, *arguments, rows, filters, *y.shape[2:], pool, tile, channels)


def _run(kernel: Any, grid: tuple[int, ...], warps: int, *arguments: Tensor | float) -> None:
    kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=True)  # the default, but not from Triton 3.10 on


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _channels(x: Tensor) -> int:
    """Of a tile: a power of two, as Triton wants it."""
    return min(_power_of_two(x.shape[1]), 64)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@functools.cache
def _load() -> bool:
    """Imports Triton, where it is installed, and compiles the functions below, each when it is first used."""
    try:
        import triton
        from triton import language
    except ImportError:
        return False
    kernels = (_moments, _combine_moments, _apply, _gradient_sums, _combine_gradient_sums, _input_gradient)
    counts = ("rows", "each", "programs", "pixels")  # one kernel serves all of them
    for function in (_per_channel, _normalised, _window, _lower_then_right, *kernels):
        globals()[function.__name__] = triton.jit(function, do_not_specialize=counts)
    globals()["tl"] = language
    return True


@functools.cache
def _starts() -> bool:
    """Whether a kernel runs on this machine's GPU: what starts the first is built with its C compiler, which may be missing."""
    try:
        _partial_results(_moments, torch.zeros(1, 1, 1, 1, device="cuda"))
    except Exception as error:
        log.warning("Triton does not work here, and training is slower without it: %s", error)
        return False
    return True


# From here on it is Triton's language. Capitals are known when a kernel is compiled; F, H, W: filters, height, width of the
# map; a tile is BLOCK rows of CHANNELS channels. Annotations are evaluated: `tl` is the only name that they may use.


def _moments(  # type: ignore[no-untyped-def]
    y, partial, rows, each, F: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean and squared distances from it of a program's rows: Welford's for each place of the tile, then Chan et al.'s."""
    places, channels = tl.arange(0, BLOCK), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    size = tl.minimum(rows - tl.program_id(0) * each, each)
    y += tl.program_id(0).to(tl.int64) * each * F
    mean = tl.zeros([BLOCK, CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=3):
        row = start + places
        inside = (row < size)[:, None] & (channels < F)[None, :]
        value = tl.load(y + row[:, None] * F + channels[None, :], inside, 0).to(tl.float32)
        distance = tl.where(inside, value - mean, 0)
        mean += distance * (1.0 / (start // BLOCK + 1))
        squares += distance * (value - mean)
    counts = ((size - places + BLOCK - 1) // BLOCK).to(tl.float32)[:, None]
    together = tl.sum(counts * mean, 0) / size
    apart = mean - together[None, :]
    partial += tl.program_id(0) * 2 * F + channels
    tl.store(partial, together, channels < F)
    tl.store(partial + F, tl.sum(squares + counts * apart * apart, 0), channels < F)


def _combine_moments(  # type: ignore[no-untyped-def]
    partial, conv_bias, running_mean, running_var, mean, inverse_std, momentum, epsilon, rows, each, programs,
    F: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Chan et al. again, over the programs. Where the variance is infinite, what it would normalise to zero shall be NaN."""
    program, channels = tl.arange(0, PARTS), tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channels < F
    inside = (program < programs)[:, None] & there[None, :]
    partial += program[:, None] * (2 * F) + channels[None, :]
    means, squares = tl.load(partial, inside, 0), tl.load(partial + F, inside, 0)
    counts = tl.maximum(tl.minimum(rows - program * each, each), 0).to(tl.float32)[:, None]
    together = tl.sum(counts * means, 0) / rows
    apart = means - together[None, :]
    square = tl.sum(squares + counts * apart * apart, 0)
    var = square / rows
    tl.store(mean + channels, together, there)
    tl.store(inverse_std + channels, tl.where(var < float("inf"), tl.rsqrt(var + epsilon), float("nan")), there)
    average = tl.load(running_mean + channels, there)
    with_bias = together + tl.load(conv_bias + channels, there)
    tl.store(running_mean + channels, average + momentum * (with_bias - average), there)
    average = tl.load(running_var + channels, there)
    tl.store(running_var + channels, average + momentum * (square / tl.maximum(rows - 1, 1) - average), there)


def _apply(  # type: ignore[no-untyped-def]
    y, mean, inverse_std, weight, bias, out, peaks, rows,
    F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channels < F)[None, :]
    offset = row.to(tl.int64)[:, None] * F + channels[None, :]
    if POOL:
        _, _, _, a, b, c, d = _window(y, row, channels, inside, F, H, W)
    else:
        peak = tl.load(y + offset, inside, 0).to(tl.float32)
    center, scale, shift, sign = _per_channel(mean, inverse_std, weight, bias, channels, F)
    if POOL:
        low, right_above, right_below = _lower_then_right(a, b, c, d, sign)
        peak = tl.where(low, tl.where(right_below, d, c), tl.where(right_above, b, a))
        tl.store(peaks + offset, peak, inside)
    value = _normalised(peak, center, scale, shift)
    tl.store(out + offset, tl.where(value <= 0, 0, value), inside)


def _gradient_sums(  # type: ignore[no-untyped-def]
    peaks, grad, mean, inverse_std, weight, bias, partial, rows, each,
    F: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of a program's rows: sums of what ReLU lets through of the gradient, and of that times the peak less the mean."""
    places, channels = tl.arange(0, BLOCK), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    center, scale, shift, _ = _per_channel(mean, inverse_std, weight, bias, channels, F)
    size = tl.minimum(rows - tl.program_id(0) * each, each)
    first = tl.program_id(0).to(tl.int64) * each * F
    total = tl.zeros([BLOCK, CHANNELS], tl.float32)
    product = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=3):
        row = start + places
        inside = (row < size)[:, None] & (channels < F)[None, :]
        offset = row[:, None] * F + channels[None, :]
        peak = tl.load(peaks + first + offset, inside, 0).to(tl.float32)
        through = tl.load(grad + first + offset, inside, 0).to(tl.float32)
        through = tl.where(_normalised(peak, center, scale, shift) <= 0, 0, through)
        total += through
        product += through * (peak - center)
    partial += tl.program_id(0) * 2 * F + channels
    tl.store(partial, tl.sum(total, 0), channels < F)
    tl.store(partial + F, tl.sum(product, 0), channels < F)


def _combine_gradient_sums(  # type: ignore[no-untyped-def]
    partial, inverse_std, grad_weight, grad_bias, programs,
    F: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, channels = tl.arange(0, PARTS), tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channels < F
    inside = (program < programs)[:, None] & there[None, :]
    partial += program[:, None] * (2 * F) + channels[None, :]
    products = tl.sum(tl.load(partial + F, inside, 0), 0)
    tl.store(grad_bias + channels, tl.sum(tl.load(partial, inside, 0), 0), there)
    tl.store(grad_weight + channels, products * tl.load(inverse_std + channels, there), there)


def _input_gradient(  # type: ignore[no-untyped-def]
    y, mean, inverse_std, weight, bias, grad_weight, grad_bias, grad, grad_y, pixels, rows,
    F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """weight / std * (gradient at the peak - its mean - normalised y * mean of gradient * normalised y), as Norm has it."""
    row, channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channels < F)[None, :]
    offset = row.to(tl.int64)[:, None] * F + channels[None, :]
    through = tl.load(grad + offset, inside, 0).to(tl.float32)
    if POOL:  # all of the map is asked for before anything waits for a channel's numbers
        first, right, below, a, b, c, d = _window(y, row, channels, inside, F, H, W)
    else:
        value = tl.load(y + offset, inside, 0).to(tl.float32)
    center, scale, shift, sign = _per_channel(mean, inverse_std, weight, bias, channels, F)
    there = channels < F
    constant = -scale * tl.load(grad_bias + channels, there)[None, :] / pixels
    slope = -scale * (tl.load(inverse_std + channels, there) * tl.load(grad_weight + channels, there))[None, :] / pixels
    if POOL:
        low, right_above, right_below = _lower_then_right(a, b, c, d, sign)
        peak = tl.where(low, tl.where(right_below, d, c), tl.where(right_above, b, a))
        through = tl.where(_normalised(peak, center, scale, shift) <= 0, 0, through * scale)
        above, under = tl.where(low, 0, through), tl.where(low, through, 0)
        to = grad_y + first
        tl.store(to, (a - center) * slope + constant + tl.where(right_above, 0, above), inside)
        tl.store(to + F, (b - center) * slope + constant + tl.where(right_above, above, 0), inside & right)
        to += W * F
        tl.store(to, (c - center) * slope + constant + tl.where(right_below, 0, under), inside & below)
        tl.store(to + F, (d - center) * slope + constant + tl.where(right_below, under, 0), inside & right & below)
    else:
        through = tl.where(_normalised(value, center, scale, shift) <= 0, 0, through * scale)
        tl.store(grad_y + offset, (value - center) * slope + constant + through, inside)


def _per_channel(mean, inverse_std, weight, bias, channels, F: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean, scale and shift (1, CHANNELS), and the scale's sign: -1, 0 or 1."""
    there = channels < F
    weights = tl.load(weight + channels, there)
    scale = weights * tl.load(inverse_std + channels, there)
    sign = tl.where(weights > 0, 1.0, tl.where(weights < 0, -1.0, 0.0))
    center, shift = tl.load(mean + channels, there), tl.load(bias + channels, there)
    return center[None, :], scale[None, :], shift[None, :], sign[None, :]


def _normalised(value: tl.tensor, center: tl.tensor, scale: tl.tensor, shift: tl.tensor) -> tl.tensor:
    return (value - center) * scale + shift


def _window(y, row, channels, inside, F: tl.constexpr, H: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offset of a window's first pixel, whether it has some to the right and below, and its four in row-major order.

    Where it is cut the pixels that it lacks are those it has once more: second, they never are the first largest.
    """
    line, x = row // ((W + 1) // 2), row % ((W + 1) // 2) * 2
    image, top = line // ((H + 1) // 2), line % ((H + 1) // 2) * 2
    right, below = ((x + 1 < W) | (W % 2 == 0))[:, None], ((top + 1 < H) | (H % 2 == 0))[:, None]
    first = ((image * H + top) * W + x).to(tl.int64)[:, None] * F + channels[None, :]
    step, line_step = right.to(tl.int32) * F, below.to(tl.int32) * (W * F)  # a multiple of F lets loads be wide
    a, b = tl.load(y + first, inside, 0), tl.load(y + first + step, inside, 0)
    c, d = tl.load(y + first + line_step, inside, 0), tl.load(y + first + line_step + step, inside, 0)
    return first, right, below, a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


def _lower_then_right(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, sign: tl.tensor) -> tl.tensor:
    """Of a, b above c, d: whether the first largest is below, and whether the right one is it, above and below."""
    a, b, c, d = a * sign, b * sign, c * sign, d * sign
    return tl.maximum(c, d) > tl.maximum(a, b), b > a, d > c
