"""Training steps on a GPU, whose episodes are made there too; how long the paper's whole run takes; and such a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lgm_dist.bench.measure import Section, Spread, in_turn, plain
from lgm_dist.config import Config, Split
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.device import DeviceSampler
from lgm_dist.engine import Worker, apply, evaluate, gradients, make_optimizer
from lgm_dist.model import LGMNet

WAYS: dict[str, dict[str, bool]] = {
    "float32": {},
    "bf16": {},
    "float32, CUDA graph": {"graph": True},
    "bf16, CUDA graph": {"graph": True},
    "bf16, torch.compile": {"compiled": True},
    "bf16, torch.compile, CUDA graph": {"compiled": True, "graph": True},
}
PAPERS_STEPS = Config().steps
STEPS = 50


def random_bank(split: Split = "train", side: int = 32) -> ImageBank:
    """Noise in the shape of FC100's train split: 60 classes of 600 images."""
    images = np.random.default_rng(0).integers(0, 256, (36_000, side, side, 3), np.uint8)
    names = tuple(f"class {c}" for c in range(60))
    return ImageBank("noise", split, images, np.arange(61) * 600, names, ("",) * 60, (127.5,) * 3, (73.9,) * 3)


def gpu(
    bank: ImageBank, rounds: int, device: str = "cuda", ways: tuple[str, ...] = tuple(WAYS), meta_batch: int = 32
) -> Section:
    """Steps of 5-way 1-shot 1-query episodes, augmented, each way of taking them in turn; the memory that all take together.

    A way that this machine or this version of torch cannot go has the reason in its row.
    """
    config = Config(meta_batch=meta_batch)
    sampler = DeviceSampler(bank, config, device)
    contenders: dict[str, Callable[[], float]] = {
        "sampling alone": _timed(lambda i: sampler(32 * i, meta_batch), device)
    }
    failed: dict[str, str] = {}
    for way in ways:
        try:
            contenders[way] = _timed(stepper(way, sampler, config), device)
            contenders[way]()  # compiles, captures
        except Exception as error:
            contenders.pop(way, None)
            failed[way] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
                :120
            ]
    found = in_turn(contenders, rounds)
    rows = [_row(way, found[way], meta_batch) if way in found else (way, "failed", "", failed[way]) for way in [*ways]]
    rows.insert(0, _row("sampling alone", found["sampling alone"], meta_batch))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    note = (
        f"5-way 1-shot, one query a class, {len(bank.images):,} images of {bank.images.shape[1]} x {bank.images.shape[2]} "
        f"resident, meta-batch {meta_batch}, sampling and augmentation on the device; median [smallest, largest] of {rounds} "
        f"rounds in turn of {STEPS} steps; {peak:.2f} GiB of device memory for all of them together."
    )
    header = ("step", "ms", "episodes/s", f"the paper's {PAPERS_STEPS:,} steps take (target: under 2 min)")
    return Section("gpu", "scripts/bench.py gpu", header, rows, note, {"seconds": plain(found), "failed": failed})


def stepper(way: str, sampler: DeviceSampler, config: Config) -> Callable[[int], object]:
    """A function that takes step i, on the sampler's device."""
    config = replace(config, precision="bf16" if way.startswith("bf16") else "float32")
    torch.manual_seed(0)
    model = LGMNet(config.model).train().to(sampler.device)
    return DeviceSteps(model, make_optimizer(model, config), sampler, config, **WAYS[way])


class DeviceSteps:
    """Training steps of one worker whose episodes are made on its device; nothing waits for the host.

    With `graph` (CUDA alone) sampling, augmentation, forward and backward pass are one CUDA graph; the optimizer, whose rates
    change, stays outside. With `compiled` torch.compile fuses them; `model` stays the network itself.
    """

    def __init__(
        self,
        model: LGMNet,
        optimizer: torch.optim.Optimizer,
        sampler: DeviceSampler,
        config: Config,
        *,
        graph: bool = False,
        compiled: bool = False,
    ) -> None:
        self._optimizer, self._config = optimizer, config
        self._model: nn.Module = torch.compile(model, dynamic=False) if compiled else model  # type: ignore[assignment]
        self._sampler = torch.compile(sampler.__call__, dynamic=False) if compiled else sampler
        self._first = torch.zeros((), dtype=torch.int64, device=sampler.device)
        self._graph = self._capture(model) if graph else None

    def __call__(self, step: int) -> Tensor:
        """Step `step` (from 0), on episodes step * meta_batch and after; returns what `train_step` does, (3,)."""
        self._first.fill_(step * self._config.meta_batch)
        if self._graph:
            self._graph.replay()  # writes the gradients anew
            figures = self._figures.clone()
        else:
            self._optimizer.zero_grad()
            figures = self._gradients()
        apply(self._optimizer, self._config, step, figures)
        return figures

    def _gradients(self) -> Tensor:
        return gradients(self._model, self._sampler(self._first, self._config.meta_batch), self._config)

    def _capture(self, model: LGMNet) -> torch.cuda.CUDAGraph:
        averages = {name: buffer.clone() for name, buffer in model.named_buffers()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels and take their workspace before the capture
                self._optimizer.zero_grad()
                self._gradients()
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad()  # so that the gradients lie in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._figures = self._gradients()
        for name, buffer in model.named_buffers():
            buffer.copy_(averages[name])
        return graph


def _timed(work: Callable[[int], object], device: str) -> Callable[[], float]:
    """Seconds a step, over STEPS steps, the device waited for at both ends only."""
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


def run(
    train: ImageBank,
    test: ImageBank,
    steps: int,
    way: str,
    device: str = "cuda",
    meta_batch: int = 32,
    settings: tuple[tuple[int, int], ...] = ((5, 1), (5, 5), (20, 1), (20, 5)),
    episodes: int = 2000,
) -> Section:
    """A training of `steps` steps, the learning rate's decay scaled to them, and the accuracy of its last weights on test."""
    share = steps / PAPERS_STEPS
    config = Config(meta_batch=meta_batch, lr_decay_steps=max(round(Config().lr_decay_steps * share), 1))
    half = replace(config, precision="bf16" if way.startswith("bf16") else "float32")
    start = time.perf_counter()
    torch.manual_seed(0)
    model = LGMNet().train().to(device)
    step = DeviceSteps(model, make_optimizer(model, half), DeviceSampler(train, half, device), half, **WAYS[way])
    for i in range(steps):
        figures = step(i)
    loss = float(figures[0])
    seconds = time.perf_counter() - start
    rows, values = [], {}
    for ways, shot in settings:
        asked = replace(config, ways=ways, shot=shot)
        score = evaluate(model.eval(), test, asked, "test", episodes, worker=Worker(device=device)).score
        rows.append((f"{ways}-way {shot}-shot", f"**{score}**", f"{100 / ways:g} %"))
        values[f"{ways}-way {shot}-shot"] = [score.accuracy, score.ci95]
    note = (
        f"Trained on {steps * meta_batch:,} 5-way 1-shot episodes of {train.name} in {seconds:.1f} s with start-up ({way}); "
        f"last loss {loss:.3f}; test accuracy over {episodes:,} episodes each, protocol standard, not chosen on val."
    )
    header = ("episodes", "test accuracy", "chance")
    return Section(
        "run", f"scripts/bench.py gpu --steps {steps}", header, rows, note, {"accuracy": values, "seconds": seconds}
    )
