"""The search itself: Ray Tune runs the trials of a sweep's folder."""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from lgm_dist.cluster.connection import connect, disconnect
from lgm_dist.config import Config, marked
from lgm_dist.errors import RunFailed
from lgm_dist.runs.job import device_of
from lgm_dist.runs.sweep_folder import read_sweep
from lgm_dist.sweeps.live import Live
from lgm_dist.sweeps.plan import Plan
from lgm_dist.sweeps.signals import sigterm_as_ctrl_c
from lgm_dist.sweeps.spaces import (
    PERTURBED,
    LogUniform,
    Space,
    apply,
    evaluations_of,
    images_per_step,
    read_space,
    suggest,
)
from lgm_dist.sweeps.trial import run_trial

TUNE = "tune"
"""Folder of Ray Tune's own state, in the sweep's folder."""
TUNE_ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed driver loses at most a second of Tune's state
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the table and the last lines say what failed
    "RAY_AIR_NEW_OUTPUT": "0",
}


def search(folder: Path) -> None:
    """Run the trials of the sweep in `folder` that have not ended. Raises RunFailed if a signal stops the sweep."""
    sweep = read_sweep(folder)
    plan, spec = Plan.of(sweep), sweep.spec
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = connect(os.cpu_count() or 1, log_to_driver=False)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    live = Live(plan)
    try:
        concurrent = _concurrent(Config.from_dict(plan.base), spec)
        tuner, before, start = _tuner(plan, spec, live, concurrent), _seconds(folder), time.monotonic()
        with sigterm_as_ctrl_c():
            tuner.fit()
        _print_overhead(before, _seconds(folder), concurrent, time.monotonic() - start)
    finally:
        live.close()
        if started:
            disconnect()
    _check_ended(folder)


def _check_ended(folder: Path) -> None:
    """Raise RunFailed if trials are left: an unfinished trial must not win and be evaluated on test."""
    sweep = read_sweep(folder)
    ended, samples = sum(trial.status != "running" for trial in sweep.trials), sweep.spec["samples"]
    if ended < max(samples, len(sweep.trials)):
        again = f"lgm-dist sweep --storage {folder.parent} --name {folder.name} --resume"
        raise RunFailed(f"stopped with {ended} of {samples} trials ended; resume with `{again}`")


def _seconds(folder: Path) -> dict[int, float]:
    """Seconds that each trial has trained."""
    return {trial.number: trial.rows[-1]["seconds"] for trial in read_sweep(folder).trials if trial.rows}


def _print_overhead(before: dict[int, float], after: dict[int, float], concurrent: int, wall: float) -> None:
    """Print how long a trial takes besides training. `before` and `after` are the seconds that each trial has trained."""
    ran = [number for number in after if after[number] > before.get(number, 0.0)]
    overhead = wall * concurrent - (sum(after.values()) - sum(before.values()))
    if ran:
        sys.stderr.write(
            f"{len(ran)} trials, {concurrent} at a time: {overhead / len(ran):.1f} s per trial besides training\n"
        )


def _tuner(plan: Plan, spec: dict[str, Any], live: Live, concurrent: int) -> tune.Tuner:
    base, state = Config.from_dict(plan.base), str(plan.path / TUNE)
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), _resources(base, concurrent))
    if tune.Tuner.can_restore(state):
        return tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
    random.seed(spec["seed"])  # population-based training draws from the global generator
    return tune.Tuner(
        trainable,
        param_space={} if spec["search"] == "tpe" else {"sample": tune.grid_search(spec["drawn"])},
        tune_config=tune.TuneConfig(
            search_alg=_searcher(spec) if spec["search"] == "tpe" else None,
            scheduler=_scheduler(plan, read_space(spec["params"])),
            num_samples=spec["samples"] if spec["search"] == "tpe" else 1,
            # All trials of a population are alive at once and take turns. Otherwise Tune starts a trial when one ends.
            max_concurrent_trials=None if spec["scheduler"] == "pbt" else concurrent,
            reuse_actors=not base.run.workers,  # the next trial starts at once in the process of the last one
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=plan.folder,
            verbose=0,
            callbacks=[live],
            failure_config=tune.FailureConfig(max_failures=base.run.max_failures),
        ),
    )


