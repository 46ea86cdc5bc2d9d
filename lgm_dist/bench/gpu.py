"""Training steps on a GPU, which makes the episodes too, and the time of the paper's whole run."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from lgm_dist.bench.measure import Section, Spread, in_turn, plain
from lgm_dist.config import Config, Split
from lgm_dist.data.bank import ImageBank
from lgm_dist.model import LGMNet
from lgm_dist.training.episodes_task import Episodes
from lgm_dist.training.step import EagerStep, make_step
from lgm_dist.training.worker import Worker

WAYS: dict[str, tuple[str, bool, str]] = {
    f"{precision}{name}": (precision, graph, kernels)
    for name, graph, kernels in (
        ("", False, "auto"),
        (", CUDA graph", True, "auto"),
        (", CUDA graph, plain operations", True, "reference"),
    )
    for precision in ("float32", "tf32", "bf16")
}
"""The precision, whether a step is a CUDA graph as in training with one worker, and model.kernels."""
PAPERS_STEPS = Config().episodes.steps
STEPS = 50


def random_bank(split: Split = "train", side: int = 32) -> ImageBank:
    """A bank of noise with the size of FC100's train split: 60 classes of 600 images."""
    images = np.random.default_rng(0).integers(0, 256, (36_000, side, side, 3), np.uint8)
    names = tuple(f"class {c}" for c in range(60))
    return ImageBank("noise", split, images, np.arange(61) * 600, names, ("",) * 60, (127.5,) * 3, (73.9,) * 3)


def gpu(
    bank: ImageBank, rounds: int, device: str = "cuda", ways: tuple[str, ...] = tuple(WAYS), meta_batch: int = 32
) -> Section:
    """Time augmented 5-way 1-shot 1-query steps in each of `ways` in turn, and the memory that all take together.

    The row of a way that does not work here gives the reason.
    """
    config = Config.of(meta_batch=meta_batch)
    contenders: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for way in ways:
        try:
            contenders[way] = _timed(stepper(way, bank, config, device), device)
            contenders[way]()  # captures
        except Exception as error:
            contenders.pop(way, None)
            failed[way] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
                :120
            ]
    found = in_turn(contenders, rounds)
    rows = [_row(way, found[way], meta_batch) if way in found else (way, "failed", "", failed[way]) for way in ways]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    note = (
        f"5-way 1-shot, one query a class, {len(bank.images):,} images of {bank.images.shape[1]} x {bank.images.shape[2]} "
        f"resident, meta-batch {meta_batch}, sampling and augmentation on the device; median [smallest, largest] of {rounds} "
        f"rounds in turn of {STEPS} steps; {peak:.2f} GiB of device memory for all of them together."
    )
    header = ("step", "ms", "episodes/s", f"the paper's {PAPERS_STEPS:,} steps take (target: under 2 min)")
    return Section("gpu", "lgm-dist bench gpu", header, rows, note, {"seconds": plain(found), "failed": failed})


def stepper(way: str, bank: ImageBank, config: Config, device: str) -> Callable[[int], object]:
    """A function that takes the step of this number, of a network with weights of its own."""
    precision, graph, kernels = WAYS[way]
    config = config.replace(precision=precision, **{"model.kernels": kernels})
    torch.manual_seed(0)
    model = LGMNet(config.model).train().to(device)
    task = Episodes(config, {"train": bank}, Worker(device=device))
    optimizer = task.optimizer(model)
    take_step = make_step(task, model, model, optimizer, 0) if graph else EagerStep(task, model, optimizer)
    if graph and isinstance(take_step, EagerStep):
        raise ValueError("a CUDA graph needs a GPU")
    return lambda step: take_step(task.batch(step), step)


def _timed(work: Callable[[int], object], device: str) -> Callable[[], float]:
    """Seconds of a step, over STEPS steps; the host waits for the device at both ends only."""
    done = 0

    def run() -> float:
        nonlocal done
        _wait(device)
        start = time.perf_counter()
        for i in range(done, done + STEPS):
            work(i)
        _wait(device)
        done += STEPS
        return (time.perf_counter() - start) / STEPS

    return run


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _row(way: str, seconds: Spread, meta_batch: int) -> tuple[str, ...]:
    whole = seconds.each(lambda s: s * PAPERS_STEPS / 60)
    milliseconds, speed = seconds.each(lambda s: 1e3 * s), seconds.each(lambda s: meta_batch / s)
    return way, milliseconds.text(3), speed.text(0), f"{whole.text(2)} min"
