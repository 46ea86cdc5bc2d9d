"""Dashboards: report.html of runs and sweeps, and a workspace and a report on W&B: `scripts/dashboard.py runs/NAME`."""

from __future__ import annotations

import html
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
import wandb_workspaces.reports.v2.interface as wr
import wandb_workspaces.workspaces as ws
from tyro.conf import Positional
from wandb_workspaces.expr import And

from lgm_dist.config import Config
from lgm_dist.console import run_command
from lgm_dist.console import table as aligned
from lgm_dist.errors import RunFailed
from lgm_dist.report import compare, speed, tables, write_report
from lgm_dist.report.records import Record, SweepRecord, gather
from lgm_dist.report.write import PICTURES
from lgm_dist.tracking.wandb_process import wandb_mode

WORKSPACE, REPORT = "workspace.json", "wandb-report.json"
BEST = wr.SummaryMetric("val/accuracy.max")
"""W&B keeps the maximum of this metric, by define_metric."""
TEST = wr.SummaryMetric("test/accuracy")


@dataclass(frozen=True)
class Flags:
    """Writes report.html on runs and sweeps, which opens anywhere, and makes a workspace and a report on W&B.

    Without an account these two are written as JSON."""

    paths: Positional[tuple[Path, ...]] = ()
    """Folders of a run, of a sweep, or of several of them. Of a sweep the W&B dashboard shows the trials, else the project."""
    entity: str = ""
    """W&B user or team (default: WANDB_ENTITY, else the account's own)."""
    project: str = ""
    """W&B project (default: WANDB_PROJECT, else lgm_dist)."""
    out: str = ""
    """Folder of what is written (default: the first of the paths)."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with WANDB_API_KEY or a login, else offline: JSON. disabled: report.html alone."""


class Part(NamedTuple):
    """A section of the dashboard."""

    title: str
    tables: list[tables.Table]
    panels: list[Any]


class Place(NamedTuple):
    """Where on W&B; the entity is empty where nobody has said it and W&B cannot be asked."""

    entity: str
    project: str


