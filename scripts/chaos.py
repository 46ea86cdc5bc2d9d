"""What a training survives: `scripts/chaos.py kills` ends its processes at random; `storage`, `elastic`, `starts`, `memory`.

Each part trains a tiny network on the built-in glyphs, does the real thing to its processes, its storage or its cluster, and
compares what is left with a run that was left alone, bit for bit. Linux: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
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

    def __init__(
        self, folder: Path, name: str, *flags: str, storage: Path | None = None, code: str = "", **environment: str
    ) -> None:
        storage = storage or folder
        places = (f"--data-root={folder}/data", f"--cache={folder}/cache", f"--storage={storage}", f"--name={name}")
        self.run = storage / name
        python = [sys.executable, *(["-c", code] if code else [])]
        self._command = [*python, str(ROOT / "scripts/train.py"), *SMALL, *places, *flags]
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self._log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        """Runs the command, its output at the end of the log."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def step(self) -> int:
        """Steps in metrics.jsonl so far."""
        return newest_step(self.run)

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


def newest_step(run: Path) -> int:
    """The last step in a run's metrics.jsonl, 0 without one."""
    return max((row["step"] for row in read_metrics(run)), default=0)


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


def resize(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """A driver is killed and the run goes on with another number of workers."""
    flags = ("--steps-per-epoch=300", "--eval-every=50", "--lr=1e-6", "--lr-min=0")
    alone = Training(folder, "one-process", *flags, "--workers=0")
    alone.wait()
    outcomes = []
    for before, after in ((1, 2), (2, 1)):
        outcome = Outcome(f"driver killed, gone on with {after} for {before} workers", tried=1)
        training = Training(folder, f"from-{before}-to-{after}", *flags, f"--workers={before}")
        training.until(lambda training=training: training.step() >= 120)  # type: ignore[misc]
        training.process.kill()
        training.process.wait()
        again, start = Training(folder, training.run.name, *flags, f"--workers={after}"), time.monotonic()
        past = _past_this_step(again)
        again.until(past)
        outcome.seconds.append(time.monotonic() - start)
        again.wait()
        outcome.rows, outcome.note = _losses(again.run, alone.run)
        outcome.recovered = 1
        outcomes.append(outcome)
    return outcomes


def _losses(run: Path, alone: Path) -> tuple[int, str]:
    """Rows of `run` that are missing or twice, and by how much its losses differ from those of `alone`."""
    ours = [(row["step"], row["train/loss"]) for row in rows_of(run)]
    theirs = [(row["step"], row["train/loss"]) for row in rows_of(alone)][: len(ours)]
    missing = len({step for step, _ in ours} ^ {step for step, _ in theirs}) + len(ours) - len(dict(ours))
    difference = max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=False))
    return missing, f"{len(ours)} losses differ by at most {difference:.1e}"


