"""Faults of processes: killed, stopped, started at once, resumed with other workers, growing."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from statistics import median

from chaos.losses import changed_bits, differing_losses, lost_rows, wandb_runs
from chaos.trainings import Outcome, Training, newest_step, past_this_step
from lgm_dist.cluster.processes import descendants

FAULTS = (
    *("worker", "rank 0", "W&B", "controller", "gcs_server", "raylet", "driver"),  # killed
    *("stopped worker", "stopped controller", "SIGTERM to all"),
)
_STATUS = {"driver": -signal.SIGKILL, "SIGTERM to all": 1}
"""Exit status of a training that a fault ends. The same command then resumes it."""


def kills(folder: Path, flags: argparse.Namespace) -> list[Outcome]:
    """Kill or stop the processes of one training at random times, each fault `--rounds` times."""
    workers = (f"--workers={flags.workers}", f"--steps-per-epoch={flags.steps}", f"--eval-every={flags.eval_every}")
    alone = Training(folder, "alone", *workers)
    alone.wait()
    chance, plan = random.Random(flags.seed), flags.faults * flags.rounds
    chance.shuffle(plan)
    outcomes = {fault: Outcome(fault) for fault in flags.faults}
    limits = (f"--hang-seconds={flags.hang_seconds}", "--storage-seconds=5", f"--max-failures={len(plan)}")
    training = Training(folder, "disturbed", *workers, *limits)
    for number, fault in enumerate(plan, 1):
        point = flags.steps * (number - chance.random()) / (len(plan) + 3)  # leaves steps after the last fault
        training.until(lambda point=point: training.step() >= point)  # type: ignore[misc]
        time.sleep(chance.random())
        seconds = _hit(training, fault, chance)
        outcomes[fault].tried += 1
        outcomes[fault].recovered += 1
        outcomes[fault].seconds.append(seconds)
        sys.stderr.write(f"{number} of {len(plan)}: {fault} after step {training.step()}, {seconds:.1f} s\n")
    training.wait()
    tries = sum(outcome.tried for outcome in outcomes.values())
    total = Outcome("all of these in one training", tries, tries, [s for o in outcomes.values() for s in o.seconds])
    total.rows, total.bits = lost_rows(training.run, alone.run), changed_bits(training.run, alone.run)
    total.note = f"{len(wandb_runs(training.run))} W&B run"
    return [*outcomes.values(), total]


def _hit(training: Training, fault: str, chance: random.Random) -> float:
    """Cause a fault. Return the seconds until the training passes the step it had reached (W&B: until its process is back)."""
    victims: list[int] = []
    while not victims:
        training.until(lambda: bool(training.victims(fault)))
        victims = training.victims(fault)
    pid, start = chance.choice(victims), time.monotonic()
    past = past_this_step(training)
    if fault == "SIGTERM to all":
        os.killpg(pid, signal.SIGTERM)
    else:
        os.kill(pid, signal.SIGSTOP if fault.startswith("stopped ") else signal.SIGKILL)
    if fault in _STATUS:
        training.wait(_STATUS[fault])
        training.start()
    training.until((lambda: bool(set(training.victims(fault)) - {pid})) if fault == "W&B" else past)
    return time.monotonic() - start


def resize(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """Kill the driver and resume with another number of workers."""
    flags = ("--steps-per-epoch=300", "--eval-every=50", "--lr=1e-6", "--lr-min=0")
    alone = Training(folder, "one-process", *flags, "--workers=0")
    alone.wait()
    outcomes = []
    for before, after in ((1, 2), (2, 1)):
        outcome = Outcome(f"driver killed, resumed with {after} instead of {before} workers", tried=1)
        training = Training(folder, f"from-{before}-to-{after}", *flags, f"--workers={before}")
        training.until(lambda training=training: training.step() >= 120)  # type: ignore[misc]
        training.process.kill()
        training.process.wait()
        again, start = Training(folder, training.run.name, *flags, f"--workers={after}"), time.monotonic()
        past = past_this_step(again)
        again.until(past)
        outcome.seconds.append(time.monotonic() - start)
        again.wait()
        outcome.rows, outcome.note = differing_losses(again.run, alone.run)
        outcome.recovered = 1
        outcomes.append(outcome)
    return outcomes


def finite(folder: Path, flags: argparse.Namespace) -> list[Outcome]:
    """Train with a learning rate that makes the second loss infinite or NaN: the run ends and is not tried again."""
    training = Training(folder, "not-finite", f"--workers={flags.workers}", "--lr=1e30", "--steps-per-epoch=50")
    training.wait(status=1)
    last = training.said().splitlines()[-1]
    stopped = last.startswith("train.py: at step 2 the output of ") and newest_step(training.run) == 1
    return [Outcome("loss not finite", 1, int(stopped and "start again" not in training.said()), note=f"`{last}`")]


def starts(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """Start eight trainings at once before the data set and its image banks exist."""
    fresh = folder / "starts"
    fresh.mkdir()
    logged = "import logging, runpy, sys; logging.basicConfig(level=logging.INFO); sys.argv = sys.argv[1:]; "
    logged += "runpy.run_path(sys.argv[0], run_name='__main__')"
    few = ("--workers=0", "--steps-per-epoch=4", "--eval-every=4", "--wandb=disabled")
    trainings = [Training(fresh, f"start-{number}", *few, code=logged) for number in range(8)]
    for training in trainings:
        training.wait()
    decoded = [line for training in trainings for line in training.said().splitlines() if "bank:decoded " in line]
    banks = sorted(path.name for path in (fresh / "cache").glob("*.uint8"))
    equal = sum(changed_bits(training.run, trainings[0].run) for training in trainings)
    recovered = 8 if len(decoded) == len(banks) == 3 else 0
    note = f"{len(decoded)} decodings, {len(banks)} banks: one a split"
    return [Outcome("8 first starts at once", 8, recovered, bits=equal, note=note)]


def memory(folder: Path, flags: argparse.Namespace) -> list[Outcome]:
    """Compare the memory of each process in the last tenth of 10,000 steps with that in the second tenth.

    Neither the least nor the most may grow. Values between them, such as the median, depend on which buffers are in use when
    they are sampled.
    """
    steps = 10_000
    workers = (f"--workers={flags.workers}", f"--steps-per-epoch={steps}", "--eval-every=500")
    training, seen = Training(folder, "long", *workers), dict[tuple[int, str], list[tuple[int, int]]]()
    while training.process.poll() is None:
        step = training.step()
        for pid, name in ({training.process.pid: "train.py"} | descendants(training.process.pid)).items():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                seen.setdefault((pid, name), []).append((step, pages * os.sysconf("SC_PAGE_SIZE")))
        time.sleep(0.5)
    training.wait()
    outcomes = []
    for (_, name), samples in seen.items():
        early = [size for step, size in samples if steps * 0.1 < step <= steps * 0.2]
        late = [size for step, size in samples if steps * 0.9 < step < steps]
        if early and late:
            growth = max(min(late) / min(early), max(late) / max(early)) - 1
            note = f"{median(late) / 2**20:.0f} MiB, {100 * growth:+.1f} %"
            short = " ".join(Path(word).name for word in name.split()[:2])
            outcomes.append(Outcome(f"memory of {short}", 1, int(growth <= 0.02), note=note))
    return outcomes
