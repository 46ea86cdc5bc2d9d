"""The sweep itself, from a sweep's folder: Ray Tune runs the trials, then the winner is evaluated on test."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from live import Live
from ranking import sample_of
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from results import markdown, write_results
from spaces import PERTURBED, LogUniform, Space, apply, evaluations_of, images_per_step, read_space, suggest
from trial import EXPLOITABLE, Plan, run_trial

from lgm_dist.cluster.connection import connect, disconnect
from lgm_dist.config import Config, marked
from lgm_dist.console import leak_note
from lgm_dist.data import open_bank
from lgm_dist.errors import RunFailed
from lgm_dist.report import write_report
from lgm_dist.runs.checkpoint import load_model
from lgm_dist.runs.job import device_of
from lgm_dist.runs.sweep_folder import Trial, read_sweep
from lgm_dist.training.evaluation import evaluate

for module in ("spaces", "trial"):
    # The workers of a submitted job have the repository's root in their path, not this folder.
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])

TUNE, BEST, WINNER = "tune", "best.json", "winner.json"
"""In the sweep's folder: Ray Tune's own state; the winner's configuration for scripts/train.py --config; its accuracy."""
TUNE_ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed driver forgets at most what happened since
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the table and the last lines say what failed
    "RAY_AIR_NEW_OUTPUT": "0",
}


def search(folder: Path) -> None:
    """Runs the trials of the sweep in `folder`, or those that are left of it. Raises RunFailed where a signal has ended it."""
    spec = read_sweep(folder).spec
    plan = Plan(str(folder), spec["base"], spec["scheduler"])
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = connect(os.cpu_count() or 1, log_to_driver=False)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    live = Live(plan)
    try:
        concurrent = _concurrent(Config.from_dict(plan.base), spec)
        tuner, before, start = _tuner(plan, spec, live, concurrent), _seconds(folder), time.monotonic()
        with _sigterm_as_ctrl_c():
            tuner.fit()
        wall, trained = time.monotonic() - start, _seconds(folder)
        ran = [number for number in trained if trained[number] > before.get(number, 0.0)]
        beside = wall * concurrent - (sum(trained.values()) - sum(before.values()))
        if ran:
            sys.stderr.write(
                f"{len(ran)} trials, {concurrent} at a time: {beside / len(ran):.1f} s a trial beside training\n"
            )
    finally:
        live.close()
        if started:
            disconnect()
    trials = read_sweep(folder).trials
    ended = sum(trial.status != "running" for trial in trials)
    if ended < max(spec["samples"], len(trials)):  # else an unfinished trial could win, and be evaluated on test
        again = f"tune/sweep.py --storage {folder.parent} --name {folder.name} --resume"
        raise RunFailed(f"stopped with {ended} of {spec['samples']} trials at their end; `{again}` goes on")


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Tune saves its state and ends at the latter alone."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _seconds(folder: Path) -> dict[int, float]:
    """Seconds that each trial has trained."""
    return {trial.number: trial.rows[-1]["seconds"] for trial in read_sweep(folder).trials if trial.rows}


