"""Evaluates a trained run: `scripts/evaluate.py runs/NAME --ways 5 20 --shot 1 5` prints a table and writes JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from lgm_dist.config import Config, Protocol
from lgm_dist.console import leak_note, run_command, table


@dataclasses.dataclass(frozen=True)
class Flags:
    """Evaluates the checkpoint of a run that was best on val; mean accuracy over episodes and its 95 % interval."""

    run: Positional[Path]
    """The run's folder, or one of its checkpoint folders."""
    split: Literal["val", "test"] = "test"
    """Classes to evaluate on."""
    ways: Annotated[tuple[int, ...], arg(aliases=["-w"])] = ()
    """Ways of the grid (default: the run's own)."""
    shot: Annotated[tuple[int, ...], arg(aliases=["-s"])] = ()
    """Shots of the grid (default: the run's own)."""
    protocol: tuple[Protocol, ...] = ()
    """standard, paper or both (default: the run's own). Each has its own augmentation and normalisation of images."""
    episodes: int = 2000
    """Episodes of each cell."""
    draws: int | None = None
    """Noise draws of the generated weights; 0: noise at its mean (default: 0 under standard, 1 under paper)."""
    data: str = ""
    """Another data set: a name or a manifest (default: the run's own)."""
    out: str = ""
    """JSON file of the results (default: evaluation-SPLIT.json in the run's folder)."""
    wandb: Literal["auto", "online", "offline", "disabled"] | None = None
    """Weights & Biases, where an evaluation is a run of its own; as in training (default: as the run's own)."""


def main(argv: list[str]) -> None:
    """Parses, evaluates every cell of the grid, prints and writes the results."""
    flags = tyro.cli(Flags, args=argv)
    if flags.draws is not None and flags.draws < 0:
        raise ValueError(f"draws ({flags.draws}) must be at least 0; 0 takes the noise at its mean")
    from lgm_dist.data import check_episodes, open_bank
    from lgm_dist.data.prepare import ensure_manifest
    from lgm_dist.runs.checkpoint import best, load_model
    from lgm_dist.tracking.mirror import log_evaluation
    from lgm_dist.training.evaluation import evaluate

    folder = flags.run if (flags.run / "state.pt").exists() else best(flags.run)
    model, trained, state = load_model(folder)
    config = trained.replace(data=flags.data or trained.data.name, test_episodes=flags.episodes, workers=0)
    bank = open_bank(
        ensure_manifest(config.data.name, config.data.root, config.data.source), flags.split, config.data.cache
    )
    cells = grid(config, flags)
    for cell in cells:
        check_episodes(cell, flags.split, bank.name, bank.counts.tolist(), bank.classes)
    found = [evaluate(model, bank, cell, flags.split, flags.episodes, flags.draws) for cell in cells]

    header = ("data", "split", "protocol", "episodes", "noise", "accuracy", "n")
    rows = [
        (
            bank.name,
            e.split,
            e.protocol,
            f"{e.ways}-way {e.shot}-shot",
            _noise(e.draws, name),
            str(score),
            f"{e.episodes:,}",
        )
        for e in found
        for name, score in e.scores.items()
    ]
    sys.stdout.write(f"{folder}, step {state.step}\n" + table(header, rows))
    sys.stdout.write(leak_note("paper" if any(cell.episodes.protocol == "paper" for cell in cells) else "standard"))
    out = Path(flags.out or (flags.run / f"evaluation-{flags.split}.json"))
    results = [
        {
            field.name: getattr(e, field.name)
            for field in dataclasses.fields(e)
            if field.name not in ("scores", "accuracies")
        }
        | {"scores": {name: dataclasses.asdict(score) for name, score in e.scores.items()}}
        for e in found
    ]
    out.write_text(json.dumps({"checkpoint": str(folder), "data": bank.name, "results": results}, indent=1) + "\n")
    sys.stdout.write(f"written to {out}\n")
    log_evaluation(trained.replace(wandb=flags.wandb or trained.run.wandb), folder, bank.name, results)


def grid(config: Config, flags: Flags) -> list[Config]:
    """The configuration of each cell: protocols x ways x shots."""
    return [
        config.replace(protocol=protocol, eval_ways=ways, eval_shot=shot)
        for protocol in flags.protocol or (config.episodes.protocol,)
        for ways in flags.ways or (config.episode("test").ways,)
        for shot in flags.shot or (config.episode("test").shot,)
    ]


def _noise(draws: int, method: str) -> str:
    return method if draws < 2 or method == "single draw" else f"{method} of {draws} draws"


if __name__ == "__main__":
    sys.exit(run_command(main))
