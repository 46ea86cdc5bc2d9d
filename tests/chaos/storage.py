"""Faults of the storage."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.losses import changed_bits, wrong_rows
from chaos.trainings import Outcome, Training


@dataclass(frozen=True)
class Fault:
    """A fault of the storage that begins after step 250 of a training."""

    name: str
    begin: Callable[[], Any]
    end: Callable[[], Any]
    lasts: float = 0
    """Seconds, fewer than the training waits for the storage. 0: until the training has given up."""


def storage(folder: Path, flags: argparse.Namespace) -> list[Outcome]:
    """Fill the storage, make it unwritable, or take it away, for a short time or for good.

    The training waits, or it ends with one sentence and the same command resumes it. This is tried in one process and with
    Ray Train workers. Needs root, to mount a small disk.
    """
    outcomes = []
    for workers in (0, flags.workers):
        how = (f"--workers={workers}", "--steps-per-epoch=600", "--eval-every=50", "--wandb=disabled")
        alone = Training(folder, f"alone-{workers}", *how)
        alone.wait()
        with _disk(folder / f"disk-{workers}") as disk:
            for number, fault in enumerate(_faults(disk)):
                outcomes.append(_outcome(folder, f"run-{workers}-{number}", disk / "runs", how, fault, alone))
                outcomes[-1].fault += f", {workers} workers" if workers else ", in one process"
    return outcomes


@contextmanager
def _disk(place: Path) -> Iterator[Path]:
    """Mount 16 MiB of memory at `place`."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _faults(disk: Path) -> list[Fault]:
    ballast, runs, elsewhere = disk / "ballast", disk / "runs", disk / "away"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def lock(how: str = "+i") -> None:
        for place in runs.glob("*/checkpoints"):
            subprocess.run(["chattr", how, str(place)], check=True)

    def unlock() -> None:
        lock("-i")

    def take() -> None:
        runs.rename(elsewhere)

    def bring() -> None:
        elsewhere.rename(runs)  # an error if something was made in its place

    return [
        Fault("disk full for 10 s", fill, ballast.unlink, 10),
        Fault("disk full", fill, ballast.unlink),
        Fault("checkpoints unwritable for 10 s", lock, unlock, 10),
        Fault("checkpoints unwritable", lock, unlock),
        Fault("storage away for 30 s", take, bring, 30),
        Fault("storage gone", take, bring),
    ]


def _outcome(folder: Path, name: str, runs: Path, how: tuple[str, ...], fault: Fault, alone: Training) -> Outcome:
    patience = f"--storage-seconds={60 if fault.lasts else 3}"
    training = Training(folder, name, *how, patience, storage=runs)
    training.until(lambda: training.step() >= 250)
    fault.begin()
    if not fault.lasts:
        training.wait(status=1)
    time.sleep(fault.lasts)
    fault.end()
    outcome, start = Outcome(fault.name, tried=1), time.monotonic()
    past = training.step()
    if not fault.lasts:
        last = training.said().splitlines()[-1]
        assert last.startswith("train.py: "), last
        outcome.note = "ended with one sentence, then resumed"
        training.start()
    training.until(lambda: training.step() > past)
    outcome.seconds.append(time.monotonic() - start)
    training.wait()
    outcome.recovered, outcome.rows = 1, wrong_rows(training.run, alone.run)
    outcome.bits = changed_bits(training.run, alone.run)
    return outcome
