"""lgm-dist report: what it writes without an account, compared with what runs really log, and what it saves with one."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.fabricated import row, write_run, write_sweep, write_trial
from helpers.waiting import LIMIT

from lgm_dist.cli.report import main
from lgm_dist.config import Config
from lgm_dist.console import run_command

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1:DeprecationWarning")  # wandb_workspaces' own
SCRIPT = Path(__file__).parents[1] / "scripts" / "dashboard.py"
BASE = Config.of(data="fc100", meta_batch=10, epochs=1, steps_per_epoch=20, wandb="disabled")
SECTIONS = ("Results", "Training curves", "Ways and shots", "Normalisation", "Throughput and scaling", "Pictures")
ROWS = [row(10), row(20, (0.3, 0.01))]
LOGGED = {*ROWS[-1], *BASE.flat(), "world_size", "speed/images_per_s"}
"""The names that a run has on W&B: keys of its metrics.jsonl and of its configuration."""
SUMMARY = {"test/accuracy", "val/accuracy.max"}


Dashboard = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dashboard:
    """Runs the command; returns its status, standard output and standard error."""

    def run(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["dashboard.py", *map(str, arguments)])
        status = run_command(main)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = write_sweep(tmp_path / "norms", {"name": "norms"})
    for number, norm in enumerate(("batch", "group")):
        config = BASE.replace(model=replace(BASE.model, norm=norm))  # type: ignore[arg-type]
        write_trial(
            folder,
            number,
            config,
            [row(10), row(20, (0.3 + number / 10, 0.01))],
            {"model.norm": norm, "lr": 0.1 / (number + 1)},
        )
    return folder


def panels(workspace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Panels by the name of their section."""
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def names_in(config: dict[str, Any]) -> set[str]:
    """The metrics and settings of a panel, as a user names them."""
    found = {*config.get("metrics", []), config.get("xAxis", "step"), config.get("targetKey", "step")}
    found |= {name for expression in config.get("expressions", []) for name in re.findall(r"\$\{(.*?)\}", expression)}
    found |= {column["accessor"].split(":", 1)[1] for column in config.get("columns", [])} | {
        config.get("groupBy", "step")
    }
    return {re.sub(r"^summary_metrics\.", "", name).replace(".value", "") for name in found}


def test_offline_the_dashboard_is_json_of_what_runs_log(sweep: Path, dashboard: Dashboard) -> None:
    status, out, _ = dashboard(sweep, "--entity", "team", "--project", "few", WANDB_MODE="offline")
    assert status == 0
    for name in ("report.html", "workspace.json", "wandb-report.json"):
        assert str(sweep / name) in out
    workspace = json.loads((sweep / "workspace.json").read_text())
    assert (workspace["entity"], workspace["project"], workspace["displayName"]) == (
        "team",
        "few",
        "LGM-Net sweep norms",
    )
    by_section = panels(workspace)
    assert {*SECTIONS, "Sweep norms"} == by_section.keys()
    configs = [panel["config"] for found in by_section.values() for panel in found]
    assert set().union(*map(names_in, configs)) <= LOGGED | SUMMARY
    curves = [panel["config"] for panel in by_section["Training curves"]]
    assert curves[0]["metrics"] == ["val/accuracy"]
    assert curves[0]["expressions"] == ["${val/accuracy} - ${val/ci95}", "${val/accuracy} + ${val/ci95}"]
    assert {"train/loss"} in [set(config["metrics"]) for config in curves]
    grouped = {panel["config"].get("groupBy") for panel in by_section["Normalisation"]} - {None}
    assert grouped == {"model.value.norm", "model.value.norm_scope", "model.value.weight_norm", "noise.value"}
    (pictures,) = by_section["Pictures"]
    assert pictures["config"]["mediaKeys"] == [
        f"pictures/{name}" for name in ("curves", "episode", "confusion", "weights")
    ]
    speed = [panel["config"] for panel in by_section["Throughput and scaling"] if panel["viewType"] == "Bar Chart"]
    assert [(config["metrics"], config["groupBy"]) for config in speed] == [
        (["speed/episodes_per_s"], "world_size.value")
    ]
    (parallel,) = [p["config"] for p in by_section["Sweep norms"] if p["viewType"] == "Parallel Coordinates Plot"]
    assert [column["accessor"] for column in parallel["columns"]] == [
        "config:model.value.norm",
        "config:lr.value",
        "summary:val/accuracy.max",
    ]


def filters(runset: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(f["key"]["name"], f["op"], f["value"]) for f in runset["filters"]["filters"]]