def main(argv: list[str]) -> None:
    """Parses, writes report.html, then saves the W&B dashboard or writes it as JSON."""
    flags = tyro.cli(Flags, args=argv)
    if not flags.paths:
        raise ValueError("paths () must name at least one folder of a run or sweep, such as runs/NAME")
    out = Path(flags.out or flags.paths[0])
    sys.stdout.write(f"report     {write_report(flags.paths, out)}\n")
    mode = wandb_mode(Config.of(wandb=flags.wandb))
    if mode == "disabled":
        return
    runs, sweeps = gather(flags.paths)
    place = Place(
        flags.entity or os.environ.get("WANDB_ENTITY", ""), flags.project or os.environ.get("WANDB_PROJECT", "lgm_dist")
    )
    if mode == "online":
        _save(place, runs, sweeps)
        return
    for name, model in ((WORKSPACE, workspace(place, runs, sweeps)), (REPORT, report(place, runs, sweeps))):
        (out / name).write_text(model._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n")
        sys.stdout.write(f"{'W&B JSON':10} {out / name}\n")


def _save(place: Place, runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> None:
    import wandb

    _check_server()
    try:
        place = Place(place.entity or wandb.Api().default_entity or "", place.project)
        models: dict[str, Any] = {
            "workspace": workspace(place, runs, sweeps),
            "W&B report": report(place, runs, sweeps),
        }
        for name, model in models.items():
            sys.stdout.write(f"{name:10} {model.save().url}\n")
    except (
        Exception
    ) as error:  # wandb's own errors have no common class, and a failed request raises whatever it is made of
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunFailed(f"W&B did not take the dashboard ({reason}); --wandb offline writes it as JSON") from error


def _check_server() -> None:
    """W&B itself would try for minutes."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        raise RunFailed(
            f"no W&B server answers at {url} ({error}); --wandb offline writes the dashboard as JSON"
        ) from None


def workspace(place: Place, runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> ws.Workspace:
    """A section a part; its tables are Markdown panels."""
    sections = [
        ws.Section(
            name=part.title,
            panels=[*(wr.MarkdownPanel(markdown=markdown(t)) for t in part.tables), *part.panels],
            is_open=True,
        )
        for part in parts(runs, sweeps)
    ]
    settings = ws.RunsetSettings(
        filters=_filters(sweeps),
        order=[ws.Ordering(ws.Summary(BEST.name), ascending=False)],
        pinned_columns=[f"summary:{TEST.name}", f"summary:{BEST.name}", "config:ways.value", "config:shot.value"],
    )
    return ws.Workspace(
        entity=place.entity, project=place.project, name=_name(sweeps), sections=sections, runset_settings=settings
    )


def report(place: Place, runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> wr.Report:
    """The same as a text with panels. Its run sets name no project, that is the report's own: looking one up takes a server."""
    blocks: list[Any] = [wr.TableOfContents()]
    for part in parts(runs, sweeps):
        blocks += [wr.H2(part.title), *(wr.MarkdownBlock(f"**{t.title}**\n\n{markdown(t)}") for t in part.tables)]
        runset = wr.Runset(name=_name(sweeps), filters=_filters(sweeps), order=[wr.OrderBy(BEST, ascending=False)])
        blocks.append(wr.PanelGrid(runsets=[runset], panels=part.panels))
    return wr.Report(entity=place.entity, project=place.project, title=_name(sweeps), blocks=blocks, width="fluid")


def _name(sweeps: Sequence[SweepRecord]) -> str:
    return "LGM-Net " + (f"sweep {', '.join(sweep.name for sweep in sweeps)}"[:100] if sweeps else "runs")


def _filters(sweeps: Sequence[SweepRecord]) -> And:
    """The sweeps' trials; without sweeps, all trainings. Runs of scripts/evaluate.py have no curves."""
    if sweeps:
        return And(ws.Metric("Group").isin([sweep.name for sweep in sweeps]), ws.Metric("JobType") == "trial")
    return And(ws.Metric("JobType").isin(["train", "trial"]))


def parts(runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> list[Part]:
    """What the dashboard shows, with tables of the local runs and panels of what is on W&B."""
    every = [*runs, *(trial for sweep in sweeps for trial in sweep.trials)]
    settings = [s for group in tables.same_episodes(runs) for s in compare.normalisations(group)]
    means = [compare.comparison("Settings compared", compare.sampled(sweep), "trials") for sweep in sweeps]
    means.append(compare.comparison("Normalisation of runs", settings, "runs"))
    speeds = [speed.throughput(every), *map(speed.scaling_table, speed.scalings(every))]
    return [
        Part("Results", [tables.headline(runs, sweeps)], _results()),
        Part("Training curves", [], _curves()),
        *(Part(f"Sweep {sweep.name}", [compare.leaderboard(sweep)], _sweep(sweep)) for sweep in sweeps),
        Part("Ways and shots", tables.ways_shots(every), _ways_shots()),
        Part("Normalisation", [t for t in means if t], _normalisation()),
        Part("Throughput and scaling", [t for t in speeds if t], _speed()),
        Part("Pictures", [], [wr.MediaBrowser(media_keys=[f"pictures/{Path(name).stem}" for name in PICTURES])]),
    ]


def _results() -> list[Any]:
    return [
        wr.BarPlot(title="Test accuracy", metrics=[TEST]),
        wr.BarPlot(title="Best val accuracy", metrics=[BEST]),
        wr.RunComparer(diff_only="split"),
    ]


def _curves() -> list[Any]:
    bounds = ["${val/accuracy} - ${val/ci95}", "${val/accuracy} + ${val/ci95}"]
    return [
        _line("Val accuracy with its 95 % interval", "val/accuracy", custom_expressions=bounds),
        _line("Training loss", "train/loss", smoothing_type="average", smoothing_factor=20),
        _line("Accuracy on training episodes", "train/accuracy", smoothing_type="average", smoothing_factor=20),
        _line("Gradient norm", "optim/grad_norm", log_y=True),
        _line("Learning rate", "optim/lr", log_y=True),
    ]


def _line(title: str, key: str, x: str = "step", **more: Any) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=x, y=[key], title_x=x, **more)


def _sweep(sweep: SweepRecord) -> list[Any]:
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(setting.path)) for setting in compare.sampled(sweep)]
    return [
        wr.ParallelCoordinatesPlot(columns=[*columns, wr.ParallelCoordinatesPlotColumn(BEST)]),
        wr.ParameterImportancePlot(with_respect_to=BEST.name),
        _line("Val accuracy by training time", "val/accuracy", x="seconds"),
    ]


def _ways_shots() -> list[Any]:
    keys = ("ways", "shot")
    return [wr.BarPlot(title=f"Test accuracy by {key}", metrics=[TEST], **_grouped(key)) for key in keys]


def _normalisation() -> list[Any]:
    """Mean of the runs with a value, with its standard error."""
    keys = compare.NORMALISATION[:4]
    return [_line(f"Val accuracy by {key}", "val/accuracy", **_grouped(key)) for key in keys]


def _speed() -> list[Any]:
    return [
        _line("Episodes/s", "speed/episodes_per_s"),
        wr.BarPlot(title="Episodes/s by workers", metrics=["speed/episodes_per_s"], **_grouped("world_size")),
        _line("Peak memory (bytes)", "memory/peak_bytes"),
    ]


def _grouped(key: str) -> dict[str, Any]:
    return {"groupby": wr.Config(key), "groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}


def markdown(content: tables.Table) -> str:
    """A table for W&B."""
    cells = [[html.escape(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in content.rows]
    header = [name.removeprefix(">") for name in content.header]
    return aligned(header, cells) + (f"\n{html.escape(content.note)}\n" if content.note else "")


if __name__ == "__main__":
    sys.exit(run_command(main))
