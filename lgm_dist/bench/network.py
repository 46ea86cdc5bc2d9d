"""The cost of the network: its steps against a plain implementation and the machine's own rates, memory, growth."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lgm_dist.bench.measure import Section, Spread, in_turn, plain, ratio
from lgm_dist.bench.steps import REFERENCE, StepSetup, contender
from lgm_dist.config import ModelConfig

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))
STEP_HEADER = (
    *("episodes", "lgm_dist (episodes/s)", "plain (episodes/s)", "faster by", "of it by kernels"),
    *("difference of the losses", "bf16 to float32"),
)
Loss = dict[str, float]


def step(rounds: int, settings: tuple[tuple[int, int], ...] = SETTINGS) -> Section:
    """Time our training step against that of the plain network, with one query an episode as in the authors' code.

    Raises ValueError if the plain network is missing.
    """
    if not REFERENCE.exists():
        raise ValueError(
            f"the plain network ({REFERENCE}) is missing; run the benchmark in a checkout of the repository"
        )
    kinds = ["ours", "plain", "plain-kept"]
    if torch.cpu._is_avx512_bf16_supported():
        kinds.append("ours-bf16")
    rows, values = [], {}
    for ways, shot in settings:
        ours = StepSetup("ours", ways, shot)
        found, losses = race({kind: replace(ours, kind=kind) for kind in kinds}, rounds)
        # apart from the others: all of them at once need more than 24 GiB at 20-way 5-shot
        kernels, _ = race({kind: replace(ours, kind=kind) for kind in ("ours", "ours-reference")}, rounds)
        speed = {kind: spread.each(lambda seconds: StepSetup.meta_batch / seconds) for kind, spread in found.items()}
        faster, kept = ratio(found["plain"], found["ours"]), ratio(found["plain-kept"], found["ours"])
        apart = abs(losses["ours"] - losses["plain"])
        name = f"{ways}-way {shot}-shot"
        half = ratio(found["ours"], found["ours-bf16"]).text(2) if "ours-bf16" in found else "no AVX512-BF16"
        against = f"{faster.text(2)} ({kept.median:.2f})"
        by_kernels = ratio(kernels["ours-reference"], kernels["ours"])
        rows.append(
            (name, speed["ours"].text(), speed["plain"].text(), against, by_kernels.text(2), f"{apart:.1e}", half)
        )
        values[name] = {
            "seconds": plain(found),
            "faster": faster.values,
            "faster_kept": kept.values,
            "faster_by_kernels": by_kernels.values,
            "loss": apart,
        }
    note = (
        f"Meta-batch 32, 32 x 32 pixels, {StepSetup('ours').threads} threads, float32; median [smallest, largest] of {rounds} "
        "rounds in turn, each contender in its own process. plain: PyTorch without tuning, a loop over episodes, NCHW. "
        "In brackets: the ratio if the plain process keeps freed memory too, as our training does. By kernels: the ratio to "
        "our step with model.kernels reference."
    )
    return Section("step", "lgm-dist bench step", STEP_HEADER, rows, note, values)


def race(contenders: Mapping[str, StepSetup], rounds: int) -> tuple[dict[str, Spread], Loss]:
    """Seconds of a step of each contender, and the loss of its first step."""
    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(contender(c)) for name, c in contenders.items()}
        losses: Loss = {}

        def timed(name: str) -> Callable[[], float]:
            def take() -> float:
                found = steps[name]()
                losses.setdefault(name, found["loss"])
                return found["seconds"]

            return take

        return in_turn({name: timed(name) for name in contenders}, rounds), losses


def flops(steps: StepSetup, model: ModelConfig | None = None) -> int:
    """FLOPs of an episode, forward and backward: 2 for a multiply-add, convolutions and matrix products only."""
    model = model or ModelConfig()
    f, support = model.filters, steps.ways * steps.shot
    images = support + steps.queries

    def conv(side: int, inputs: int, outputs: int = f) -> int:
        return 2 * 9 * inputs * outputs * side * side

    half = [steps.size]
    for _ in range(5):
        half.append(-(-half[-1] // 2))
    first = images * conv(half[0], model.channels or 3)
    extractor = images * (conv(half[1], f) + conv(half[2], f) + conv(half[3], f))
    encoder = support * (conv(half[3], f) + conv(half[4], f) + conv(half[5], f, 2 * model.noise_size))
    generator = 2 * 2 * model.noise_size * (9 * f + 1) * f
    matching = images * (conv(half[3], f) + conv(half[4], f))
    cosine = 2 * support * steps.queries * f * half[4] ** 2
    return 2 * first + 3 * (extractor + encoder + generator + matching + cosine)


def floor(rounds: int) -> Section:
    """Compare a step with the time of its FLOPs at the rate of torch's best convolution on this machine."""
    steps = StepSetup("ours")
    torch.set_num_threads(steps.threads)
    x = torch.randn(192, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    kernel = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad, matrix = torch.randn(192, 64, 16, 16).contiguous(memory_format=torch.channels_last), torch.randn(2048, 2048)
    work = 3 * 2 * 9 * 64 * 64 * 16 * 16 * 192

    def convolution() -> float:
        return _seconds(lambda: torch.autograd.grad(F.conv2d(x, kernel, padding=1), [x, kernel], grad))

    with contender(steps) as take:
        found = in_turn(
            {
                "step": lambda: take()["seconds"],
                "convolution": convolution,
                "matrix product": lambda: _seconds(lambda: (matrix @ matrix,)),
            },
            rounds,
            warmup=2,
        )
    episode = flops(steps)
    rate = found["convolution"].each(lambda s: work / s / 1e9)
    gemm = found["matrix product"].each(lambda s: 2 * 2048**3 / s / 1e9)
    reached = Spread(
        tuple(
            steps.meta_batch * episode / step / (work / conv)
            for step, conv in zip(found["step"].values, found["convolution"].values, strict=True)
        )
    )
    rows = [
        ("FLOPs of an episode, forward and backward", f"{episode / 1e6:,.1f} million"),
        ("best 64-channel convolution, forward and backward", f"{rate.text(0)} GFLOP/s"),
        ("matrix product 2048 x 2048", f"{gemm.text(0)} GFLOP/s"),
        ("least time of an episode at the convolution's rate", f"{episode / rate.median / 1e6:.2f} ms"),
        ("time of an episode", f"{1e3 * found['step'].median / steps.meta_batch:.2f} ms"),
        ("share of the convolution's rate", f"{reached.each(lambda r: 100 * r).text(0)} %"),
    ]
    note = f"5-way 1-shot, one query an episode, float32; median [smallest, largest] of {rounds} rounds in turn."
    return Section("floor", "lgm-dist bench floor", ("what", "figure"), rows, note, {"seconds": plain(found)})


def _seconds(work: Callable[[], tuple[Tensor, ...]]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory() -> Section:
    """Peak memory of a worker at the largest setting of the paper."""
    steps = StepSetup("ours", 20, 5)
    with contender(steps) as take:
        found = [take() for _ in range(3)][-1]
    row = ("20-way 5-shot, meta-batch 32, 1 query", f"{found['peak_bytes'] / 2**30:.2f} GiB", "4 GiB")
    header = ("training step", "peak memory of the process", "target: under")
    return Section(
        "memory", "lgm-dist bench memory", header, [row], "After 3 steps, float32.", {"bytes": found["peak_bytes"]}
    )


GROWTH = (
    StepSetup("ours"),
    *(StepSetup("ours", ways=ways) for ways in (10, 20)),
    *(StepSetup("ours", shot=shot) for shot in (2, 5)),
    *(StepSetup("ours", queries=queries) for queries in (5, 15)),
    *(StepSetup("ours", meta_batch=size) for size in (8, 16, 64)),
    StepSetup("ours", meta_batch=8, size=84),
)


AXES = {"ways": "ways", "shot": "shots", "queries": "queries an episode", "meta_batch": "episodes a step"}
"""The settings that GROWTH varies one at a time, and their names."""


def growth(rounds: int) -> Section:
    """Step time and memory against one setting at a time, with the slopes of straight lines."""
    rows, points = [], []
    for steps in GROWTH:
        with contender(steps) as take:
            found = [take() for _ in range(rounds + 2)]
        seconds = Spread(tuple(one["seconds"] for one in found[2:]))
        images = steps.meta_batch * (steps.ways * steps.shot + steps.queries)
        name = f"{steps.ways}-way {steps.shot}-shot, T = {steps.queries}, {steps.meta_batch} episodes, {steps.size} px"
        peak = found[-1]["peak_bytes"]
        a_megapixel = 1e3 * seconds.median / (images * steps.size**2 / 1e6)
        rows.append(
            (name, f"{images:,}", seconds.each(lambda s: 1e3 * s).text(0), f"{a_megapixel:.0f}", f"{peak / 2**30:.2f}")
        )
        points.append(asdict(steps) | {"seconds": seconds.values, "peak_bytes": peak})
    axes = {axis: _line(points, axis) for axis in AXES}
    slopes = "; ".join(
        f"one more of {AXES[axis]}: {1e3 * line['seconds']:.1f} ms, {line['bytes'] / 2**20:.1f} MiB"
        for axis, line in axes.items()
    )
    note = (
        f"float32, {GROWTH[0].threads} threads; median [smallest, largest] of {rounds} steps. Straight lines: {slopes}."
    )
    header = ("step", "images", "ms", "ms a megapixel", "peak memory (GiB)")
    return Section("growth", "lgm-dist bench growth", header, rows, note, {"points": points, "slopes": axes})


def along(points: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    """The points of `growth` that differ from the first only in `axis`, in its order."""
    others = [name for name in (*AXES, "size") if name != axis]
    return sorted(
        (p for p in points if all(p[name] == points[0][name] for name in others)), key=lambda p: float(p[axis])
    )


def _line(points: Sequence[Mapping[str, Any]], axis: str) -> dict[str, float]:
    """Least-squares slopes along `axis`: seconds and bytes for one more."""
    chosen = along(points, axis)
    x = np.array([p[axis] for p in chosen])
    seconds, peaks = [Spread(p["seconds"]).median for p in chosen], [p["peak_bytes"] for p in chosen]
    return {name: float(np.polyfit(x, y, 1)[0]) for name, y in (("seconds", seconds), ("bytes", peaks))}