def test_a_sweeps_dashboard_shows_its_trials_alone(sweep: Path, tmp_path: Path, dashboard: Dashboard) -> None:
    assert dashboard(sweep, WANDB_MODE="offline")[0] == 0
    workspace, report = (json.loads((sweep / f"{name}.json").read_text()) for name in ("workspace", "wandb-report"))
    expected = [("group", "IN", ["norms"]), ("jobType", "=", "trial")]
    assert filters(workspace["spec"]["section"]["runSets"][0]) == expected
    grids = [block for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert [filters(grid["metadata"]["runSets"][0]) for grid in grids] == [expected] * 7

    run = write_run(tmp_path / "a", BASE, ROWS)
    assert dashboard(run, WANDB_MODE="offline")[0] == 0
    workspace = json.loads((run / "workspace.json").read_text())
    assert filters(workspace["spec"]["section"]["runSets"][0]) == [("jobType", "IN", ["train", "trial"])]
    assert panels(workspace).keys() == {*SECTIONS}


def test_the_tables_stand_in_both_as_markdown(tmp_path: Path, dashboard: Dashboard) -> None:
    for ways, accuracy in ((5, 0.3338), (20, 0.1096)):
        config = BASE.replace(name=f"<b>|{ways}", ways=ways)
        result = {"test/accuracy": accuracy, "test/ci95": 0.0041, "test/episodes": 2000}
        write_run(tmp_path / "runs" / str(ways), config, ROWS, result=result)
    assert dashboard(tmp_path / "runs", "--out", tmp_path, WANDB_MODE="offline")[0] == 0
    workspace, report = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("workspace", "wandb-report"))
    in_panels = [p["config"]["value"] for p in panels(workspace)["Ways and shots"] if p["viewType"] == "Markdown Panel"]
    in_blocks = [b["content"] for b in report["spec"]["blocks"] if b["type"] == "markdown-block"]
    headings = [b["children"][0]["text"] for b in report["spec"]["blocks"] if b["type"] == "heading"]
    (table,) = in_panels
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert cells[2:] == [
        ["5-way", r"33.38 ± 0.41 % test, &lt;b&gt;\|5"],
        ["20-way", r"10.96 ± 0.41 % test, &lt;b&gt;\|20"],
    ]
    assert any(table.strip() in block for block in in_blocks)
    assert headings == [*SECTIONS]


def test_disabled_writes_the_page_alone(tmp_path: Path, dashboard: Dashboard) -> None:
    run = write_run(tmp_path / "a", BASE, ROWS)
    before = set(run.iterdir())
    assert dashboard(run, "--wandb", "disabled")[0] == 0
    assert set(run.iterdir()) - before == {run / "report.html"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "paths () must name at least one folder"),
        (["nowhere"], "nowhere contains no run and no sweep; name a folder"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: list[str], sentence: str, dashboard: Dashboard) -> None:
    status, _, error = dashboard(*arguments)
    assert (status, error.count("\n")) == (1, 1)
    assert sentence in error


class Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B as saving takes: an account `me`, and views, which it keeps."""

    views: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        query = json.loads(body) if self.path == "/graphql" else {"query": ""}
        view = {"id": "Vmlldzox", "name": "nw-abc-v", "displayName": "", "description": "", "spec": "{}"}
        data: dict[str, Any] = {
            "viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        }
        if "upsertView" in query["query"]:
            type(self).views.append(query["variables"])
            data = {"upsertView": {"view": view | {"project": {"name": "few", "entityName": "me"}}, "inserted": True}}
        elif "models(" in query["query"]:
            edge = {
                "cursor": "1",
                "node": {
                    "__typename": "Project",
                    "id": "1",
                    "name": "few",
                    "entityName": "me",
                    "createdAt": "2026-01-01T00:00:00Z",
                    "isBenchmark": False,
                    "user": None,
                },
            }
            data = {
                "models": {
                    "edges": [edge],
                    "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False},
                }
            }
        self._answer({"data": data})

    def _answer(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.views = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_with_an_account_both_are_saved_and_their_addresses_printed(sweep: Path, server: str) -> None:
    """In a process of its own, as wandb keeps its account."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    account = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": server}
    command = [sys.executable, SCRIPT, sweep, "--project", "few"]
    done = subprocess.run(command, env=plain | account, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert f"workspace  {server}/me/few?nw=abc\n" in done.stdout
    assert f"W&B report {server}/me/few/reports/LGM-Net-sweep-norms--Vmlldzox\n" in done.stdout
    workspace, report = Server.views
    assert (workspace["entityName"], workspace["projectName"], workspace["type"]) == ("me", "few", "project-view")
    assert (report["entityName"], report["projectName"], report["type"]) == ("me", "few", "runs")
    sections = json.loads(workspace["spec"])["section"]["panelBankConfig"]["sections"]
    assert {section["name"] for section in sections} == {*SECTIONS, "Sweep norms"}
    assert sum(block["type"] == "panel-grid" for block in json.loads(report["spec"])["blocks"]) == 7
    assert account["WANDB_API_KEY"] not in done.stdout + done.stderr


def test_a_server_that_is_not_there_is_said_at_once(sweep: Path, dashboard: Dashboard) -> None:
    status, _, error = dashboard(sweep, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert (status, error.count("\n")) == (1, 1)
    assert "no W&B server answers at http://127.0.0.1:9" in error
    assert (sweep / "report.html").exists()
