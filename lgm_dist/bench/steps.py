"""Training steps, each contender in its own process, so that allocator, threads and peak memory are its own.

echo go | python -m lgm_dist.bench.steps '{"kind": "ours", "ways": 5, ...}'
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lgm_dist.config import Config, ModelConfig
from lgm_dist.data.episodes import EpisodeBatch
from lgm_dist.model import LGMNet
from lgm_dist.training.episodes_task import Episodes
from lgm_dist.training.memory import keep_freed_memory, peak_memory
from lgm_dist.training.schedule import make_optimizer
from lgm_dist.training.step import train_step
from lgm_dist.training.worker import Worker

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests/reference.py"
"""The plain network. A checkout has it, an installed package does not."""


@dataclass(frozen=True)
class StepSetup:
    """What a contender trains. `kind` is ours, ours-bf16, ours-reference (without kernels), plain (the reference) or plain-kept
    (which keeps freed memory)."""

    kind: str
    ways: int = 5
    shot: int = 1
    queries: int = 1
    """T: query images of an episode."""
    meta_batch: int = 32
    size: int = 32
    threads: int = 2


def batch_of(steps: StepSetup) -> EpisodeBatch:
    """The same random episodes at each call."""
    random = np.random.default_rng(0)
    b, s, t = steps.meta_batch, steps.ways * steps.shot, steps.queries
    images = random.standard_normal((b, s + t, steps.size, steps.size, 3), np.float32)
    labels = torch.from_numpy(random.integers(0, steps.ways, (b, t)))
    noise = torch.from_numpy(random.standard_normal((b, 2, 32), np.float32))
    return EpisodeBatch(torch.from_numpy(images).permute(0, 1, 4, 2, 3), labels, noise, steps.ways, steps.shot)


def stepper(steps: StepSetup) -> Callable[[], float]:
    """Return a function that takes one optimizer step and returns its loss."""
    torch.set_num_threads(steps.threads)
    if steps.kind != "plain":
        keep_freed_memory()
    torch.manual_seed(0)
    config, batch = Config.of(ways=steps.ways, shot=steps.shot, meta_batch=steps.meta_batch), batch_of(steps)
    if steps.kind == "ours-bf16":
        config = config.replace(precision="bf16")
    model = LGMNet(ModelConfig(kernels="reference" if steps.kind == "ours-reference" else "auto")).train()
    optimizer, task = make_optimizer(model, config), Episodes(config, {}, Worker())
    if steps.kind.startswith("ours"):
        return lambda: float(train_step(task, model, optimizer, batch, 0)[0])
    network = _reference().EagerLGMNet(model.state_dict(keep_vars=True))
    plain = replace(batch, images=batch.images.contiguous())

    def step() -> float:
        log_p = network(plain.support, plain.query, steps.ways, plain.noise)
        loss = F.nll_loss(log_p.flatten(0, 1), plain.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def contender(steps: StepSetup) -> Iterator[Callable[[], dict[str, float]]]:
    """A process that takes one step a call and returns {"seconds", "loss", "peak_bytes"}. It sleeps in between."""
    environment = os.environ | {"OMP_NUM_THREADS": str(steps.threads)}
    command = [sys.executable, "-m", "lgm_dist.bench.steps", json.dumps(asdict(steps))]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )

    def step() -> dict[str, float]:
        assert process.stdin
        assert process.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("go\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            raise ValueError(
                f"the process of {steps.kind} at {steps.ways}-way {steps.shot}-shot ended with status {process.wait()} "
                "(-9: perhaps the machine has too little memory)"
            )
        found: dict[str, float] = json.loads(answer)
        return found

    try:
        yield step
    finally:
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def main(argument: str) -> None:
    """The process of a contender: it prints a line of JSON for each line of standard input."""
    values: dict[str, Any] = json.loads(argument)
    step = stepper(StepSetup(**values))
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds, peak = time.perf_counter() - start, peak_memory()
        sys.stdout.write(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