def _searcher(spec: dict[str, Any]) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    draw = functools.partial(_draw, read_space(spec["params"]))  # not a closure, because Tune pickles it
    return OptunaSearch(draw, metric="best", mode="max", sampler=optuna.samplers.TPESampler(seed=spec["seed"]))


def _draw(space: Space, trial: Any) -> dict[str, Any]:
    suggest(space, trial)  # Tune records what the trial suggests
    return {"number": trial.ot_trial.number}


def _scheduler(plan: Plan, space: Space) -> Any:
    common: dict[str, Any] = {"time_attr": "iteration", "metric": "accuracy", "mode": "max"}
    if (
        plan.scheduler == "asha"
    ):  # max_t is out of reach, so that a trial that trains to its end does not count as stopped
        most = evaluations_of(Config.from_dict(plan.base))
        return ASHAScheduler(**common, max_t=most + 1, grace_period=max(most // 4, 1), reduction_factor=2)
    if plan.scheduler == "pbt":
        ranges = {path: space[path] for path in PERTURBED}
        mutations = {path: tune.loguniform(p.low, p.high) for path, p in ranges.items() if isinstance(p, LogUniform)}
        return _Population(
            **common,
            perturbation_interval=plan.perturbation_interval,
            hyperparam_mutations={"sample": mutations},
            synch=True,  # trials wait for each other, so that an exploited checkpoint has the same step
        )
    return None


class _Population(PopulationBasedTraining):
    """Population-based training that continues after a trial has failed. Ray's own lets all other trials wait forever."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if trial.should_recover():
            return
        waiting = [self._trial_state[t].last_train_time for t in tune_controller.get_live_trials() if t is not trial]
        if waiting and min(waiting) >= self._next_perturbation_sync:
            self._next_perturbation_sync += self._perturbation_interval


def _resources(base: Config, concurrent: int) -> Any:
    """What Tune reserves for a trial: CPUs, and the share of the memory that lets `concurrent` trials run.

    A trial with Ray Train workers reserves no CPU, because Ray Train reserves CPUs for the workers. They would wait forever.
    """
    memory = {"memory": float(int(0.99 * ray.cluster_resources()["memory"] / concurrent))}
    if base.run.workers:
        return tune.PlacementGroupFactory([memory])
    return {"CPU": base.run.cpus_per_worker, **memory, **({"GPU": 1} if device_of(base) == "cuda" else {})}


def _concurrent(base: Config, spec: dict[str, Any]) -> int:
    """Trials at a time. With more than fit, trials that wait for their workers would block each other forever."""
    have = ray.cluster_resources()
    have_cpus, have_gib = have.get("CPU", 0), have.get("memory", 0) / 2**30
    largest = apply(base, {path: max(p["values"]) for path, p in spec["params"].items() if path in marked("costly")})
    cpus, gib = base.run.cpus_per_worker * max(base.run.workers, 1), trial_gib(largest)
    room = min(int(have_cpus // cpus), int(have_gib // gib))
    if room < 1:
        raise ValueError(
            f"a trial needs {cpus} CPUs and {gib:.1f} GiB, but the cluster has {have_cpus:g} and {have_gib:.1f}; lower workers "
            f"({base.run.workers}), cpus_per_worker ({base.run.cpus_per_worker}) or meta_batch ({largest.episodes.meta_batch})"
        )
    concurrent = min(spec["max_concurrent"] or room, room)
    sys.stderr.write(
        f"{concurrent} trials at a time, each with {cpus} CPUs and up to {gib:.1f} GiB, of {have_cpus:g} and {have_gib:.1f}\n"
    )
    return concurrent


def trial_gib(config: Config) -> float:
    """Upper bound of a trial's memory in GiB, from measured peaks of the paper's network at 32 x 32."""
    return 1.6 * max(config.run.workers, 1) + images_per_step(config) / 1024 * config.model.filters / 64
