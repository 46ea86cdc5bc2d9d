"""report.html of fabricated runs and sweeps: figures calculated by hand, damage, hostile names, and a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fabricated import FACTS, PNG, row, write_run, write_state, write_sweep, write_trial
from PIL import Image

from lgm_dist.cluster.fit import train
from lgm_dist.config import Config, ModelConfig
from lgm_dist.report import write_report
from lgm_dist.report.charts import Line, chart, thin
from lgm_dist.runs.checkpoint_files import TrainState
from lgm_dist.runs.folder import read_result
from lgm_dist.runs.job import make_job
from lgm_dist.runs.metrics import read_metrics

BASE = Config.of(data="fc100", meta_batch=10, epochs=1, steps_per_epoch=300, eval_episodes=4, wandb="disabled")
TESTED = {"test/accuracy": 0.3338, "test/ci95": 0.0041, "test/episodes": 2000}
MINUS = "\N{MINUS SIGN}"


class Page(HTMLParser):
    """What a reader of the page finds: tables by their title, all text, pictures, and whatever could ask for more."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.source = file.read_text()
        self._rows: list[list[str]] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")
        ]
        if given.get("class") == "scroll":
            self._rows = self.tables.setdefault(given["title"] or "", [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag == "br":
            self.handle_data("\n")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._rows and self._rows[-1] and self.get_starttag_text() is not None:
            self._rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._rows = []


def columns(table: list[list[str]], *names: str) -> list[tuple[str, ...]]:
    """Those columns of a table, without its header."""
    places = [table[0].index(name) for name in names]
    return [tuple(line[place] for place in places) for line in table[1:]]


def curve(best: float = 0.3, ci95: float = 0.01) -> list[dict[str, Any]]:
    """300 steps with three evaluations, the second the best."""
    accuracies = {100: best - 0.05, 200: best, 300: best - 0.02}
    return [row(step, (accuracies[step], ci95) if step in accuracies else None) for step in range(1, 301)]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Trials 0 to 2, worst to best, on four val episodes, and trial 3, which has failed."""
    folder = write_sweep(
        tmp_path / "sweep", {"name": "norms", "space": "normalization", "command": "lgm-dist sweep --samples 4"}
    )
    base = BASE.replace(test_episodes=0)
    write_trial(
        folder, 0, base, curve(0.25), {"lr": 0.01, "model.norm": "group"}, [0.3, 0.2, 0.3, 0.2], status="stopped"
    )
    write_trial(folder, 1, base, curve(0.40), {"lr": 0.001, "model.norm": "batch"}, [0.3, 0.4, 0.5, 0.4])
    took = [{"step": 100, "from": 1, "sample": {"lr": 0.002, "model.norm": "batch"}}]
    write_trial(folder, 2, base, curve(0.50), {"lr": 0.01, "model.norm": "batch"}, [0.4, 0.6, 0.5, 0.5], exploits=took)
    write_trial(
        folder,
        3,
        base,
        [row(1)],
        {"lr": 0.1, "model.norm": "layer"},
        status="failed",
        error="a\nRuntimeError: no memory\n",
    )
    return folder


def test_headline_of_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", BASE.replace(name="a", eval_ways=20), curve(0.0912, 0.0034), result=TESTED)
    write_run(tmp_path / "b", BASE.replace(name="b", test_episodes=0), curve(0.2999, 0.012), result={"step": 200})
    write_run(tmp_path / "c", BASE.replace(name="c", shot=5), curve()[:150])
    table = Page(write_report([tmp_path], tmp_path / "out")).tables["Runs"]
    names = (
        "run",
        "protocol",
        "trained at",
        "evaluated at",
        "test accuracy",
        "val accuracy",
        "trained on",
        "time",
        "commit",
    )
    at = ("5-way 1-shot", "5-way 1-shot")
    assert columns(table, *names) == [
        (
            "a",
            "standard",
            at[0],
            "20-way 1-shot",
            "33.38 ± 0.41 % (n = 2,000)",
            "9.12 ± 0.34 %",
            "3,000 episodes",
            "5.0 min",
            "0123456789",
        ),
        ("b", "standard", *at, "not evaluated", "29.99 ± 1.20 %", "3,000 episodes", "5.0 min", "0123456789"),
        (
            "c",
            "standard",
            *["5-way 5-shot"] * 2,
            "not yet",
            "25.00 ± 1.00 %",
            "1,500 episodes",
            "2.5 min",
            "0123456789",
        ),
    ]


def test_protocol_paper_says_that_it_leaks_wherever_its_accuracy_stands(tmp_path: Path) -> None:
    for name, protocol in (("honest", "standard"), ("leaky", "paper")):
        config = BASE.replace(name=name, protocol=protocol)  # type: ignore[arg-type]
        write_run(tmp_path / name, config, curve(), result=TESTED)
        (tmp_path / name / "curves.png").write_bytes(PNG)
    honest = Page(write_report([tmp_path / "honest"], tmp_path / "out"))
    assert "leak" not in honest.text.lower()
    both = Page(write_report([tmp_path / "honest", tmp_path / "leaky"], tmp_path / "out"))
    assert columns(both.tables["Runs"], "protocol") == [("standard",), ("paper: LEAKS THE LABEL",)]
    assert "67.2 % at 5 ways" in both.text
    assert both.text.count("leaky (paper: leaks the label)") == 3, "loss, val accuracy, pictures"
    alone = Page(write_report([tmp_path / "leaky"], tmp_path / "out"))
    assert alone.text.count("accuracy (leaks the label)") == 2


def test_a_run_alone_shows_its_figures_large(tmp_path: Path) -> None:
    write_run(tmp_path / "a", BASE.replace(name="a"), curve(), result=TESTED)
    assert (
        "test accuracy33.38 ± 0.41 % (n = 2,000)best val accuracy30.00 ± 1.00 %chance20 %"
        in Page(write_report([tmp_path / "a"], tmp_path)).text
    )


def test_long_curves_are_drawn_by_the_means_of_their_parts() -> None:
    x = np.arange(1.0, 1001.0)
    thinned_x, thinned_y = thin(x, 2 * x)
    np.testing.assert_allclose(thinned_x, np.arange(5.5, 1000, 10))
    np.testing.assert_allclose(thinned_y, np.arange(11, 2000, 20))
    assert [len(v) for v in thin(x[:7], x[:7])] == [7, 7]


def paths(svg: str, style: str) -> list[list[tuple[float, float]]]:
    """The points of the paths that are drawn in a style."""
    found = re.findall(r'<path [^>]*?(?<= )d="([^"]*)"([^>]*)>', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", d)] for d, rest in found if style in rest]


def test_numbers_on_an_axis_are_whole() -> None:
    svg = chart([Line(np.array([1.0, 2.0]), np.array([1.601, 1.607]), 0)], "step", "loss")
    assert {f"1.60{i}" for i in range(1, 8)} <= set(re.findall(r">([\d.]+)</text>", svg))


def test_val_accuracy_is_drawn_with_its_interval_and_chance(tmp_path: Path) -> None:
    rows = [row(100, (0.2, 0.05)), row(200, (0.3, 0.05)), row(300, (0.4, 0.05))]
    write_run(tmp_path / "a", BASE, rows)
    svg = Page(write_report([tmp_path / "a"], tmp_path)).source.split("Accuracy on val episodes")[1].split("</svg>")[0]
    (line,) = [p for p in paths(svg, "stroke: var(--s0)") if len(p) == 3]
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.02)
    ten_percent = line[0][1] - line[1][1]
    (chance,) = [p for p in paths(svg, "stroke: currentColor") if p[0][1] == p[1][1] and p[0][0] != p[1][0]]
    assert chance[0][1] == pytest.approx(line[0][1], abs=0.02), "20 % at 5 ways"
    band = next(p for p in paths(svg, "") if len(p) > 6)
    heights = [y for x, y in band if x == pytest.approx(line[0][0], abs=0.02)]
    assert max(heights) - min(heights) == pytest.approx(ten_percent, abs=0.05), "from 15 to 25 %"


def test_leaderboard_with_paired_differences(sweep: Path, tmp_path: Path) -> None:
    page = Page(write_report([sweep], tmp_path))
    names = ("trial", "status", "val accuracy", "minus the first", "model.norm", "lr", "best at step", "remark")
    # differences to trial 2: -0.1 -0.2 0 -0.1 (mean -0.1, std 0.08165) and -0.1 -0.4 -0.2 -0.3 (mean -0.25, std 0.12910)
    assert columns(page.tables["Trials of norms"], *names) == [
        ("trial-002", "finished", "50.00 ± 1.00 %", "—", "batch", "0.002", "200", "exploited trial 1 at step 100"),
        ("trial-001", "finished", "40.00 ± 1.00 %", f"{MINUS}10.00 ± 8.00", "batch", "0.001", "200", ""),
        ("trial-000", "stopped", "25.00 ± 1.00 %", f"{MINUS}25.00 ± 12.65", "group", "0.01", "200", ""),
        ("trial-003", "failed", "—", "—", "layer", "0.1", "—", "RuntimeError: no memory; not evaluated yet"),
    ]
    assert "1 stopped, 2 finished, 1 failed" in page.text
    assert page.text.count("winnertrial-002") == 1, "the first of the key figures"
    assert "lgm-dist sweep --samples 4" in page.text


def test_a_trial_without_its_checkpoint_has_no_difference(sweep: Path, tmp_path: Path) -> None:
    shutil.rmtree(sweep / "trials/trial-001/checkpoints")
    page = Page(write_report([sweep], tmp_path))
    assert columns(page.tables["Trials of norms"], "val accuracy", "minus the first")[1] == ("40.00 ± 1.00 %", "—")


def test_a_trial_counts_by_the_checkpoint_that_it_has(sweep: Path, tmp_path: Path) -> None:
    """Trial 1 had 40 % at step 200, then took over another's checkpoint and was left with that of step 300."""
    checkpoints = sweep / "trials/trial-001/checkpoints"
    folder = (checkpoints / "step-00000200").rename(checkpoints / "step-00000300")
    (folder / "state.json").unlink()
    write_state(folder, TrainState(300, 0.38, 0.01), BASE)
    board = Page(write_report([sweep], tmp_path)).tables["Trials of norms"]
    assert columns(board, "trial", "val accuracy", "best at step")[1] == ("trial-001", "38.00 ± 1.00 %", "300")


def test_settings_compared_normalisation_first(sweep: Path, tmp_path: Path) -> None:
    # model.norm=batch: 0.5 and 0.4, mean 0.45, std 0.070711, interval 1.96 * 0.070711 / sqrt(2) = 0.098
    assert Page(write_report([sweep], tmp_path)).tables["Settings compared"][1:] == [
        ["model.norm", "batch", "2", "45.00 ± 9.80 %", "50.00 %"],
        ["", "group", "1", "25.00 %", "25.00 %"],
        ["lr", "0.002", "1", "50.00 %", "50.00 %"],
        ["", "0.001", "1", "40.00 %", "40.00 %"],
        ["", "0.01", "1", "25.00 %", "25.00 %"],
    ]


def test_a_setting_of_many_numbers_is_a_chart(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", {"name": "s"})
    for number in range(6):
        write_trial(folder, number, BASE, curve(0.3 + number / 100), {"lr": 10.0**-number})
    page = Page(write_report([folder], tmp_path))
    assert "Settings compared" not in page.tables
    svg = page.source.split("Val accuracy by lr")[1].split("</svg>")[0]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*var\(--s0\)', svg)]
    steps = np.diff(np.array(sorted(dots)), axis=0)
    assert len(dots) == 6
    np.testing.assert_allclose(steps, np.broadcast_to(steps.mean(0), (5, 2)), atol=0.03, err_msg="log x, 1 % apart")


def test_the_winners_test_accuracy_is_only_that_trials(sweep: Path, tmp_path: Path) -> None:
    (sweep / "winner.json").write_text(json.dumps(TESTED | {"trial": 2}))
    assert columns(Page(write_report([sweep], tmp_path)).tables["Runs"], "run", "test accuracy") == [
        ("norms: trial-002 (winner)", "33.38 ± 0.41 % (n = 2,000)")
    ]
    (sweep / "winner.json").write_text(json.dumps(TESTED | {"trial": 1}))  # from before trial 2 came first
    assert columns(Page(write_report([sweep], tmp_path)).tables["Runs"], "test accuracy") == [("not evaluated",)]


def test_ways_and_shots(tmp_path: Path) -> None:
    for ways, shot, accuracy in ((5, 1, 0.33), (5, 5, 0.41), (20, 1, 0.12)):
        config = BASE.replace(name=f"r{ways}-{shot}", ways=ways, shot=shot)
        write_run(tmp_path / config.run.name, config, curve(), result={"test/accuracy": accuracy, "test/ci95": 0.01})
    config = BASE.replace(name="late", ways=20, shot=5)
    write_run(tmp_path / "late", config, curve(0.15))
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert page.tables["Ways and shots, each network evaluated as it was trained"] == [
        ["", "1-shot", "5-shot"],
        ["5-way", "33.00 ± 1.00 % test, r5-1", "41.00 ± 1.00 % test, r5-5"],
        ["20-way", "12.00 ± 1.00 % test, r20-1", "15.00 ± 1.00 % val, late"],
    ]


def test_protocols_are_never_mixed_in_a_table(tmp_path: Path) -> None:
    for name, protocol, shot in (("a", "standard", 1), ("b", "standard", 5), ("c", "paper", 1), ("d", "paper", 5)):
        config = BASE.replace(name=name, protocol=protocol, shot=shot)  # type: ignore[arg-type]
        write_run(tmp_path / name, config, curve())
    source = Page(write_report([tmp_path], tmp_path / "out")).source
    tables = re.findall(r'title="Ways and shots.*?</table>', source, flags=re.DOTALL)
    assert [re.findall(r"val, (\w)(.*?)</td>", table) for table in tables] == [
        [("a", ""), ("b", "")],
        [("c", " (paper: leaks the label)"), ("d", " (paper: leaks the label)")],
    ]


def test_ways_and_shots_of_training_at_one_target(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", {"name": "s"})
    for number, (ways, shot, best) in enumerate(((5, 1, 0.3), (20, 1, 0.31), (20, 5, 0.29))):
        config = BASE.replace(ways=ways, shot=shot, eval_ways=5, eval_shot=1, test_episodes=0)
        write_trial(folder, number, config, curve(best), {"ways": ways, "shot": shot})
    assert Page(write_report([folder], tmp_path)).tables[
        "Ways and shots of training, all evaluated on 5-way 1-shot"
    ] == [
        ["", "1-shot", "5-shot"],
        ["5-way", "30.00 ± 1.00 % val, trial-000", "—"],
        ["20-way", "31.00 ± 1.00 % val, trial-001", "29.00 ± 1.00 % val, trial-002"],
    ]


def test_the_grid_of_evaluate(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", BASE.replace(name="a"), curve())
    cell = {"split": "test", "protocol": "standard", "draws": 0, "episodes": 2000}
    scores = ((5, 1, 0.3338), (5, 5, 0.4139), (20, 1, 0.1197), (20, 5, 0.1571))
    results = [
        cell | {"ways": w, "shot": s, "scores": {"mean noise": {"accuracy": a, "ci95": 0.001}}} for w, s, a in scores
    ]
    (run / "evaluation-test.json").write_text(json.dumps({"results": results}))
    assert Page(write_report([run], tmp_path)).tables["Ways and shots, a on test, protocol standard, mean noise"] == [
        ["", "1-shot", "5-shot"],
        ["5-way", "33.38 ± 0.10 %", "41.39 ± 0.10 %"],
        ["20-way", "11.97 ± 0.10 %", "15.71 ± 0.10 %"],
    ]


def test_a_real_run(small: Config, tmp_path: Path) -> None:
    """And what the fabricated ones have in common with it."""
    config = small.replace(name="real", storage=str(tmp_path), wandb="disabled")
    run = Path((job := make_job(config)).run)
    train(job)
    assert row(1, (0.3, 0.01)).keys() == read_metrics(run)[-1].keys()
    assert FACTS.keys() == json.loads((run / "facts.json").read_text()).keys()
    result = read_result(run)
    page = Page(write_report([run], tmp_path / "out"))
    percents = [f"{100 * result[f'{s}/accuracy']:.2f} ± {100 * result[f'{s}/ci95']:.2f} %" for s in ("test", "val")]
    assert columns(page.tables["Runs"], "run", "test accuracy", "val accuracy", "evaluated at", "trained on") == [
        ("real", f"{percents[0]} (n = 6)", percents[1], "3-way 2-shot", "48 episodes")
    ]
    assert "not finished" not in page.text


def test_normalisation_of_runs_on_the_same_episodes(tmp_path: Path) -> None:
    for name, norm, best in (("a", "batch", 0.31), ("b", "batch", 0.33), ("c", "group", 0.25)):
        config = BASE.replace(name=name, model=ModelConfig(norm=norm))  # type: ignore[arg-type]
        write_run(tmp_path / name, config, curve(best))
    write_run(tmp_path / "d", BASE.replace(name="d", eval_ways=20, model=ModelConfig(norm="layer")), curve(0.1))
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert page.tables["Normalisation, runs evaluated on 5-way 1-shot (standard)"][1:] == [
        ["model.norm", "batch", "2", "32.00 ± 1.96 %", "33.00 %"],
        ["", "group", "1", "25.00 %", "25.00 %"],
    ]
    assert sum(title.startswith("Normalisation") for title in page.tables) == 1, "d has nothing to be compared with"


def test_speed_and_scaling(tmp_path: Path) -> None:
    for name, workers, speeds in (("one", 1, (50.0, 100.0, 120.0)), ("two", 2, (10.0, 150.0, 160.0))):
        rows = [row(step, speed__episodes_per_s=speed) for step, speed in enumerate(speeds, 1)]
        write_run(tmp_path / name, BASE.replace(name=name, workers=workers, query=3), rows, {"world_size": workers})
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert columns(page.tables["Throughput"], "run", "workers", "episodes/s", "images/s", "peak memory") == [
        ("one", "1", "100.0", "2,000", "1.00 GiB"),
        ("two", "2", "150.0", "3,000", "1.00 GiB"),
    ]
    assert page.tables["Scaling, 5-way 1-shot, 10 episodes a step"][1:] == [
        ["1", "1", "100.0", "1.00", "100 %"],
        ["2", "1", "150.0", "1.50", "75 %"],
    ]


def test_pictures_lie_inside_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", BASE, curve())
    for name in ("curves.png", "episode.png", "confusion.png", "weights.png", "else.png"):
        (run / name).write_bytes(PNG)
    page = Page(write_report([run], tmp_path))
    assert page.addresses.count("data:image/png;base64," + base64.b64encode(PNG).decode()) == 4


def test_the_page_asks_for_nothing_and_runs_nothing(sweep: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", BASE, curve(), result=TESTED)
    (run / "curves.png").write_bytes(PNG)
    page = Page(write_report([sweep, run], tmp_path))
    assert [address for address in page.addresses if not address.startswith(("data:", "#"))] == []
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_names_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)<b onclick='x'>&\""
    write_run(tmp_path / "a", BASE.replace(name=hostile), curve(), {"commit": hostile, "machine": hostile}, TESTED)
    folder = write_sweep(tmp_path / "s", {"name": hostile, "space": hostile, "command": [hostile]})
    for number in range(2):
        write_trial(folder, number, BASE, curve(), {hostile: hostile}, error=hostile, status=hostile)
    page = Page(write_report([tmp_path / "a", folder], tmp_path))
    assert not page.tags & {"script", "b"}
    assert "onclick=" not in re.sub(r"&[^;]*;", "", page.source.replace("onclick=&#x27;x&#x27;", ""))
    assert columns(page.tables["Runs"], "run")[0] == (hostile,)
    assert columns(page.tables[f"Trials of {hostile}"], "status", hostile, "remark")[0] == (hostile, hostile, hostile)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "young", BASE.replace(name="young"), [row(1), row(2)])
    write_run(tmp_path / "unborn", BASE.replace(name="unborn"), [])
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert "young: not finished (step 2 of 300); not evaluated yet" in page.text
    assert "unborn: not finished (step 0 of 300); not evaluated yet" in page.text
    assert columns(page.tables["Runs"], "run", "val accuracy", "trained on") == [
        ("unborn", "—", "0 episodes"),
        ("young", "—", "20 episodes"),
    ]


def test_a_diverged_run_is_drawn_as_far_as_it_has_numbers(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [row(1, (nan, nan)) | {"train/loss": nan}, row(2, (0.3, 0.01)) | {"train/loss": inf}, row(3)]
    page = Page(write_report([write_run(tmp_path / "a", BASE, rows)], tmp_path))
    assert columns(page.tables["Runs"], "val accuracy", "trained on") == [("30.00 ± 1.00 %", "30 episodes")]
    assert "nan" not in page.source.replace("nano", "")


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b"\xff\xfe\x00",
    b'{"results": 3, "number": 1, "sample": []}',
    b'{"step": 1}\n{"st\n',
]
RUN_FILES = ("config.json", "facts.json", "result.json", "metrics.jsonl", "evaluation-test.json", "curves.png")
SWEEP_FILES = (
    *("sweep.json", "winner.json"),
    *(f"trials/trial-001/{name}" for name in ("trial.json", "metrics.jsonl", "config.json")),
    *(f"trials/trial-001/checkpoints/step-00000200/{name}" for name in ("val.npy", "state.json")),
)


@pytest.mark.filterwarnings("ignore:checkpoint")  # the reader of checkpoints names a damaged one
@pytest.mark.parametrize(("place", "name"), list(enumerate([*RUN_FILES, *SWEEP_FILES])))
def test_damage_costs_what_is_damaged_and_no_more(place: int, name: str, sweep: Path, tmp_path: Path) -> None:
    """Each file with two kinds of damage, so that all kinds come by."""
    run = write_run(tmp_path / "a", BASE.replace(name="a"), curve(), result=TESTED)
    for garbage in (GARBAGE[place % len(GARBAGE)], GARBAGE[(place + 3) % len(GARBAGE)]):
        ((run if name in RUN_FILES else sweep) / name).write_bytes(garbage)
        page = Page(write_report([run, sweep], tmp_path / "out"))
        accuracies = [accuracy for (accuracy,) in columns(page.tables["Runs"], "val accuracy")]
        assert accuracies == ["—" if name == "metrics.jsonl" else "30.00 ± 1.00 %", "50.00 ± 1.00 %"]
        board = next(table for title, table in page.tables.items() if title.startswith("Trials of"))
        assert len(board) == 5, "every trial has its row"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config.json", "a does not hold a run (config.json"),
        ("facts.json", "facts.json is damaged"),
        ("result.json", "result.json is damaged"),
        ("metrics.jsonl", "is damaged at line 1"),
        ("evaluation-test.json", "evaluation-test.json is damaged"),
        ("curves.png", "curves.png is damaged"),
    ],
)
def test_damage_is_named(name: str, line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", BASE.replace(name="a"), curve(), result=TESTED)
    (run / name).write_bytes(b"{\n")
    assert line in Page(write_report([run], tmp_path)).text


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="contains no run and no sweep; name a folder"):
            write_report([path], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("sweep")
def test_a_folder_of_runs_and_sweeps_shows_both(tmp_path: Path) -> None:
    write_run(tmp_path / "a", BASE.replace(name="a"), curve())
    page = Page(write_report([tmp_path], tmp_path / "out"))
    assert columns(page.tables["Runs"], "run") == [("a",), ("norms: trial-002 (winner)",)]


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
QUIET = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
PROBE = """<script>addEventListener("load", () => { const all = [...document.images], root = document.documentElement;
 document.querySelectorAll("details").forEach(d => { d.open = true; });
 parent.document.title = JSON.stringify({ width: innerWidth, scroll: root.scrollWidth, height: root.scrollHeight,
  pictures: all.filter(i => i.naturalWidth > 0).length, broken: all.filter(i => i.naturalWidth == 0).length,
  charts: [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 100).length,
  tables: [...document.querySelectorAll(".scroll")].filter(d => d.scrollWidth > d.clientWidth).length,
  asked: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")) }); });</script>"""


def browse(page: Path, folder: Path, width: int, scheme: str) -> tuple[dict[str, Any], Path]:
    """What the browser makes of a page that is `width` wide (a frame, as a window has a least width), and a screenshot."""
    import html

    dark = ["--blink-settings=preferredColorScheme=" + {"dark": "0", "light": "1"}[scheme]]
    inside = html.escape(page.read_text().replace("</body>", PROBE + "</body>"))
    frame = folder / f"{width}-{scheme}.html"
    frame.write_text(
        f'<body style="margin:0"><iframe srcdoc="{inside}" style="border:0;width:{width}px;height:1600px"></iframe>'
    )
    start = [BROWSER, *QUIET, *dark, f"--window-size={max(width, 500)},1600"]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}

    def run(*flags: str) -> str:
        user = f"--user-data-dir={folder / f'user-{width}-{scheme}'}"
        done = subprocess.run(
            [*start, user, *flags, frame.as_uri()], capture_output=True, text=True, timeout=60, env=environment
        )
        return done.stdout

    found = re.search(r"<title>(\{.*?\})</title>", run("--dump-dom"))
    assert found, "the page has loaded"
    picture = folder / f"{width}-{scheme}.png"
    run(f"--screenshot={picture}")
    return json.loads(html.unescape(found[1])), picture


@pytest.mark.skipif(not BROWSER, reason="no Chromium (chromium, chromium-browser, google-chrome) on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark")])
def test_in_a_browser(width: int, scheme: str, sweep: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", BASE.replace(name="a" * 80), curve(), result=TESTED)
    for name in ("curves.png", "weights.png"):
        Image.new("RGB", (1500, 400), "white").save(run / name)
    found, picture = browse(write_report([run, sweep], tmp_path), tmp_path, width, scheme)
    assert (found["width"], found["scroll"]) == (width, width), "nothing but the tables scrolls sideways"
    assert (found["pictures"], found["broken"], found["asked"]) == (2, 0, [])
    assert found["charts"] == 4, "loss and val accuracy of the run, val accuracy of the sweep by time and by step"
    if width == 400:
        assert found["tables"] >= 3, "wide tables scroll inside themselves"
    pixels = np.asarray(Image.open(picture).convert("L"))[:, :width].astype(float)
    assert pixels.std() > 10, "something is drawn"
    assert (pixels.mean() < 80) if scheme == "dark" else (pixels.mean() > 200)