def _tuner(plan: Plan, spec: dict[str, Any], live: Live, concurrent: int) -> tune.Tuner:
    base, state = Config.from_dict(plan.base), str(plan.path / TUNE)
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), _resources(base, concurrent))
    if tune.Tuner.can_restore(state):
        return tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
    random.seed(spec["seed"])  # population-based training draws from it
    return tune.Tuner(
        trainable,
        param_space={} if spec["search"] == "tpe" else {"sample": tune.grid_search(spec["drawn"])},
        tune_config=tune.TuneConfig(
            search_alg=_searcher(spec) if spec["search"] == "tpe" else None,
            scheduler=_scheduler(plan, read_space(spec["params"])),
            num_samples=spec["samples"] if spec["search"] == "tpe" else 1,
            # All of a population live at once and take turns; else Tune makes a trial when there is room for it.
            max_concurrent_trials=None if spec["scheduler"] == "pbt" else concurrent,
            reuse_actors=not base.run.workers,  # the next trial starts at once in the process of the last
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
    draw = functools.partial(_draw, read_space(spec["params"]))  # not a closure: Tune pickles it with its state
    return OptunaSearch(draw, metric="best", mode="max", sampler=optuna.samplers.TPESampler(seed=spec["seed"]))


def _draw(space: Space, trial: Any) -> dict[str, Any]:
    suggest(space, trial)  # Tune notes what is suggested
    return {"number": trial.ot_trial.number}


def _scheduler(plan: Plan, space: Space) -> Any:
    common: dict[str, Any] = {"time_attr": "iteration", "metric": "accuracy", "mode": "max"}
    if plan.scheduler == "asha":  # max_t is never reached, so that a trial that trains to its end is not cut off there
        most = evaluations_of(Config.from_dict(plan.base))
        return ASHAScheduler(**common, max_t=most + 1, grace_period=max(most // 4, 1), reduction_factor=2)
    if plan.scheduler == "pbt":
        ranges = {path: space[path] for path in PERTURBED}
        mutations = {path: tune.loguniform(p.low, p.high) for path, p in ranges.items() if isinstance(p, LogUniform)}
        return _Population(
            **common,
            perturbation_interval=plan.perturbation_interval,
            hyperparam_mutations={"sample": mutations},
            synch=True,  # all wait for each other, so that what is taken over is of the same step
        )
    return None


class _Population(PopulationBasedTraining):
    """Goes on when a trial has failed for good, for which Ray's own would keep all others waiting for ever."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if trial.should_recover():
            return
        waiting = [self._trial_state[t].last_train_time for t in tune_controller.get_live_trials() if t is not trial]
        if waiting and min(waiting) >= self._next_perturbation_sync:
            self._next_perturbation_sync += self._perturbation_interval


def _resources(base: Config, concurrent: int) -> Any:
    """What Tune keeps free for a trial: a part of the memory, which makes room for so many, and CPUs.

    A trial with Ray Train workers takes no CPU itself: Ray Train takes them for the workers, who would wait for ever.
    """
    memory = {"memory": float(int(0.99 * ray.cluster_resources()["memory"] / concurrent))}
    if base.run.workers:
        return tune.PlacementGroupFactory([memory])
    return {"CPU": base.run.cpus_per_worker, **memory, **({"GPU": 1} if device_of(base) == "cuda" else {})}


def _concurrent(base: Config, spec: dict[str, Any]) -> int:
    """Trials at a time: only as many as have room, else those that wait for their workers keep each other waiting for ever."""
    have = ray.cluster_resources()
    have_cpus, have_gib = have.get("CPU", 0), have.get("memory", 0) / 2**30
    largest = apply(base, {path: max(p["values"]) for path, p in spec["params"].items() if path in marked("costly")})
    cpus, gib = base.run.cpus_per_worker * max(base.run.workers, 1), trial_gib(largest)
    room = min(int(have_cpus // cpus), int(have_gib // gib))
    if room < 1:
        raise ValueError(
            f"a trial needs {cpus} CPUs and {gib:.1f} GiB, the cluster has {have_cpus:g} and {have_gib:.1f}; lower workers "
            f"({base.run.workers}), cpus_per_worker ({base.run.cpus_per_worker}) or meta_batch ({largest.episodes.meta_batch})"
        )
    concurrent = min(spec["max_concurrent"] or room, room)
    sys.stderr.write(
        f"{concurrent} trials at a time, each {cpus} CPUs and up to {gib:.1f} GiB; there are {have_cpus:g} and {have_gib:.1f}\n"
    )
    return concurrent


def trial_gib(config: Config) -> float:
    """GiB that the workers of a trial take, from above, by peaks of the paper's network at 32 x 32 (see the README)."""
    return 1.6 * max(config.run.workers, 1) + images_per_step(config) / 1024 * config.model.filters / 64


def finish(folder: Path) -> None:
    """Ranks the trials, evaluates the winner on test, writes and prints everything."""
    sweep = read_sweep(folder)
    spec = sweep.spec
    plan = Plan(str(folder), spec["base"], spec["scheduler"])
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    if not sweep.ranked:
        raise RunFailed(f"no trial was evaluated; trial 0: {failed[0].error if failed else 'not started'}")
    for links in folder.glob(f"trials/*/{EXPLOITABLE}"):
        shutil.rmtree(links)
    winner = _crown(plan, spec, sweep.ranked[0])
    written = [*write_results(folder), write_report([folder], folder)]
    sys.stdout.write(f"\n{markdown(sweep)}\n")
    target = f"{spec['target']['ways']}-way {spec['target']['shot']}-shot"
    accuracy = f"{100 * winner['test/accuracy']:.2f} ± {100 * winner['test/ci95']:.2f} %"
    sys.stdout.write(
        f"winner: trial {winner['trial']}, test accuracy {accuracy} ({target}, {winner['test/episodes']:,} episodes)\n"
    )
    sys.stdout.write(leak_note(Config.from_dict(plan.base).episodes.protocol))
    for trial in failed:
        sys.stdout.write(f"trial {trial.number} failed: {trial.error}; --resume tries it again\n")
    for path in (plan.path / BEST, plan.path / WINNER, *written):
        sys.stdout.write(f"  {path}\n")


def _crown(plan: Plan, spec: dict[str, Any], trial: Trial) -> dict[str, Any]:
    """best.json and winner.json; test is touched here alone, once for a winner."""
    folder, row = trial.checkpoint, trial.best
    assert folder
    assert row
    model, config, _ = load_model(folder)  # of its own time: a population's trials change theirs
    chosen = config.replace(
        name=f"{plan.name}-best",
        storage=plan.base["storage"],
        test_episodes=spec["test_episodes"],
        workers=1,
        cpus_per_worker=0,
    )
    (plan.path / BEST).write_text(json.dumps(chosen.to_dict(), indent=1) + "\n")
    if (plan.path / WINNER).exists():
        known: dict[str, Any] = json.loads((plan.path / WINNER).read_text())
        if known["checkpoint"] == str(folder):
            return known
    bank = open_bank(config.data.name, "test", config.data.cache)
    score = evaluate(model, bank, chosen, "test", chosen.episodes.test_episodes).score
    winner = {
        "trial": trial.number,
        "sample": sample_of(trial),
        "checkpoint": str(folder),
        "val/accuracy": row["val/accuracy"],
        "val/ci95": row["val/ci95"],
        "test/accuracy": score.accuracy,
        "test/ci95": score.ci95,
        "test/episodes": chosen.episodes.test_episodes,
    }
    (plan.path / WINNER).write_text(json.dumps(winner, indent=1) + "\n")
    return winner
