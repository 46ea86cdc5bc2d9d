"""Searches a space with Ray Tune: `tune/sweep.py --space normalization --samples 8`; --resume goes on after a kill."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from spaces import (
    OPTIM,
    PERTURBED,
    Choice,
    LogUniform,
    Sample,
    Space,
    apply,
    check_space,
    describe,
    grid,
    load_space,
    random_samples,
    without_worker_scope,
)

from lgm_dist.cli.flags import Flags, parse
from lgm_dist.config import Config
from lgm_dist.console import run_command


@dataclasses.dataclass(frozen=True)
class SweepFlags(Flags):
    """Trains trials whose configurations are drawn from a space and compares them on the same val episodes.

    Every other flag is the base configuration of all trials. A trial trains on as many images as the base would.
    """

    space: str = "normalization"
    """ways_shots, optim, normalization, full, or a Python file that defines SPACE (see tune/spaces.py)."""
    samples: int = 8
    """Trials (--search grid: all combinations, whatever this says)."""
    search: Literal["random", "tpe", "grid"] = "random"
    """How samples are drawn: at random, by optuna's TPE from the results so far, or every combination."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """asha stops trials that fall behind; pbt (population-based training) lets bad trials go on from the checkpoints of good
    ones, with perturbed lr and weight_decay."""
    target_ways: int = 5
    """Ways of the val (and, for the winner, test) episodes of all trials."""
    target_shot: int = 1
    """Shots of those episodes."""
    max_concurrent: int = 0
    """Trials at a time (0: as many as cores and memory allow)."""
    resume: bool = False
    """Goes on with the sweep of this --name and --storage; all else is read from its sweep.json."""


def main(argv: list[str]) -> None:
    """Parses, searches, evaluates the winner on test, prints and writes the results."""
    config, flags = parse(SweepFlags, argv, Config.of(workers=0))
    folder = Path(config.run.storage).absolute() / (config.run.name or f"sweep-{Path(flags.space).stem}")
    if not flags.resume:
        _begin(folder, config, flags, argv)
    from lgm_dist.cluster.connection import prepare_for_ray  # after parsing: --help and a mistyped flag need no torch

    prepare_for_ray()
    from driver import finish, search

    search(folder)
    finish(folder)


def _begin(folder: Path, config: Config, flags: SweepFlags, argv: list[str]) -> None:
    """Checks everything, before Ray starts, and writes sweep.json."""
    from lgm_dist.runs.facts import commit
    from lgm_dist.runs.folder import make_folder
    from lgm_dist.runs.sweep_folder import SWEEP

    if (folder / SWEEP).exists():
        raise ValueError(
            f"sweep {folder.name!r} exists in {folder.parent}; go on with it by --resume, or give another --name"
        )
    base = _base(config, flags)
    space = without_worker_scope(load_space(flags.space), base.run.workers)
    check_space(space, base)
    if flags.scheduler == "pbt":
        space = _for_pbt(space)
    samples = _samples(space, flags, config.run.seed)
    for sample in samples:
        apply(base, sample)  # what a combination of values makes impossible
    _check_images(base, space)
    spec: dict[str, Any] = {
        **{name: getattr(flags, name) for name in ("space", "search", "scheduler", "max_concurrent")},
        "seed": config.run.seed,
        "name": folder.name,
        "samples": flags.samples if flags.search == "tpe" else len(samples),
        "target": {"ways": flags.target_ways, "shot": flags.target_shot},
        "params": describe(space),
        "drawn": samples,
        "base": base.to_dict(),
        "test_episodes": config.episodes.test_episodes,
        "command": shlex.join(["tune/sweep.py", *argv]),
        "commit": commit(),
    }
    make_folder(folder)
    (folder / SWEEP).write_text(json.dumps(spec, indent=1) + "\n")


def _base(config: Config, flags: SweepFlags) -> Config:
    """The configuration that all trials start from: the target's episodes, absolute places, the test split left alone."""
    if config.run.max_workers:
        raise ValueError(
            f"workers ({config.run.workers}:{config.run.max_workers}) of a trial must be one number; they are not elastic"
        )
    if flags.samples < 1 or flags.max_concurrent < 0:
        raise ValueError(
            f"samples ({flags.samples}) must be at least 1 and max_concurrent ({flags.max_concurrent}) at least 0"
        )
    from lgm_dist.data.prepare import ensure_manifest
    from lgm_dist.runs.job import open_banks

    manifest = ensure_manifest(config.data.name, config.data.root, config.data.source)
    base = config.replace(
        data=manifest if "://" in manifest else str(Path(manifest).absolute()),
        cache=str(Path(config.data.cache).absolute()) if config.data.cache else "",
        storage=str(Path(config.run.storage).absolute()),
        eval_ways=flags.target_ways,
        eval_shot=flags.target_shot,
        cpus_per_worker=config.run.cpus_per_worker or 1,
    )
    open_banks(base, base.data.name)  # refuses targets that a split cannot give
    return base.replace(test_episodes=0)


def _for_pbt(space: Space) -> Space:
    """The space with lr and weight_decay, which population-based training perturbs."""
    for path in ("ways", "shot", "query", "meta_batch"):
        if path in space:
            raise ValueError(
                f"space key {path!r} makes steps unlike, but pbt compares trials step by step; use --scheduler asha"
            )
    perturbed: Space = {path: space.get(path, OPTIM[path]) for path in PERTURBED}
    for path, param in perturbed.items():
        if not isinstance(param, LogUniform):
            raise ValueError(f"space key {path!r} must be a LogUniform, within which pbt perturbs it")
    return perturbed | space


def _samples(space: Space, flags: SweepFlags, seed: int) -> list[Sample]:
    if flags.search == "grid":
        return grid(space)
    if flags.search == "random":
        return random_samples(space, flags.samples, seed)
    if flags.scheduler == "pbt":
        raise ValueError("search (tpe) cannot be used with pbt, which draws by itself; use --search random")
    return []


def _check_images(base: Config, space: Space) -> None:
    """Refuses ways or shots of the space for which the train split is too small."""
    from lgm_dist.data import check_episodes, open_bank

    bank = open_bank(base.data.name, "train", base.data.cache)
    for path in ("ways", "shot", "query"):
        param = space.get(path)
        for value in param.values if isinstance(param, Choice) else ():
            check_episodes(apply(base, {path: value}), "train", bank.name, bank.counts.tolist(), bank.classes)


if __name__ == "__main__":
    sys.exit(run_command(main))
