"""A workspace and a report on W&B about runs and sweeps. Imports wandb_workspaces."""

from __future__ import annotations

import html
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import wandb_workspaces.reports.v2.interface as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.expr import And

from lgm_dist.console import table as aligned
from lgm_dist.errors import RunFailed
from lgm_dist.report import compare, speed, tables
from lgm_dist.report.records import Record, SweepRecord
from lgm_dist.report.write import PICTURES

WORKSPACE, REPORT = "workspace.json", "wandb-report.json"
BEST = wr.SummaryMetric("val/accuracy.max")
"""W&B keeps the maximum of val/accuracy, because of define_metric."""
TEST = wr.SummaryMetric("test/accuracy")


class Part(NamedTuple):
    """A section of the dashboard."""

    title: str
    tables: list[tables.Table]
    panels: list[Any]


class Project(NamedTuple):
    """A project on W&B."""

    entity: str
    """User or team; empty for the account's default."""
    name: str


def save(project: Project, runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> dict[str, str]:
    """Save the workspace and the report on W&B, and return their addresses by name. Raises RunFailed if W&B fails."""
    import wandb

    _check_server()
    try:
        project = Project(project.entity or wandb.Api().default_entity or "", project.name)
        return {
            "workspace": str(workspace(project, runs, sweeps).save().url),  # type: ignore[no-untyped-call]
            "W&B report": str(report(project, runs, sweeps).save().url),
        }
    except Exception as error:  # wandb's errors have no common class, and a failed request can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunFailed(f"W&B did not take the dashboard ({reason}); --wandb offline writes it as JSON") from error


def write(project: Project, runs: Sequence[Record], sweeps: Sequence[SweepRecord], out: Path) -> list[Path]:
    """Write the workspace and the report as JSON files into the folder `out`, and return their paths."""
    models: dict[Path, Any] = {
        out / WORKSPACE: workspace(project, runs, sweeps),
        out / REPORT: report(project, runs, sweeps),
    }
    for path, model in models.items():
        path.write_text(model._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n")
    return list(models)


def _check_server() -> None:
    """Raise RunFailed if no W&B server answers. wandb would retry for minutes."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the server has answered
    except OSError as error:
        raise RunFailed(
            f"no W&B server answers at {url} ({error}); --wandb offline writes the dashboard as JSON"
        ) from None


def workspace(project: Project, runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> ws.Workspace:
    """The dashboard as a workspace: a section per part, with its tables as Markdown panels."""
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
        entity=project.entity, project=project.name, name=_name(sweeps), sections=sections, runset_settings=settings
    )


def report(project: Project, runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> wr.Report:
    """The dashboard as a report, a text with panels. Its run sets name no project, because that would need a server."""
    blocks: list[Any] = [wr.TableOfContents()]
    for part in parts(runs, sweeps):
        blocks += [wr.H2(part.title), *(wr.MarkdownBlock(f"**{t.title}**\n\n{markdown(t)}") for t in part.tables)]
        runset = wr.Runset(name=_name(sweeps), filters=_filters(sweeps), order=[wr.OrderBy(BEST, ascending=False)])
        blocks.append(wr.PanelGrid(runsets=[runset], panels=part.panels))
    return wr.Report(entity=project.entity, project=project.name, title=_name(sweeps), blocks=blocks, width="fluid")


def _name(sweeps: Sequence[SweepRecord]) -> str:
    return "LGM-Net " + (f"sweep {', '.join(sweep.name for sweep in sweeps)}"[:100] if sweeps else "runs")


def _filters(sweeps: Sequence[SweepRecord]) -> And:
    """The trials of the sweeps; without sweeps, all training runs. Runs of `lgm-dist evaluate` have no curves."""
    if sweeps:
        return And(ws.Metric("Group").isin([sweep.name for sweep in sweeps]), ws.Metric("JobType") == "trial")
    return And(ws.Metric("JobType").isin(["train", "trial"]))


def parts(runs: Sequence[Record], sweeps: Sequence[SweepRecord]) -> list[Part]:
    """The parts of the dashboard: tables about the local runs, and panels that show what is on W&B."""
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
    """Mean over the runs with a value, with its standard error."""
    keys = compare.NORMALISATION[:4]
    return [_line(f"Val accuracy by {key}", "val/accuracy", **_grouped(key)) for key in keys]


def _speed() -> list[Any]:
    return [
        _line("Episodes/s", "speed/episodes_per_s"),
        _line("Images/s of pretraining", "speed/images_per_s"),
        wr.BarPlot(title="Episodes/s by workers", metrics=["speed/episodes_per_s"], **_grouped("world_size")),
        _line("Peak memory (bytes)", "memory/peak_bytes"),
    ]


def _grouped(key: str) -> dict[str, Any]:
    return {"groupby": wr.Config(key), "groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}


def markdown(content: tables.Table) -> str:
    """A table as Markdown for W&B."""
    cells = [[html.escape(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in content.rows]
    header = [name.removeprefix(">") for name in content.header]
    return aligned(header, cells) + (f"\n{html.escape(content.note)}\n" if content.note else "")
