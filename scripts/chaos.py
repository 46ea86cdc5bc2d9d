"""What a training survives: `scripts/chaos.py kills` ends its processes at random; the other parts are in PARTS, or all.

Each part trains a tiny network on the built-in glyphs, does the real thing to its processes, its storage or its cluster, and
compares what is left with a run that was left alone, bit for bit. Linux: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from lgm_dist.chaos import (
    Outcome,
    Training,
    changed_bits,
    lost_rows,
    markdown,
    newest_step,
    past_this_step,
    rows_of,
    wandb_runs,
    wrong_rows,
)
from lgm_dist.cli import status_of
from lgm_dist.job import commit
from lgm_dist.processes import below

FAULTS = ("worker", "rank 0", "W&B", "controller", "driver", "stopped worker")


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
    """Does it; the seconds until the training is past the step that it had reached, for W&B until its process is back."""
    victims: list[int] = []
    while not victims:
        training.until(lambda: bool(training.victims(fault)))
        victims = training.victims(fault)
    pid, start = chance.choice(victims), time.monotonic()
    past = past_this_step(training)
    os.kill(pid, signal.SIGSTOP if fault == "stopped worker" else signal.SIGKILL)
    if fault == "driver":
        training.process.wait()
        training.start()
    training.until((lambda: bool(set(training.victims(fault)) - {pid})) if fault == "W&B" else past)
    return time.monotonic() - start


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
        past = past_this_step(again)
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
    """Full, unwritable, away for half a minute, and gone: a training that waits, or ends in a sentence and is begun again.

    Needs root, for a small disk of its own."""
    flags = ("--workers=0", "--steps-per-epoch=600", "--eval-every=50", "--wandb=disabled")
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

    def change(how: str) -> None:
        for place in (disk / "runs").glob("*/checkpoints"):
            subprocess.run(["chattr", how, str(place)], check=True)

    away = disk / "away"
    faults: list[tuple[str, Callable[[], Any], Callable[[], Any], float]] = [
        ("disk full for 10 s", fill, ballast.unlink, 10),
        ("disk full", fill, ballast.unlink, 0),
        ("checkpoints unwritable for 10 s", lambda: change("+i"), lambda: change("-i"), 10),
        ("checkpoints unwritable", lambda: change("+i"), lambda: change("-i"), 0),
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
    from lgm_dist.ray_cluster import prepare_for_ray

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
    changes: list[tuple[str, Callable[[], Any], int]] = [
        ("node added", lambda: cluster.add_node(**node), 2),
        ("second node added", lambda: cluster.add_node(**node), 3),
        ("third node added", lambda: cluster.add_node(**node), 4),
        ("node removed hard", lambda: cluster.remove_node(next(iter(cluster.worker_nodes)), False), 3),
    ]
    try:
        training.until(lambda: training.step() >= 100)
        for name, change, size in changes:
            before = len(_world_sizes(training))
            past = past_this_step(training)
            start = time.monotonic()
            change()
            training.until(lambda n=before, size=size: _world_sizes(training)[n:][-1:] == [size])  # type: ignore[misc]
            training.until(past)
            outcomes.append(Outcome(name, 1, 1, [time.monotonic() - start], note=f"in the log: world size -> {size}"))
        training.process.send_signal(signal.SIGTERM)
        training.wait(status=1)  # it leaves a checkpoint
    finally:
        training.process.kill()
        cluster.shutdown()
    steps = newest_step(training.run)
    alone = Training(folder, "not-elastic", *flags, "--workers=0", f"--steps-per-epoch={steps}")
    alone.wait()
    rows, note = _losses(training.run, alone.run)
    return [*outcomes, Outcome("all of these in one training", len(changes), len(changes), rows=rows, note=note)]


def finite(folder: Path, flags: argparse.Namespace) -> list[Outcome]:
    """A learning rate with which the second step's loss is no number: the run ends, and is not tried again."""
    training = Training(folder, "not-finite", f"--workers={flags.workers}", "--lr=1e30", "--steps-per-epoch=50")
    training.wait(status=1)
    last = training.said().splitlines()[-1]
    stopped = last.startswith("train.py: at step 2 the output of ") and newest_step(training.run) == 1
    return [Outcome("loss not finite", 1, int(stopped and "start again" not in training.said()), note=f"`{last}`")]


def _world_sizes(training: Training) -> list[int]:
    """Those that the log says that the run went on with."""
    return [int(size) for size in re.findall(r"world size \d+ -> (\d+) from step", training.said())]


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
    decoded = [line for training in trainings for line in training.said().splitlines() if "bank:decoded " in line]
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
        for pid, name in ({training.process.pid: "train.py"} | below(training.process.pid)).items():
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


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "kills": kills,
    "resize": resize,
    "storage": storage,
    "finite": finite,
    "elastic": elastic,
    "starts": starts,
    "memory": memory,
}


def main(argv: list[str]) -> None:
    """Prints the table and writes it as JSON. Raises RunFailed where a training was lost."""
    flags = _parser().parse_args(argv)
    facts = {"commit": commit(), "command": ["scripts/chaos.py", *argv], "cpus": os.cpu_count()}  # as they are now
    with tempfile.TemporaryDirectory() as temporary:
        folder = (flags.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        names = list(PARTS) if "all" in flags.parts else flags.parts
        try:
            outcomes = [outcome for name in names for outcome in PARTS[name](folder, flags)]
        finally:
            Training.end_all()  # one that was lost may still run
    sys.stdout.write(markdown(outcomes))
    if flags.json:
        flags.json.write_text(json.dumps(facts | {"outcomes": [asdict(o) for o in outcomes]}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos.py", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="part", help=", ".join([*PARTS, "all"]))
    parser.add_argument("--kills", type=int, default=4, help="times of each fault (%(default)s)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="of the part kills (all)")
    parser.add_argument("--workers", type=int, default=2, help="of kills, finite and memory (%(default)s)")
    parser.add_argument("--steps", type=int, default=2400, help="of the part kills (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--hang-seconds", type=int, default=10, help="as of scripts/train.py (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where everything goes, kept (a temporary folder, removed)")
    parser.add_argument("--json", type=Path, help="the figures go there too")
    return parser


if __name__ == "__main__":
    sys.exit(status_of(main))
