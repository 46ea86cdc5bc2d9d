"""What a training survives: `scripts/chaos.py kills` ends its processes at random; `storage`, `elastic`, `starts`, `memory`.

Each part trains a tiny network on the built-in glyphs, does the real thing to its processes, its storage or its cluster, and
compares what is left with a run that was left alone, bit for bit. Linux: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from lgm_dist import checkpoint
from lgm_dist.cli import RunFailed, status_of, table
from lgm_dist.job import commit
from lgm_dist.metrics import METRICS, read_metrics
from lgm_dist.tracking import _held

ROOT = Path(__file__).parents[1]
CLOCKS = ("seconds", "speed/", "memory/")
"""Columns of metrics.jsonl that differ between two equal runs."""
FAULTS = ("worker", "rank 0", "W&B", "controller", "driver", "stopped worker")
PATIENCE = 300.0
"""Seconds after which a run that goes on no more counts as lost."""
HEADER = ("fault", "times tried", "recovered", "seconds to recover", "rows lost or twice", "bits changed")
SMALL = (
    *("--data=glyphs", "--ways=3", "--query=2", "--epochs=1", "--meta-batch=4", "--eval-query=3", "--eval-episodes=20"),
    *("--test-episodes=20", "--model.filters=8", "--model.noise-size=4", "--cpus-per-worker=1", "--wandb=offline"),
)


@dataclass
class Outcome:
    """A line of the table."""

    fault: str
    tried: int = 0
    recovered: int = 0
    seconds: list[float] = field(default_factory=list)
    rows: int | None = None
    """Rows that are missing or twice in metrics.jsonl and, without it, on W&B; None: not a matter of this line."""
    bits: int | None = None
    """Bits of weights and optimizer that differ from those of the run that was left alone."""
    note: str = ""


class Training:
    """A scripts/train.py of its own, begun again by the same command when it has been killed."""

    def __init__(self, folder: Path, name: str, *flags: str, environment: dict[str, str] | None = None) -> None:
        places = (f"--data-root={folder}/data", f"--cache={folder}/cache", f"--storage={folder}", f"--name={name}")
        self.run = folder / name
        self._command = [sys.executable, str(ROOT / "scripts/train.py"), *SMALL, *places, *flags]
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self._log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        """Runs the command, its output at the end of the log."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def step(self) -> int:
        """Steps in metrics.jsonl so far."""
        return max((row["step"] for row in read_metrics(self.run)), default=0)

    def said(self) -> str:
        """All output so far."""
        return self._log.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> float:
        """Waits; the seconds that it took. Raises RunFailed where the run ends before it or it takes too long."""
        start = time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                raise RunFailed(f"{self.run.name} ended with status {self.process.returncode}:\n{self.said()[-2000:]}")
            if time.monotonic() - start > seconds:
                raise RunFailed(f"{self.run.name} did not go on for {seconds:g} s; its output: {self._log}")
            time.sleep(0.05)
        return time.monotonic() - start

    def wait(self, status: int = 0) -> None:
        """To its end. Raises RunFailed where that is not `status`."""
        if self.process.wait() != status:
            raise RunFailed(f"{self.run.name} ended with status {self.process.returncode}:\n{self.said()[-2000:]}")

    def processes(self) -> dict[int, str]:
        """Names (the command line) of all processes below the training's, itself included."""
        parents, names = {}, {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended
        ours = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return {pid: names[pid] for pid in ours if pid in names}

    def victims(self, fault: str) -> list[int]:
        """The processes that a fault may hit now."""
        found = self.processes()
        if fault == "driver":
            return [self.process.pid]
        part = {"W&B": "wandb-core", "controller": "ray::TrainController"}.get(fault, "ray::RayTrainWorker")
        pids = [pid for pid, name in found.items() if part in name]
        return [pid for pid in pids if fault != "rank 0" or _holds(pid, self.run / METRICS)]


def _holds(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    try:
        return any(os.path.samefile(link, path) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists())
    except OSError:
        return False


def kills(folder: Path, flags: argparse.Namespace) -> list[Outcome]:
    """One training, its processes killed or stopped at random times, each kind flags.kills times."""
    workers = (f"--workers={flags.workers}", f"--steps-per-epoch={flags.steps}", f"--eval-every={flags.eval_every}")
    alone = Training(folder, "alone", *workers)
    alone.wait()
    chance, plan = random.Random(flags.seed), flags.faults * flags.kills
    chance.shuffle(plan)
    outcomes = {fault: Outcome(fault) for fault in flags.faults}
    limits = (f"--hang-seconds={flags.hang_seconds}", "--storage-seconds=5", f"--max-failures={len(plan)}")
    training = Training(folder, "disturbed", *workers, *limits)
    for number, fault in enumerate(plan, 1):
        point = flags.steps * (number - chance.random()) / (len(plan) + 1)
        training.until(lambda point=point: training.step() >= point)  # type: ignore[misc]
        training.until(lambda fault=fault: bool(training.victims(fault)))  # type: ignore[misc]
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
    total.note = f"{len(_wandb_runs(training.run))} W&B run"
    return [*outcomes.values(), total]


def _hit(training: Training, fault: str, chance: random.Random) -> float:
    """Does it; the seconds until the training is past the step that it had reached, for W&B until its process is back."""
    pid, start = chance.choice(training.victims(fault)), time.monotonic()
    past = _past_this_step(training)
    os.kill(pid, signal.SIGSTOP if fault == "stopped worker" else signal.SIGKILL)
    if fault == "driver":
        training.process.wait()
        training.start()
    training.until((lambda: bool(set(training.victims(fault)) - {pid})) if fault == "W&B" else past)
    return time.monotonic() - start


def _past_this_step(training: Training) -> Callable[[], bool]:
    """Whether workers that started after this call have gone further than those before: each start makes metrics.jsonl anew."""
    record, reached = training.run / METRICS, training.step()
    before = record.stat().st_ino

    def past() -> bool:
        nonlocal reached
        if record.stat().st_ino == before:
            reached = max(reached, training.step())
            return False
        return training.step() > reached

    return past


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock and the process's memory say."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read_metrics(run)]


def _wandb_runs(run: Path) -> set[str]:
    return {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}


def lost_rows(run: Path, alone: Path) -> int:
    """Rows that are missing, twice or other ones in metrics.jsonl, and steps that W&B's files do not hold."""
    ours, theirs = rows_of(run), rows_of(alone)
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
    held: set[int] = set()
    for wandb_id in _wandb_runs(run):
        held |= _held(run, wandb_id)[0]
    return wrong + len({row["step"] for row in theirs} ^ held)


def changed_bits(run: Path, alone: Path) -> int:
    """Bits of the newest and the best checkpoint's tensors that differ; all of them where a checkpoint is missing."""
    return sum(_differing(_tensors(mine(run)), _tensors(mine(alone))) for mine in (checkpoint.newest, checkpoint.best))


def _tensors(folder: Path) -> dict[str, bytes]:
    state = torch.load(folder / "state.pt", weights_only=True)
    found: dict[str, bytes] = {"step": folder.name.encode()}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value.contiguous().numpy().tobytes()
        elif isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                collect(f"{name}.{key}", item)
        else:
            found[name] = repr(value).encode()

    collect("", state)
    return found


def _differing(ours: dict[str, bytes], theirs: dict[str, bytes]) -> int:
    bits = 0
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name, b""), theirs.get(name, b"")
        size = max(len(a), len(b))
        x, y = (np.frombuffer(value.ljust(size, b"\0"), np.uint8) for value in (a, b))
        bits += int(np.unpackbits(x ^ y).sum())
    return bits


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table."""
    lines = []
    for outcome in outcomes:
        seconds = sorted(outcome.seconds)
        spread = f"{median(seconds):.0f} [{seconds[0]:.0f}, {seconds[-1]:.0f}]" if seconds else ""
        counts = ["" if n is None else f"{n:,}" for n in (outcome.rows, outcome.bits)]
        fault = f"{outcome.fault} ({outcome.note})" if outcome.note else outcome.fault
        lines.append([fault, str(outcome.tried), str(outcome.recovered), spread, *counts])
    return table(HEADER, lines)


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {"kills": kills}


def main(argv: list[str]) -> None:
    """Prints the table and writes it as JSON. Raises RunFailed where a training was lost."""
    parser = argparse.ArgumentParser(prog="chaos.py", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="part", help=", ".join([*PARTS, "all"]))
    parser.add_argument("--kills", type=int, default=4, help="times of each fault (%(default)s)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="of the part kills (all)")
    parser.add_argument("--workers", type=int, default=2, help="of the part kills (%(default)s)")
    parser.add_argument("--steps", type=int, default=2400, help="of each training (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--hang-seconds", type=int, default=10, help="as of scripts/train.py (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where everything goes, kept (a temporary folder, removed)")
    parser.add_argument("--json", type=Path, help="the figures go there too")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (flags.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        names = list(PARTS) if "all" in flags.parts else flags.parts
        outcomes = [outcome for name in names for outcome in PARTS[name](folder, flags)]
    sys.stdout.write(markdown(outcomes))
    if flags.json:
        facts = {"commit": commit(), "command": ["scripts/chaos.py", *argv], "cpus": os.cpu_count()}
        flags.json.write_text(json.dumps(facts | {"outcomes": [asdict(o) for o in outcomes]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(status_of(main))
