"""What happens before a sweep: everything is checked, then sweep.json is written. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgm_dist.config import Config
from lgm_dist.data import check_episodes
from lgm_dist.data.prepare import ensure_manifest
from lgm_dist.runs.facts import commit
from lgm_dist.runs.files import write_json
from lgm_dist.runs.folder import make_folder
from lgm_dist.runs.job import open_banks, other_runs
from lgm_dist.runs.sweep_folder import SWEEP
from lgm_dist.sweeps.options import SweepOptions
from lgm_dist.sweeps.spaces import (
    OPTIM,
    PERTURBED,
    Choice,
    LogUniform,
    Sample,
    Space,
    all_samples,
    apply,
    check_space,
    describe,
    load_space,
    random_samples,
    without_worker_scope,
)


def set_up(folder: Path, config: Config, options: SweepOptions, spaces: Mapping[str, Space], command: str) -> None:
    """Check the sweep and write its sweep.json into `folder`.

    Args:
        folder: Folder of the sweep. Made last, so that a mistake leaves nothing.
        config: The base configuration of all trials.
        options: What to search, and how.
        spaces: The spaces that `options.space` may name.
        command: The command line, for the record.

    Raises ValueError for a wrong setting, a wrong space, or a sweep that exists already.
    """
    if (folder / SWEEP).exists():
        raise ValueError(f"sweep {folder.name!r} exists in {folder.parent}; resume it with --resume, or change --name")
    options.check()
    base = _base(config, options)
    space = without_worker_scope(load_space(options.space, spaces), base.run.workers)
    check_space(space, base)
    if options.scheduler == "pbt":
        space = _with_perturbed(space)
    samples = _samples(space, options, config.run.seed)
    for sample in samples:
        apply(base, sample)  # raises for combinations that are impossible
    _check_images(base, space)
    _check_generator(base, space)
    spec: dict[str, Any] = {
        "space": options.space,
        "search": options.search,
        "scheduler": options.scheduler,
        "max_concurrent": options.max_concurrent,
        "seed": config.run.seed,
        "name": folder.name,
        "samples": options.samples if options.search == "tpe" else len(samples),
        "target": {"ways": options.target_ways, "shot": options.target_shot},
        "params": describe(space),
        "drawn": samples,
        "base": base.to_dict(),
        "test_episodes": config.episodes.test_episodes,
        "command": command,
        "commit": commit(),
    }
    make_folder(folder)
    write_json(folder / SWEEP, spec)


def _base(config: Config, options: SweepOptions) -> Config:
    """The configuration that all trials start from: evaluation on the target, absolute paths, no evaluation on test."""
    if "pretraining" in config.run.stages:
        raise ValueError(
            f"stages ({' '.join(config.run.stages)}): a sweep does not train stage pretraining; train it once with lgm-dist "
            "train, and give the sweep --start RUN"
        )
    if config.run.max_workers:
        raise ValueError(
            f"workers ({config.run.workers}:{config.run.max_workers}) must be one number; trials are not elastic"
        )
    manifest = ensure_manifest(config.data.name, config.data.root, config.data.source)
    base = config.replace(
        data=manifest if "://" in manifest else str(Path(manifest).absolute()),
        cache=str(Path(config.data.cache).absolute()) if config.data.cache else "",
        storage=str(Path(config.run.storage).absolute()),
        **other_runs(config),
        eval_ways=options.target_ways,
        eval_shot=options.target_shot,
        cpus_per_worker=config.run.cpus_per_worker or 1,
    )
    open_banks(base, base.data.name)  # raises if a split is too small for the target
    return base.replace(test_episodes=0)


def _with_perturbed(space: Space) -> Space:
    """The space with lr and weight_decay, which population-based training perturbs."""
    for path in ("ways", "shot", "query", "meta_batch"):
        if path in space:
            raise ValueError(
                f"space key {path!r} changes the work of a step, but pbt compares trials step by step; use --scheduler asha"
            )
    perturbed: Space = {path: space.get(path, OPTIM[path]) for path in PERTURBED}
    for path, param in perturbed.items():
        if not isinstance(param, LogUniform):
            raise ValueError(f"space key {path!r} must be a LogUniform, because pbt perturbs it")
    return perturbed | space


def _samples(space: Space, options: SweepOptions, seed: int) -> list[Sample]:
    """The samples that are known before the sweep; none if Optuna draws them as results come in."""
    if options.search == "grid":
        return all_samples(space)
    return random_samples(space, options.samples, seed) if options.search == "random" else []


def _check_generator(base: Config, space: Space) -> None:
    """Raise ValueError if no stage reads what the space searches over, or if there are no classes that were left out."""
    found = [path for path in space if path.startswith("generator.") or path == "classes"]
    if found and "generator" not in base.run.stages:
        raise ValueError(f"space key {found[0]!r} needs stage generator; give --stages generator --start RUN")
    param = space.get("classes")
    if isinstance(param, Choice) and "held_out" in param.values and not base.pretraining.holdout:
        raise ValueError(
            "space key 'classes' has held_out, but pretraining.holdout is 0; give the --pretraining.holdout and the --seed of "
            "the run that --start names"
        )


def _check_images(base: Config, space: Space) -> None:
    """Raise ValueError for ways or shots of the space for which the train split is too small."""
    images = open_banks(base, base.data.name)["train"]
    for path in ("ways", "shot", "query"):
        param = space.get(path)
        for value in param.values if isinstance(param, Choice) else ():
            check_episodes(apply(base, {path: value}), "train", images.name, images.counts.tolist(), images.classes)
