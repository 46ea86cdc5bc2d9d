"""The end of a sweep: the winner is evaluated on test, and the results are written and printed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from lgm_dist.console import leak_note, percent, table
from lgm_dist.data import open_bank
from lgm_dist.errors import RunFailed
from lgm_dist.report import write_report
from lgm_dist.report.compare import leaderboard
from lgm_dist.report.records import record_of_sweep
from lgm_dist.runs.checkpoint import load_model
from lgm_dist.runs.files import write_json
from lgm_dist.runs.sweep_folder import BEST, WINNER, Sweep, read_sweep
from lgm_dist.sweeps.pictures import draw
from lgm_dist.sweeps.results import write_csv
from lgm_dist.sweeps.trial import EXPLOITABLE
from lgm_dist.training.evaluation import evaluate


def finish(folder: Path) -> None:
    """Rank the trials, evaluate the winner on test, and write and print the results. Raises RunFailed if no trial has any."""
    sweep = read_sweep(folder)
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    if not sweep.ranked:
        reason = f"trial {failed[0].number} failed: {failed[0].error}" if failed else "no trial has started"
        raise RunFailed(f"no trial was evaluated ({reason})")
    for links in folder.glob(f"trials/*/{EXPLOITABLE}"):
        shutil.rmtree(links)
    winner = _evaluate_winner(sweep)
    written = [folder / BEST, folder / WINNER, write_csv(sweep), *draw(sweep), write_report([folder], folder)]
    _print_results(sweep, winner)
    for trial in failed:
        sys.stdout.write(f"trial {trial.number} failed: {trial.error}; --resume tries it again\n")
    sys.stdout.writelines(f"  {path}\n" for path in written)


def _print_results(sweep: Sweep, winner: dict[str, Any]) -> None:
    """Print the leaderboard and the winner's test accuracy."""
    board = leaderboard(record_of_sweep(sweep.folder))
    header = [name.removeprefix(">") for name in board.header]
    sys.stdout.write(f"\n{table(header, board.rows)}\n{board.note}\n\n")
    target, accuracy = sweep.spec["target"], percent(winner["test/accuracy"], winner["test/ci95"])
    sys.stdout.write(
        f"winner: trial {winner['trial']}, test accuracy {accuracy} ({target['ways']}-way {target['shot']}-shot, "
        f"{winner['test/episodes']:,} episodes)\n{leak_note(sweep.base.episodes.protocol)}"
    )


def _evaluate_winner(sweep: Sweep) -> dict[str, Any]:
    """Write best.json and winner.json. Only this evaluates on test, once for each winner."""
    trial = sweep.ranked[0]
    folder, best = trial.checkpoint, trial.best
    assert folder
    assert best
    model, config, _ = load_model(folder)  # with the checkpoint's own settings, which population-based training changes
    chosen = config.replace(
        name=f"{sweep.folder.name}-best",
        storage=sweep.base.run.storage,
        test_episodes=sweep.spec["test_episodes"],
        workers=1,
        cpus_per_worker=0,
    )
    write_json(sweep.folder / BEST, chosen.to_dict())
    if sweep.winner.get("checkpoint") == str(folder):
        return sweep.winner
    bank = open_bank(config.data.name, "test", config.data.cache)
    score = evaluate(model, bank, chosen, "test", chosen.episodes.test_episodes).score
    winner = {
        "trial": trial.number,
        "sample": trial.sample_at(best.step),
        "checkpoint": str(folder),
        "val/accuracy": best.val_accuracy,
        "val/ci95": best.val_ci95,
        "test/accuracy": score.accuracy,
        "test/ci95": score.ci95,
        "test/episodes": chosen.episodes.test_episodes,
    }
    write_json(sweep.folder / WINNER, winner)
    return winner
