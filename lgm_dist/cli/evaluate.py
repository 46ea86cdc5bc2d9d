"""`lgm-dist evaluate`: evaluate a trained run on episodes of other ways, shots, protocols or data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from lgm_dist.config import Config, Protocol
from lgm_dist.console import leak_note, table

if TYPE_CHECKING:
    from lgm_dist.training.comparison import Row
    from lgm_dist.training.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """Evaluate a trained learner: mean accuracy over episodes and its 95 % interval."""

    run: Positional[str]
    """Folder of a run, whose checkpoint with the best val accuracy is taken, one of its checkpoint folders, a learner's file,
    or the name of a learner of the package, such as fc100-conv4."""
    split: Literal["val", "test"] | None = None
    """Classes to evaluate on (default: test; val with --compare, because nothing may be chosen on test classes)."""
    ways: Annotated[tuple[int, ...], arg(aliases=["-w"])] = ()
    """Ways of the episodes, one or several numbers (default: as in the run)."""
    shot: Annotated[tuple[int, ...], arg(aliases=["-s"])] = ()
    """Shots of the episodes, one or several numbers (default: as in the run)."""
    protocol: tuple[Protocol, ...] = ()
    """standard, paper or both (default: as in the run). Each has its own augmentation and normalisation of images."""
    episodes: int = 2000
    """Number of episodes for each combination of protocol, ways and shots."""
    draws: int | None = None
    """Noise draws of the generated weights; 0 fixes the noise at its mean (default: 0 for standard, 1 for paper)."""
    data: str = ""
    """Another data set, by name or manifest (default: as in the run)."""
    compare: tuple[str, ...] = ()
    """Other settings to evaluate on the same episodes, such as "model.pool=2 eval_flips=true" or "model.head=ridge"; one value
    for each row of the table. heads: a list of heads with one ingredient after the other. controls: the network without its
    generator, and with the weights of another episode (context=other)."""
    out: str = ""
    """JSON file for the results (default: evaluation-SPLIT.json, or comparison-SPLIT.json, in the run's folder; none for a
    learner's file or name)."""
    wandb: Literal["auto", "online", "offline", "disabled"] | None = None
    """Weights & Biases, where an evaluation is a separate run (default: as in the run)."""


def main(argv: list[str]) -> None:
    """Evaluate every combination, and print and write the results."""
    flags = tyro.cli(EvaluateFlags, args=argv)
    if flags.draws is not None and flags.draws < 0:
        raise ValueError(f"draws ({flags.draws}) must be at least 0; 0 fixes the noise at its mean")
    from lgm_dist.adapt.learner import load  # after parsing, because torch takes seconds to import
    from lgm_dist.data import check_episodes, open_bank
    from lgm_dist.data.prepare import ensure_manifest
    from lgm_dist.runs.files import write_json
    from lgm_dist.tracking.evaluations import log_evaluation
    from lgm_dist.training.comparison import compare, rows_of, shared_maps
    from lgm_dist.training.evaluation import evaluate
    from lgm_dist.training.memory import keep_freed_memory
    from lgm_dist.training.worker import Worker

    keep_freed_memory()  # embedding images takes half as long then
    rows, split = rows_of(flags.compare), flags.split or ("val" if flags.compare else "test")
    learner = load(flags.run)
    model, trained = learner.model, learner.config
    config = trained.replace(data=flags.data or trained.data.name, test_episodes=flags.episodes, workers=0)
    bank = open_bank(ensure_manifest(config.data.name, config.data.root, config.data.source), split, config.data.cache)
    cells = cells_of(config, flags)
    for cell in cells:
        check_episodes(cell, split, bank.name, bank.counts.tolist(), bank.classes)
    run = Path(flags.run) if Path(flags.run).is_dir() else None
    if flags.wandb and not run:
        raise ValueError(f"wandb ({flags.wandb}) needs the folder of a run, and {flags.run} is a learner; leave it out")
    if rows:
        data = trained.data if run else config.data
        base = open_bank(ensure_manifest(data.name, data.root, data.source), "train", data.cache)
        if learner.images and base.classes != learner.images.classes:
            raise ValueError(
                f"compare needs the base classes of {learner.name}, and those of data {base.name!r} differ; name the manifest "
                "of its data set with --data"
            )
        compared = compare(model, bank, base, cells, rows, flags.episodes, flags.draws)
        results = [result for row in compared for result in comparison_as_json(row, compared[0])]
        shown = comparison_table(compared)
    else:
        standard, worker = [cell for cell in cells if cell.episodes.protocol == "standard"], Worker()
        maps = shared_maps(model, bank, standard, flags.episodes, worker) if len(standard) > 1 else None
        evaluations = [
            evaluate(model, bank, c, split, flags.episodes, flags.draws, worker, maps if c in standard else None)
            for c in cells
        ]
        results = [as_json(evaluation) for evaluation in evaluations]
        shown = table_of(bank.name, evaluations)

    sys.stdout.write(f"{learner.name}, step {learner.state.step}\n{shown}")
    sys.stdout.write(leak_note("paper" if any(cell.episodes.protocol == "paper" for cell in cells) else "standard"))
    out = Path(flags.out) if flags.out else run and run / f"{'comparison' if rows else 'evaluation'}-{split}.json"
    if out:
        write_json(out, {"checkpoint": learner.name, "data": bank.name, "results": results})
        sys.stdout.write(f"written to {out}\n")
    if run:
        log_evaluation(trained.replace(wandb=flags.wandb or trained.run.wandb), Path(learner.name), bank.name, results)


def cells_of(config: Config, flags: EvaluateFlags) -> list[Config]:
    """The configuration of each combination of protocol, ways and shots."""
    return [
        config.replace(protocol=protocol, eval_ways=ways, eval_shot=shot)
        for protocol in flags.protocol or (config.episodes.protocol,)
        for ways in flags.ways or (config.episode("test").ways,)
        for shot in flags.shot or (config.episode("test").shot,)
    ]


def table_of(data: str, evaluations: Sequence[Evaluation]) -> str:
    """A table with a row for each evaluation and each way to use the noise draws."""
    header = ("data", "split", "protocol", "episodes", "noise", "accuracy", "n")
    rows = []
    for e in evaluations:
        for method, score in e.scores.items():
            noise = method if e.draws < 2 or method == "single draw" else f"{method} of {e.draws} draws"
            size = f"{e.ways}-way {e.shot}-shot"
            rows.append((data, e.split, e.protocol, size, noise, str(score), f"{e.episodes:,}"))
    return table(header, rows)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain values, without the accuracies of single episodes."""
    names = ("split", "protocol", "ways", "shot", "episodes", "draws")
    scores = {method: dataclasses.asdict(score) for method, score in evaluation.scores.items()}
    return {name: getattr(evaluation, name) for name in names} | {"scores": scores}


def comparison_table(rows: Sequence[Row]) -> str:
    """A table with a row for each set of settings: accuracy and difference to the first row, paired, for each cell."""
    cells = [f"{e.ways}-way {e.shot}-shot" for e in rows[0].evaluations]
    header = [name for cell in cells for name in (cell, "difference")]
    lines = []
    for row in rows:
        pairs = zip(row.evaluations, row.differences(rows[0]), strict=True)
        against = [(str(e.score), f"{100 * d.accuracy:+.2f} ± {100 * d.ci95:.2f}") for e, d in pairs]
        figures = [text for accuracy, d in against for text in (accuracy, "—" if row is rows[0] else d)]
        lines.append((*figures, str(row)))
    first = rows[0].evaluations[0]
    return f"split {first.split}, {first.episodes:,} episodes\n{table((*header, 'settings'), lines)}"


def comparison_as_json(row: Row, first: Row) -> list[dict[str, Any]]:
    """The evaluations of a row as plain values, each with its settings and its paired difference to the first row's."""
    pairs = zip(row.evaluations, row.differences(first), strict=True)
    return [{"settings": str(row), **as_json(e), "difference": d.accuracy, "difference_ci95": d.ci95} for e, d in pairs]
