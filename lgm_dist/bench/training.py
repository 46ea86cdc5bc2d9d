"""Whole trainings: the time from the command to the first step, and the time beside the model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lgm_dist.bench.measure import Section, Spread, plain, ratio
from lgm_dist.bench.steps import StepSetup, contender
from lgm_dist.runs.metrics import read_metrics

STEPS, STARTING = 60, 20
"""Steps of a training, and those at its start that do not count, because new processes are still busy."""


def train(data: str, data_root: str, rounds: int) -> Section:
    """Run real trainings: seconds to the first step, and the share of the time after it that is not the model.

    The step of the model alone is timed in turn with them, in its own process, on random episodes of the same size.
    """
    found: dict[str, list[float]] = {name: [] for name in ("first 0", "first 1", "step 0", "step 1", "alone")}
    steps = StepSetup("ours", queries=5)
    for turn in range(rounds + 1):
        for workers in (0, 1):
            first, each = _run(data, data_root, workers)
            if turn:  # in the first round the page cache is cold
                found[f"first {workers}"].append(first)
                found[f"step {workers}"].append(each)
        with contender(steps) as take:
            alone = [take()["seconds"] for _ in range(20)]
        if turn:
            found["alone"].append(Spread(tuple(alone[3:])).median)
    spreads = {name: Spread(tuple(values)) for name, values in found.items()}
    rows = []
    for workers, limit in ((0, 4), (1, 15)):
        share = ratio(spreads["alone"], spreads[f"step {workers}"]).each(lambda r: 100 * (1 - r))
        how = "this process (--workers 0)" if not workers else "Ray Train (--workers 1)"
        rows.append((how, f"{spreads[f'first {workers}'].text()} s", f"{limit} s", f"{share.text()} %", "5 %"))
    header = ("trained in", "from command to first step", "target: under", "time beside the model", "target: under")
    note = (
        f"5-way 1-shot, one query a class, meta-batch 32, {STEPS} steps without an evaluation, of which the first {STARTING} "
        f"do not count, warm caches, W&B offline; median [smallest, largest] of {rounds} rounds in turn."
    )
    return Section("train", "lgm-dist bench train", header, rows, note, {"seconds": plain(spreads)})


def _run(data: str, data_root: str, workers: int) -> tuple[float, float]:
    """Seconds from the command to its first step, and the mean seconds of the steps after STARTING."""
    with tempfile.TemporaryDirectory() as storage:
        flags = [f"--data={data}", f"--data-root={data_root}", f"--workers={workers}", f"--storage={storage}"]
        flags += ["--name=bench", "--epochs=1", f"--steps-per-epoch={STEPS}", f"--eval-every={STEPS}"]
        flags += ["--eval-episodes=2", "--eval-query=1", "--test-episodes=0", "--wandb=offline"]
        run, start = Path(storage) / "bench", time.time()
        command = [sys.executable, "-m", "lgm_dist", "train", *flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                while not (run / "metrics.jsonl").exists() or not read_metrics(run):
                    if process.poll() is not None:
                        raise ValueError(
                            f"lgm-dist train ended before its first step: {process.communicate()[1].decode()[-500:]}"
                        )
                    time.sleep(0.02)
                first = time.time() - start
                process.communicate()
            except BaseException:  # Ctrl-C too
                process.terminate()  # it ends after its step
                raise
        seconds = [row["seconds"] for row in read_metrics(run)][STARTING:-1]
        return first, (seconds[-1] - seconds[0]) / (len(seconds) - 1)
