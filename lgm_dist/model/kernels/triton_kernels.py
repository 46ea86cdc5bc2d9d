"""The kernels of `fused_block`, in Triton's language; imported only if Triton and a GPU are there.

Names in capitals are compile-time constants: F, H, W are channels, height and width of the map; a tile is BLOCK rows of
CHANNELS channels. Triton evaluates annotations, and `tl` is the only name that they may use.
"""

import triton
import triton.language as tl

_jit = triton.jit(do_not_specialize=["rows", "each", "programs", "pixels"])  # one kernel serves all of these counts


@_jit
def moments(
    y, partial, rows, each, F: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean of a program's rows and sum of squared distances from it: Welford for each place of a tile, then Chan et al."""
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


@_jit
def combine_moments(
    partial, conv_bias, running_mean, running_var, mean, inverse_std, momentum, epsilon, rows, each, programs,
    F: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Chan et al. over the programs. An infinite variance gives NaN, not zero, as the normalised value."""
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


@_jit
def apply(
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


@_jit
def gradient_sums(
    peaks, grad, mean, inverse_std, weight, bias, partial, rows, each,
    F: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums over a program's rows: of the gradient that ReLU lets through, and of that times (peak - mean)."""
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


@_jit
def combine_gradient_sums(
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


@_jit
def input_gradient(
    y, mean, inverse_std, weight, bias, grad_weight, grad_bias, grad, grad_y, pixels, rows,
    F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """weight / std * (gradient at the peak - its mean - normalised y * mean of gradient * normalised y), as in Norm."""
    row, channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channels < F)[None, :]
    offset = row.to(tl.int64)[:, None] * F + channels[None, :]
    through = tl.load(grad + offset, inside, 0).to(tl.float32)
    if POOL:  # load the map before the per-channel numbers, which the rest waits for
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


@_jit
def _per_channel(mean, inverse_std, weight, bias, channels, F: tl.constexpr):
    """Mean, scale, shift and the scale's sign (-1, 0 or 1), (1, CHANNELS) each."""
    there = channels < F
    weights = tl.load(weight + channels, there)
    scale = weights * tl.load(inverse_std + channels, there)
    sign = tl.where(weights > 0, 1.0, tl.where(weights < 0, -1.0, 0.0))
    center, shift = tl.load(mean + channels, there), tl.load(bias + channels, there)
    return center[None, :], scale[None, :], shift[None, :], sign[None, :]


@_jit
def _normalised(value: tl.tensor, center: tl.tensor, scale: tl.tensor, shift: tl.tensor) -> tl.tensor:
    return (value - center) * scale + shift


@_jit
def _window(y, row, channels, inside, F: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Offset of a window's first pixel, whether it has pixels to the right and below, and its four pixels in row-major order.

    A window at the edge has fewer pixels and repeats those that it has; a repeated pixel is never the first largest one.
    """
    line, x = row // ((W + 1) // 2), row % ((W + 1) // 2) * 2
    image, top = line // ((H + 1) // 2), line % ((H + 1) // 2) * 2
    right, below = ((x + 1 < W) | (W % 2 == 0))[:, None], ((top + 1 < H) | (H % 2 == 0))[:, None]
    first = ((image * H + top) * W + x).to(tl.int64)[:, None] * F + channels[None, :]
    step, line_step = right.to(tl.int32) * F, below.to(tl.int32) * (W * F)  # a multiple of F lets loads be wide
    a, b = tl.load(y + first, inside, 0), tl.load(y + first + step, inside, 0)
    c, d = tl.load(y + first + line_step, inside, 0), tl.load(y + first + line_step + step, inside, 0)
    return first, right, below, a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@_jit
def _lower_then_right(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, sign: tl.tensor) -> tl.tensor:
    """For pixels a, b above c, d: whether the first largest is in the lower row, and for each row whether it is the right."""
    a, b, c, d = a * sign, b * sign, c * sign, d * sign
    return tl.maximum(c, d) > tl.maximum(a, b), b > a, d > c
