"""A run before and after its training: what is checked, its folder, what every worker is sent, its facts, its result."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from lgm_dist.config import SPLITS, Config, Split, differing, marked
from lgm_dist.console import tell
from lgm_dist.data import check_episodes, open_bank
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.manifest import read_manifest
from lgm_dist.data.prepare import ensure_manifest
from lgm_dist.runs import checkpoint
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.training.engine import Evaluation, Worker

P = ParamSpec("P")
T = TypeVar("T")

CONFIG, FACTS, RESULT, OWNER = "config.json", "facts.json", "result.json", "owner"


@dataclass(frozen=True)
class Job:
    """What a worker is sent: the configuration and absolute places. All plain values."""

    config: dict[str, Any]
    manifest: str
    cache: str
    run: str
    threads: int


def make_job(config: Config) -> Job:
    """Checks everything that can be checked before workers start, opens the banks and claims the run's folder.

    Raises ValueError for what a user can mend.
    """
    here = not config.run.workers or os.environ.get("RAY_ADDRESS", "local") == "local"
    if config.run.device == "cuda" and here and not torch.cuda.is_available():
        raise ValueError("device ('cuda') must be there, and this machine has no CUDA; use --device cpu")
    if config.optim.precision == "tf32" and device_of(config) == "cpu":
        raise ValueError("precision ('tf32') is a GPU's, and this run trains on the CPU; use --precision float32")
    manifest = ensure_manifest(config.data.name, config.data.root, config.data.source)
    bank = open_banks(config, manifest)["train"]
    config = config.replace(**{"model.channels": bank.channels})
    cache = str(Path(config.data.cache).absolute()) if config.data.cache else ""
    manifest = manifest if "://" in manifest else str(Path(manifest).absolute())
    return Job(config.to_dict(), manifest, cache, str(_claim(config, bank.digest)), threads_of(config))


def open_banks(config: Config, manifest: str) -> dict[Split, ImageBank]:
    """The bank of each split. Raises ValueError where its images or their number do not suit the configuration."""
    banks = {split: open_bank(manifest, split, config.data.cache) for split in SPLITS}
    name, channels = banks["train"].name, banks["train"].channels
    if config.model.channels not in (0, channels):
        raise ValueError(
            f"model.channels ({config.model.channels}) must be {channels}, as the images of '{name}' have; leave "
            "--model.channels out"
        )
    for split, bank in banks.items():
        check_episodes(config, split, bank.name, bank.counts.tolist(), bank.classes)
    return banks


def read_config(run: Path) -> Config:
    """The configuration of a run. Raises ValueError where there is none."""
    try:
        return Config.from_dict(json.loads((run / CONFIG).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run} is no run ({CONFIG}: {error}); name a folder that scripts/train.py has made") from None


def _claim(config: Config, data: str) -> Path:
    """The run's folder, made or taken up again. Refuses one in use, and one of another configuration or data set.

    `data` is the digest of the data set's manifest.
    """
    run = make_folder(Path(config.run.storage).absolute() / config.run_name)
    with owned(run):
        if (run / CONFIG).exists():
            both = (read_config(run), config)
            theirs, ours = ({k: v for k, v in c.flat().items() if k not in marked("resumable")} for c in both)
            if found := differing(theirs, ours):
                raise ValueError(
                    f"run {config.run_name!r} was started with {found}; give another --name, or delete {run}"
                )
        checkpoint.check(run, config, data)
        _replace(run / CONFIG, config.to_dict())
    return run


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """Keeps the run's folder for this process, however that ends. Raises ValueError where it is another's, with its place."""
    with (run / OWNER).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run {run.name!r} in storage {run.parent} is being trained by {file.read() or 'another process'}; wait for "
                "it, stop it, or give another --name"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def persist(run: Path, seconds: float, write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """write(...) into the run's folder; where the storage fails, again each second for so many `seconds`, then its OSError."""
    failed = 0.0
    while True:
        try:
            if not (run / CONFIG).exists():
                raise FileNotFoundError(
                    errno.ENOENT, "the run's folder has gone; nothing is made in its place", str(run)
                )
            return write(*args, **kwargs)
        except OSError as error:
            now = time.monotonic()
            if not failed:
                failed = now
                tell(f"storage: {error}; trying again for {seconds:g} s")
            if now - failed >= seconds:
                raise
            time.sleep(min(1.0, seconds))


def make_folder(folder: Path) -> Path:
    """Makes a folder in the storage. Raises ValueError where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"storage ({folder.parent}) cannot be written ({error.strerror}); name another folder"
        ) from None
    return folder


def write_facts(job: Job, worker: Worker, step: int = 0) -> None:
    """facts.json: on what the run trains now and with which code and data; W&B shows it beside the configuration.

    Where the workers were more or fewer before `step`, says so on standard error.
    """
    before = json.loads((Path(job.run) / FACTS).read_text()) if (Path(job.run) / FACTS).exists() else {}
    if before.get("world_size", worker.world_size) != worker.world_size:
        tell(f"world size {before['world_size']} -> {worker.world_size} from step {step + 1} on")
    manifest = read_manifest(job.manifest)
    facts = {
        "commit": commit(),
        "manifest": job.manifest,
        "manifest_digest": manifest.digest,
        "world_size": worker.world_size,
        "threads": job.threads,
        "device": torch.cuda.get_device_name() if worker.device.startswith("cuda") else "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    _replace(Path(job.run) / FACTS, facts)


def commit() -> str:
    """The git commit of this code, with -dirty where tracked files have changed; outside a checkout LGM_DIST_COMMIT."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LGM_DIST_COMMIT", "")


def write_result(run: Path, config: Config, test: Evaluation | None, memory: list[float]) -> None:
    """result.json: figures of the finished run and of its checkpoint that was best on val."""
    chosen = checkpoint.load_model(checkpoint.best(run))[2]
    result: dict[str, Any] = {
        "protocol": config.episodes.protocol,
        "ways": config.episode("val").ways,
        "shot": config.episode("val").shot,
        "val/accuracy": chosen.val_accuracy,
        "val/ci95": chosen.val_ci95,
        "step": chosen.step,
        "train/steps": config.episodes.steps,
        "train/episodes": config.episodes.steps * config.episodes.meta_batch,
        "train/seconds": max(row["seconds"] for row in read_metrics(run)),
        "memory/peak_bytes": max(memory),
    }
    if test:
        result |= {"test/accuracy": test.score.accuracy, "test/ci95": test.score.ci95, "test/episodes": test.episodes}
    _replace(run / RESULT, result)


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(values, indent=1) + "\n")
    beside.replace(path)


def read_result(run: Path) -> dict[str, Any]:
    """The result.json of a finished run. Raises ValueError where there is none."""
    try:
        result: dict[str, Any] = json.loads((run / RESULT).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} has no result ({error}); train it to its end with scripts/train.py") from None
    return result


def device_of(config: Config) -> str:
    """cuda or cpu."""
    if config.run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.run.device


def threads_of(config: Config) -> int:
    """torch threads of a worker: its CPUs; in this process, what the caller or OMP_NUM_THREADS has set."""
    if config.run.cpus_per_worker:
        return config.run.cpus_per_worker
    most = config.run.max_workers or config.run.workers
    return max((os.cpu_count() or 1) // most, 1) if most else torch.get_num_threads()