def storage(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """Full, read-only, away for half a minute, and gone: a training that waits, or ends in a sentence and is begun again."""
    flags = ("--workers=0", "--steps-per-epoch=1500", "--eval-every=100", "--wandb=disabled")
    alone = Training(folder, "alone-in-one-process", *flags)
    alone.wait()
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    ballast = disk / "ballast"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    away = folder / "away"
    faults: list[tuple[str, Callable[[], Any], Callable[[], Any], float]] = [
        ("disk full for 10 s", fill, ballast.unlink, 10),
        ("disk full", fill, ballast.unlink, 0),
        ("storage read-only for 10 s", lambda: remount("ro"), lambda: remount("rw"), 10),
        ("storage read-only", lambda: remount("ro"), lambda: remount("rw"), 0),
        ("storage away for 30 s", lambda: (disk / "runs").rename(away), lambda: away.rename(disk / "runs"), 30),
        ("storage gone", lambda: (disk / "runs").rename(away), lambda: away.rename(disk / "runs"), 0),
    ]
    try:
        return [
            _storage_fault(folder, disk / "runs", alone, flags, number, fault) for number, fault in enumerate(faults)
        ]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _storage_fault(
    folder: Path,
    place: Path,
    alone: Training,
    flags: tuple[str, ...],
    number: int,
    fault: tuple[str, Callable[[], Any], Callable[[], Any], float],
) -> Outcome:
    name, begin, end, lasts = fault
    patience = f"--storage-seconds={60 if lasts else 3}"
    training = Training(folder, f"run-{number}", *flags, patience, storage=place)
    training.until(lambda: training.step() >= 250)
    begin()
    if not lasts:
        training.wait(status=1)  # of itself, in a sentence
    time.sleep(lasts)
    end()
    outcome, start = Outcome(name, tried=1), time.monotonic()
    past = training.step()
    if lasts:
        training.until(lambda: training.step() > past)
    else:
        last = training.said().splitlines()[-1]
        assert last.startswith("train.py: "), last
        outcome.note = "ended in a sentence, then begun again"
        training.start()
        training.until(lambda: training.step() > past)
    outcome.seconds.append(time.monotonic() - start)
    training.wait()
    outcome.recovered, outcome.rows = 1, wrong_rows(training.run, alone.run)
    outcome.bits = changed_bits(training.run, alone.run)
    return outcome


def elastic(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """--workers 1:4 on a cluster of this machine: a node is added, and one that works is removed without warning."""
    from lgm_dist.ray_train import prepare_for_ray

    prepare_for_ray()
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": True})
    flags = ("--eval-every=100", "--lr=1e-6", "--lr-min=0", "--wandb=disabled", "--meta-batch=12")
    training = Training(
        folder,
        "elastic",
        *(*flags, "--steps-per-epoch=1000000", "--workers=1:4", "--storage-seconds=5", "--max-failures=20"),
        RAY_ADDRESS=cluster.address,
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="20",
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
        GLOO_SOCKET_IFNAME="lo",
    )
    outcomes = []
    try:
        training.until(lambda: training.step() >= 100)
        for name, change, sizes in (
            ("node added", lambda: cluster.add_node(**node), "1 -> 2"),
            ("second node added", lambda: cluster.add_node(**node), "2 -> 3"),
            ("node removed hard", lambda: cluster.remove_node(next(iter(cluster.worker_nodes)), False), "3 -> 2"),
        ):
            past = _past_this_step(training)
            start = time.monotonic()
            change()
            training.until(lambda sizes=sizes: f"world size {sizes} from step" in training.said())  # type: ignore[misc]
            training.until(past)
            outcomes.append(Outcome(name, 1, 1, [time.monotonic() - start], note=f"world size {sizes} in the log"))
        training.process.send_signal(signal.SIGTERM)
        training.wait(status=1)  # it leaves a checkpoint
    finally:
        training.process.kill()
        cluster.shutdown()
    steps = newest_step(training.run)
    alone = Training(folder, "not-elastic", *flags, "--workers=0", f"--steps-per-epoch={steps}")
    alone.wait()
    rows, note = _losses(training.run, alone.run)
    return [*outcomes, Outcome("all of these in one training", 3, 3, rows=rows, note=note)]


def starts(folder: Path, _: argparse.Namespace) -> list[Outcome]:
    """Eight trainings are begun at once where neither the data set nor a bank of its images has been made."""
    fresh = folder / "starts"
    fresh.mkdir()
    logged = "import logging, runpy, sys; logging.basicConfig(level=logging.INFO); sys.argv = sys.argv[1:]; "
    logged += "runpy.run_path(sys.argv[0], run_name='__main__')"
    few = ("--workers=0", "--steps-per-epoch=4", "--eval-every=4", "--wandb=disabled")
    trainings = [Training(fresh, f"start-{number}", *few, code=logged) for number in range(8)]
    for training in trainings:
        training.wait()
    decoded = [line for training in trainings for line in training.said().splitlines() if ": decoded " in line]
    banks = sorted(path.name for path in (fresh / "cache").glob("*.uint8"))
    equal = sum(changed_bits(training.run, trainings[0].run) for training in trainings)
    recovered = 8 if len(decoded) == len(banks) == 3 else 0
    note = f"{len(decoded)} decodings, {len(banks)} banks: one a split"
    return [Outcome("8 first starts at once", 8, recovered, bits=equal, note=note)]


def memory(folder: Path, flags: argparse.Namespace) -> list[Outcome]:
    """Memory of each process over 10,000 steps: the median of the last tenth against that of the second."""
    steps = 10_000
    workers = (f"--workers={flags.workers}", f"--steps-per-epoch={steps}", "--eval-every=500")
    training, seen = Training(folder, "long", *workers), dict[tuple[int, str], list[tuple[int, int]]]()
    while training.process.poll() is None:
        step = training.step()
        for pid, name in training.processes().items():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                seen.setdefault((pid, name), []).append((step, pages * os.sysconf("SC_PAGE_SIZE")))
        time.sleep(2)
    training.wait()
    outcomes = []
    for (_, name), samples in seen.items():
        early = [size for step, size in samples if steps * 0.1 < step <= steps * 0.2]
        late = [size for step, size in samples if steps * 0.9 < step < steps]
        if early and late:
            growth = median(late) / median(early) - 1
            note = f"{median(late) / 2**20:.0f} MiB, {100 * growth:+.1f} %"
            short = " ".join(Path(word).name for word in name.split()[:2])
            outcomes.append(Outcome(f"memory of {short}", 1, int(growth <= 0.02), note=note))
    return outcomes


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock and the process's memory say."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read_metrics(run)]


def _wandb_runs(run: Path) -> set[str]:
    return {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}


def lost_rows(run: Path, alone: Path) -> int:
    """Rows that are missing, twice or other ones in metrics.jsonl, and steps that W&B's files do not hold."""
    held: set[int] = set()
    for wandb_id in _wandb_runs(run):
        held |= _held(run, wandb_id)[0]
    return wrong_rows(run, alone) + len({row["step"] for row in rows_of(alone)} ^ held)


def wrong_rows(run: Path, alone: Path) -> int:
    """Rows that are missing, twice or other ones in metrics.jsonl."""
    ours, theirs = rows_of(run), rows_of(alone)
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


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


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "kills": kills,
    "resize": resize,
    "storage": storage,
    "elastic": elastic,
    "starts": starts,
    "memory": memory,
}


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
