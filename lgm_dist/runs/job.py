"""What is checked before a run starts, and what each worker is sent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lgm_dist.config import Config, differing, marked
from lgm_dist.data import check_episodes, open_bank
from lgm_dist.data.bank import fits
from lgm_dist.data.labelled import classes_learned
from lgm_dist.data.manifest import read_manifest
from lgm_dist.data.prepare import ensure_manifest
from lgm_dist.data.streamed import BaseImages, StreamedSplit, open_base
from lgm_dist.extras import need
from lgm_dist.model import build_model
from lgm_dist.plugins import load_plugins
from lgm_dist.runs import checkpoint
from lgm_dist.runs.files import write_json
from lgm_dist.runs.folder import CONFIG, lock_run, make_folder, read_config
from lgm_dist.runs.load import load_run, start_from
from lgm_dist.training.loop import total_steps
from lgm_dist.training.tasks import Banks, make_stages
from lgm_dist.training.worker import Worker


@dataclass(frozen=True)
class Job:
    """What a worker is sent: the configuration and absolute paths. All values are plain."""

    config: dict[str, Any]
    manifest: str
    cache: str
    run: str
    threads: int


def make_job(config: Config) -> Job:
    """Check everything that can be checked before workers start, open the banks and claim the run's folder.

    Raises ValueError for what a user can correct.
    """
    load_plugins(config)
    _check_libraries(config)
    _check_device(config)
    total_steps(config)  # raises for an unknown stage
    with torch.device("meta"):  # which takes no memory
        build_model(config.model)  # raises for an unknown part and for parts that do not fit together
    manifest = ensure_manifest(config.data.name, config.data.root, config.data.source)
    base = open_banks(config, manifest)["train"]
    decided: dict[str, Any] = {"model.channels": base.channels, "model.base_outputs": _base_outputs(config, base)}
    config = config.replace(
        **decided, **other_runs(config), stream="always" if isinstance(base, StreamedSplit) else config.data.stream
    )
    _check_other_runs(config, base.classes)
    cache = str(Path(config.data.cache).absolute()) if config.data.cache else ""
    manifest = manifest if "://" in manifest else str(Path(manifest).absolute())
    return Job(config.to_dict(), manifest, cache, str(_claim(config, base.digest)), threads_of(config))


def other_runs(config: Config) -> dict[str, str]:
    """The settings that name other runs, with absolute folders, which workers find from any directory."""
    named = {"start": config.run.start, "pretraining.teacher": config.pretraining.teacher}
    return {name: str(Path(folder).absolute()) if folder else "" for name, folder in named.items()}


def _base_outputs(config: Config, base: BaseImages) -> int:
    """Outputs of the classifier that pretraining trains; without that stage, as configured."""
    if "pretraining" not in config.run.stages:
        start = config.run.start
        return config.model.base_outputs or (load_run(start).config.model.base_outputs if start else 0)
    return len(classes_learned(config, len(base.classes))) * config.pretraining.rotations


def _check_other_runs(config: Config, classes: tuple[str, ...]) -> None:
    """Raise ValueError if the run that this one starts from, or its teacher, does not fit a run on these base classes."""
    if config.run.start:
        start_from(config.run.start, build_model(config.model))
        _check_held_out(config, load_run(config.run.start).config)
    teacher = config.pretraining.teacher
    if teacher and "pretraining" not in config.run.stages:
        raise ValueError(f"pretraining.teacher ({teacher}) needs a stage pretraining; leave it out")
    if teacher:
        run = load_run(teacher)
        theirs = run.model.config.base_outputs
        names = run.images.classes if run.images else ()
        left_out = [(c.run.seed, c.pretraining.holdout) for c in (config, run.config) if c.pretraining.holdout]
        if theirs != config.model.base_outputs or names != classes or len(set(left_out)) > 1:
            raise ValueError(
                f"pretraining.teacher ({teacher}) classifies {theirs} base classes, this run {config.model.base_outputs}; name "
                "a run with a stage pretraining on the same classes of the same data set, with the same rotations"
            )


def _check_held_out(ours: Config, theirs: Config) -> None:
    """Raise ValueError if classes that a run takes for unseen are not those that its backbone has not seen."""
    left_out = [(c.run.seed, c.pretraining.holdout) for c in (ours, theirs)]
    if ours.episodes.classes == "held_out" and left_out[0] != left_out[1]:
        raise ValueError(
            f"classes ('held_out') must be those that {ours.run.start} has left out, with seed {left_out[1][0]} and "
            f"pretraining.holdout {left_out[1][1]}, not {left_out[0][0]} and {left_out[0][1]}; give the same ones"
        )


def _check_libraries(config: Config) -> None:
    if config.run.workers:
        need("ray", "ray", "to train with workers (--workers 0 trains without it)")
    if config.run.wandb in ("online", "offline"):
        need("wandb", "wandb", f"for wandb={config.run.wandb}")


def _check_device(config: Config) -> None:
    here = not config.run.workers or os.environ.get("RAY_ADDRESS", "local") == "local"
    if config.run.device == "cuda" and here and not torch.cuda.is_available():
        raise ValueError("device ('cuda') must be there, and this machine has no CUDA; use --device cpu")
    if config.optim.precision == "tf32" and device_of(config) == "cpu":
        raise ValueError("precision ('tf32') needs a GPU, and this run trains on the CPU; use --precision float32")


def open_banks(config: Config, manifest: str) -> Banks:
    """The images of each split. Raises ValueError if they or their number do not suit the configuration."""
    base = open_base(manifest, config.data.cache, _streams(config, manifest))
    banks: Banks = {
        "train": base,
        **{split: open_bank(manifest, split, config.data.cache) for split in ("val", "test")},
    }
    name, channels = base.name, base.channels
    if config.model.channels not in (0, channels):
        raise ValueError(
            f"model.channels ({config.model.channels}) must be {channels}, as the images of '{name}' have; leave "
            "--model.channels out"
        )
    height, width, _ = base.shape
    if config.model.rotations == 4 and height != width:
        raise ValueError(
            f"model.rotations (4) needs square images, and these are {width} x {height}; use --model.rotations 1"
        )
    for stage in make_stages(config, {}, Worker()):
        stage.task.check(base)
    for split, bank in banks.items():
        check_episodes(config, split, bank.name, bank.counts.tolist(), bank.classes)
    return banks


def _streams(config: Config, manifest: str) -> bool:
    """Whether the run streams the base classes. A run that is resumed does as before, whatever space is left now."""
    unable = [stage.name for stage in make_stages(config, {}, Worker()) if not stage.task.streams]
    if config.data.stream == "always" and unable:
        raise ValueError(
            f"stream ('always') does not suit stage {unable[0]}, which needs any image of the base classes at any time; use "
            "--stream never"
        )
    if config.data.stream != "auto":
        return config.data.stream == "always"
    run = Path(config.run.storage) / config.run_name
    if (run / CONFIG).exists():
        return read_config(run).data.stream == "always"
    return not unable and not fits(read_manifest(manifest), "train", config.data.cache)


def _claim(config: Config, digest: str) -> Path:
    """Make the run's folder or take it up again. Refuses one in use, and one of another configuration or data set.

    `digest` is that of the data set's manifest.
    """
    run = make_folder(Path(config.run.storage).absolute() / config.run_name)
    with lock_run(run):
        if (run / CONFIG).exists():
            both = (read_config(run), config)
            theirs, ours = ({k: v for k, v in c.flat().items() if k not in marked("resumable")} for c in both)
            if found := differing(theirs, ours):
                raise ValueError(
                    f"run {config.run_name!r} was started with {found}; give another --name, or delete {run}"
                )
        checkpoint.check(run, config, digest)
        write_json(run / CONFIG, config.to_dict())
    return run


def device_of(config: Config) -> str:
    """The device that the run trains on: cuda or cpu."""
    if config.run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.run.device


def threads_of(config: Config) -> int:
    """torch threads of a worker: its CPUs; in this process, what the caller or OMP_NUM_THREADS has set."""
    if config.run.cpus_per_worker:
        return config.run.cpus_per_worker
    most = config.run.max_workers or config.run.workers
    return max((os.cpu_count() or 1) // most, 1) if most else torch.get_num_threads()
