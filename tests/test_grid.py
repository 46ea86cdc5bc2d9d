"""lgm-dist grid as a user runs it: what each cell trains on, what the tables say, what a failure, stop or kill leaves."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.waiting import LIMIT, wait_for

from lgm_dist.cli.grid import main
from lgm_dist.cluster import connection as ray_cluster
from lgm_dist.cluster import fit as ray_train
from lgm_dist.config import SPLITS, Config
from lgm_dist.console import run_command
from lgm_dist.data import open_bank, sample_episodes
from lgm_dist.errors import RunFailed
from lgm_dist.runs.checkpoint import best, load_model
from lgm_dist.runs.folder import read_config
from lgm_dist.runs.metrics import MetricsLog, read_metrics
from lgm_dist.sweeps import grid_cells

ROOT = Path(__file__).parents[1]
CELLS = ["2w1s", "2w2s", "3w1s", "3w2s"]
SMALL = "--query 2 --eval-query 3 --meta-batch 4 --epochs 1 --steps-per-epoch 12 --eval-every 4 --lr-decay-steps 12"
SMALL += (
    " --eval-episodes 6 --test-episodes 20 --lr 1e-2 --workers 0 --model.filters 8 --model.noise-size 4 --name table"
)
RESULT = {
    "protocol": "standard",
    "val/accuracy": 0.25,
    "val/ci95": 0.0125,
    "step": 4,
    "train/seconds": 960.0,
    "memory/peak_bytes": 1.5 * 2**30,
    "test/accuracy": 0.3338,
    "test/ci95": 0.0041,
    "test/episodes": 20,
}
"""By hand, with step counts added for each cell."""
FACTS = {"commit": "abc", "device": "cpu", "machine": "some, 2 CPUs"}


@pytest.fixture(autouse=True, scope="module")
def _decoded(tiny: Path) -> None:
    """The images are decoded, so that a command does not say that it decodes them."""
    for split in SPLITS:
        open_bank(str(tiny), split)


def command(tiny: Path, storage: Path, more: str = "", ways: str = "2 3") -> list[str]:
    return f"--ways {ways} --shots 1 2 {SMALL} --data {tiny} --storage {storage} {more}".split()


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["tune/grid.py", *arguments])
    return run_command(main)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that were trained, by a training that only writes down a result."""
    names = []

    def fit(config: Config, group: str) -> Path:
        assert group == Path(config.run.storage).name
        names.append(config.run.name)
        folder = Path(config.run.storage) / config.run.name
        steps = {
            "train/steps": config.episodes.steps,
            "train/episodes": config.episodes.steps * config.episodes.meta_batch,
        }
        (folder / "result.json").write_text(json.dumps(RESULT | steps))
        (folder / "facts.json").write_text(json.dumps(FACTS))
        return folder

    monkeypatch.setattr(ray_train, "fit", fit)
    return names


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that was really trained, with its cross evaluation; returns its folder."""
    storage = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ray_train, "draw", lambda _: None)
        assert run(command(tiny, storage, "--cross"), monkeypatch) == 0
    return storage / "table"


def markdown(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text."""
    blocks = [block for block in text.split("\n\n") if block.lstrip().startswith("|")]
    lines = [[line for line in block.splitlines() if line.startswith("| ")] for block in blocks]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block] for block in lines]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_cell_sees_as_many_images_as_5_way_1_shot_would(trained: Path) -> None:
    # 5-way 1-shot: 4 episodes of 5 * (1 + 2) = 60 images a step, 12 steps, 3 evaluations, lr_decay_steps 12: 720 images.
    # 2w1s 24 images a step, so 2.5 times the steps; 2w2s 32, 1.875; 3w1s 36, 1.667; 3w2s 48, 1.25.
    expected = {"2w1s": (30, 10, 30), "2w2s": (24, 8, 22), "3w1s": (21, 7, 20), "3w2s": (15, 5, 15)}
    for name, (steps, every, decay) in expected.items():
        config = read_config(trained / name)
        assert (config.episodes.steps, config.episodes.eval_every, config.optim.lr_decay_steps) == (steps, every, decay)
        assert (config.episodes.ways, config.episodes.shot, config.episodes.eval_ways, config.episodes.eval_shot) == (
            int(name[0]),
            int(name[2]),
            0,
            0,
        )
        assert [row["step"] for row in read_metrics(trained / name) if "val/accuracy" in row] == [
            every,
            2 * every,
            steps,
        ]
    images = [int(row["train_images"]) for row in rows_of(trained / "table.csv")]
    assert images == [30 * 24, 24 * 32, 21 * 36, 15 * 48]


def test_equal_steps_and_the_cheapest_first(
    fits: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(tiny, tmp_path, "--equal-steps", ways="3 2"), monkeypatch) == 0
    assert fits == CELLS
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cell ")]
    shares = ["1.00", "1.33", "1.50", "2.00"]  # 24, 32, 36 and 48 images a step
    assert lines == [
        f"cell {k} of 4: {name}, 12 steps, {share} times the training images of the first cell"
        for k, (name, share) in enumerate(zip(CELLS, shares, strict=True), 1)
    ]
    assert run(command(tiny, tmp_path, "--equal-steps --epochs 2"), monkeypatch) == 0
    assert fits == CELLS * 2  # what was finished goes on where a longer training is asked for


def test_the_table_says_what_the_runs_found(trained: Path) -> None:
    table = markdown((trained / "table.md").read_text())[0]
    assert [row[0] for row in table[1:]] == [f"{n[0]}-way {n[2]}-shot" for n in CELLS]
    cells = json.loads((trained / "table.json").read_text())["cells"]
    for name, cell, row in zip(CELLS, cells, table[1:], strict=True):
        result = json.loads((trained / name / "result.json").read_text())
        assert result.items() <= cell.items()
        assert result["test/episodes"] == 20
        assert row[1] == f"{100 * result['test/accuracy']:.2f} ± {100 * result['test/ci95']:.2f} %"


def test_formats(fits: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(command(tiny, tmp_path), monkeypatch) == 0
    text = (tmp_path / "table" / "table.md").read_text()
    # 2w2s: 24 steps of 4 episodes of 8 images; 960 s are 16 minutes.
    row = ["2-way 2-shot", "33.38 ± 0.41 %", "50 %", "25.00 ± 1.25 %", "96", "768", "16.0 min", "1.50 GiB", "standard"]
    assert markdown(text)[0][2] == row
    assert "over 20 test and 6 val episodes" in text
    assert "commit abc, cpu (some, 2 CPUs)" in text
    assert "lgm-dist grid --ways 2 3 --shots 1 2" in text
    values = rows_of(tmp_path / "table" / "table.csv")[1]
    assert (values["test_accuracy_percent"], values["test_ci95_percent"]) == ("33.38", "0.41")
    assert (values["ways"], values["chance_percent"], values["train_seconds"]) == ("2", "50.0", "960.0")
    assert fits == CELLS


def latex(text: str) -> list[list[list[str]]]:
    """The cells of each tabular of a LaTeX text, which must be one that LaTeX can set."""
    text = re.sub(r"(?<!\\)%.*", "", text)
    for marks in ("{}", "$$"):
        plain = re.sub(r"\\.", "", text)
        assert plain.count(marks[0]) == plain.count(marks[1])
        assert plain.count("$") % 2 == 0
    tables = []
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        assert re.findall(r"\\(\w+rule)", body) == ["toprule", "midrule", "bottomrule"]
        lines = re.sub(r"\\\w+rule\n", "", body).removesuffix("\n")
        assert all(line.endswith(r" \\") for line in lines.split("\n"))
        cells = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines.split("\n")]
        assert {len(row) for row in cells} == {len(columns)}
        tables.append([[set_text(cell) for cell in row] for row in cells])
    return tables


def set_text(cell: str) -> str:
    """What LaTeX sets for a cell."""
    assert not re.search(r"(?<!\\)[_#^~%]", cell)
    return cell.replace(r"$\pm$", "±").replace("---", "—").replace(r"\%", "%").replace(r"\_", "_").strip()


def test_latex_sets_the_same_table(trained: Path) -> None:
    tables = latex((trained / "table.tex").read_text())
    assert len(tables) == 2
    assert tables == markdown((trained / "table.md").read_text())
    assert "33.3 %" in tables[0][3]


def test_protocol_paper_says_that_it_leaks(
    fits: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(command(tiny, tmp_path, "--protocol paper"), monkeypatch) == 0
    folder = tmp_path / "table"
    assert all(row[-1] == "paper: LEAKS THE LABEL" for row in markdown((folder / "table.md").read_text())[0][1:])
    assert "LEAKS THE LABEL: the query is rotated" in (folder / "table.md").read_text()
    assert r"alone give 67.2 \%" in (folder / "table.tex").read_text()
    assert latex((folder / "table.tex").read_text())
    assert {row["leaks_label"] for row in rows_of(folder / "table.csv")} == {"True"}
    # One query an episode: 5-way 1-shot 4 * 6 = 24 images a step, 288 in all; 2w2s 4 * 5 = 20, so round(4 * 1.2) = 5 thrice.
    assert read_config(folder / "2w2s").episodes.steps == 15
    assert fits == ["2w1s", "3w1s", "2w2s", "3w2s"]  # 3, 4, 5 and 7 images an episode


@pytest.mark.parametrize("failure", [RunFailed("worker 0 failed"), ValueError("a bad shard"), OSError("disk full")])
def test_a_failed_cell_ends_the_command_with_the_table_of_the_others(
    failure: Exception,
    fits: list[str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    works = ray_train.fit

    def fails(config: Config, group: str) -> Path:
        if config.run.name == "3w1s":
            raise failure
        return works(config, group)

    with monkeypatch.context() as broken:
        broken.setattr(ray_train, "fit", fails)
        assert run(command(tiny, tmp_path, "--cross"), broken) == 1
    shown = capsys.readouterr()
    assert shown.err == f"grid.py: cell 3w1s: {failure}\n"
    table, cross = markdown((tmp_path / "table" / "table.md").read_text())
    assert table == markdown(shown.out)[0]
    assert [row[1] for row in table[1:]] == ["33.38 ± 0.41 %", "33.38 ± 0.41 %", "—", "—"]
    assert table[3] == ["3-way 1-shot", "—", "33.3 %", "—", "—", "—", "—", "—", "standard"]
    assert [cross[1][1:], cross[3][1:]] == [["33.38 ± 0.41 %", "—", "—", "—"], ["—"] * 4]
    assert latex((tmp_path / "table" / "table.tex").read_text()) == [table, cross]
    assert [row["test_accuracy_percent"] for row in rows_of(tmp_path / "table" / "table.csv")] == [
        "33.38",
        "33.38",
        "",
        "",
    ]
    assert run(command(tiny, tmp_path), monkeypatch) == 0
    assert fits == CELLS
    out = capsys.readouterr().out
    assert "cell 2 of 4: 2w2s, already finished" in out
    assert "—" not in out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--ways 2 7", "cell 7w1s: 7 ways need 7 classes, split train of 'tiny' has 6"),
        ("--shots 1 22", "cell 2w22s: shot (22) + eval_query (3) = 25 images a class"),
        ("--ways 1 2", "ways (1) must be at least 2"),
        ("--ways 2 --shots 0", "shot (0) must be a whole number of at least 1"),
        ("--ways", "ways and shots must each have at least one number"),
        ("--cross --test-episodes 0", "test_episodes (0) must be at least 2 for --cross, which evaluates on test"),
        ("--lr 0", "lr (0.0) must be positive"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_trains(
    more: str,
    sentence: str,
    fits: list[str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(command(tiny, tmp_path / "runs", more), monkeypatch) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert fits == []


def test_other_settings_and_another_runs_folder_are_refused(
    fits: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(tiny, tmp_path), monkeypatch) == 0
    before = (tmp_path / "table" / "table.md").read_text()
    assert run(command(tiny, tmp_path, "--lr 1e-3"), monkeypatch) == 1
    assert "'2w1s' was started with lr 0.01, not 0.001" in capsys.readouterr().err
    assert run(command(tiny, tmp_path / "table", "--name 2w1s"), monkeypatch) == 1
    assert "is the folder of a single run" in capsys.readouterr().err
    assert (tmp_path / "table" / "table.md").read_text() == before
    assert fits == CELLS


@pytest.mark.parametrize("flag", ["--eval-ways", "--no-such-flag"])
def test_flags_that_a_table_does_not_have(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        run([flag, "3"], monkeypatch)
    assert stopped.value.code == 2


def test_cross_evaluation_is_that_of_the_other_cells_episodes(trained: Path, tiny: Path) -> None:
    """The slow way: the first network on each episode of the last cell, one by one."""
    model, config, _ = load_model(best(trained / "2w1s"))
    bank, other = open_bank(str(tiny), "test"), config.replace(ways=3, shot=2)
    accuracies = []
    for i in range(20):
        batch = sample_episodes(bank, other, "test", i, 1)
        guesses = model(batch.support, batch.query, 3).argmax(-1)
        accuracies.append((guesses == batch.labels).double().mean().item())
    expected = f"{100 * np.mean(accuracies):.2f} ± {100 * 1.96 * np.std(accuracies, ddof=1) / 20**0.5:.2f} %"
    cross = markdown((trained / "table.md").read_text())[1]
    assert cross[0][1:] == ["2-way 1-shot", "2-way 2-shot", "3-way 1-shot", "3-way 2-shot"]
    assert cross[1][4] == expected
    own = markdown((trained / "table.md").read_text())[0]
    assert [cross[k][k] for k in range(1, 5)] == [row[1] for row in own[1:]]
    assert cross[5] == ["chance", "50 %", "50 %", "33.3 %", "33.3 %"]
    (pair,) = [
        row for row in rows_of(trained / "cross.csv") if (row["trained_on"], row["evaluated_on"]) == ("2w1s", "3w2s")
    ]
    assert float(pair["accuracy_percent"]) == pytest.approx(100 * np.mean(accuracies), abs=1e-4)


def test_cross_evaluations_are_kept_for_the_checkpoint_that_they_are_of(
    trained: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = grid_cells.evaluate

    def evaluate(model: Any, bank: Any, config: Config, *rest: Any, **more: Any) -> Any:
        asked.append((config.run.name, config.episodes.ways, config.episodes.shot))
        return real(model, bank, config, *rest, **more)

    before = (trained / "table.md").read_text()
    monkeypatch.setattr(grid_cells, "evaluate", evaluate)
    again = command(tiny, trained.parent, "--cross")
    assert run(again, monkeypatch) == 0
    assert asked == []
    kept = json.loads((trained / "2w2s" / "cross.json").read_text())
    (trained / "2w2s" / "cross.json").write_text(json.dumps(kept | {"step": kept["step"] + 1}))
    assert run(again, monkeypatch) == 0
    assert asked == [("2w2s", 2, 1), ("2w2s", 3, 1), ("2w2s", 3, 2)]
    assert (trained / "table.md").read_text() == before


@pytest.mark.parametrize("ours", [True, False])
def test_one_ray_for_all_cells(
    ours: bool, fits: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def connect(cpus: int) -> bool:
        events.append(f"connect {cpus}")
        return ours

    def fit(config: Config, group: str) -> Path:
        events.append(config.run.name)
        if config.run.name == "2w2s":
            raise RunFailed("worker 0 failed")
        return works(config, group)

    works = ray_train.fit
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(ray_cluster, "connect", connect)
    monkeypatch.setattr(ray_cluster, "disconnect", lambda: events.append("disconnect"))
    arguments = command(tiny, tmp_path, "--workers 2 --cpus-per-worker 2")
    with monkeypatch.context() as broken:
        broken.setattr(ray_train, "fit", fit)
        assert run(arguments, broken) == 1
    end = ["disconnect"] * ours
    assert events == ["connect 4", "2w1s", "2w2s", *end]  # two workers of 2 threads need more than the 3 CPUs
    for more in (["connect 4", *end], []):  # nothing is left to train the last time
        events.clear()
        assert run(arguments, monkeypatch) == 0
        assert events == more
    assert fits == CELLS


def test_ctrl_c_while_no_run_listens_for_it(
    fits: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: list[Config]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grid_cells, "cross_evaluate", interrupted)
    assert run(command(tiny, tmp_path, "--cross"), monkeypatch) == 1
    shown = capsys.readouterr()
    assert shown.err == "grid.py: stopped; the same command continues\n"
    assert [row[1] for row in markdown(shown.out)[0][1:]] == ["33.38 ± 0.41 %"] * 4
    assert fits == CELLS


LONG = "--steps-per-epoch 60 --eval-every 10"
"""Cell 2w2s has 6 evaluations, one every round(10 * 1.875) = 19 steps: 114 steps."""


def at_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Acts when cell 2w2s has written the row of this step."""
    write = MetricsLog.write

    def writes(self: MetricsLog, now: int, metrics: dict[str, float]) -> None:
        write(self, now, metrics)
        if now == step and "2w2s" in self._file.name:
            act()

    monkeypatch.setattr(MetricsLog, "write", writes)


def test_sigterm_leaves_a_checkpoint_and_the_table(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_train, "draw", lambda _: None)
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    assert run(command(tiny, tmp_path, LONG, ways="2"), monkeypatch) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert re.search(r"grid.py: cell 2w2s: stopped with a checkpoint of step [23];", capsys.readouterr().err)
    table = markdown((tmp_path / "table" / "table.md").read_text())[0]
    assert "±" in table[1][1]
    assert table[2][1] == "—"


WAITS = """
import sys, time
from lgm_dist.cli.grid import main
from lgm_dist.console import run_command
from lgm_dist.runs.metrics import MetricsLog
write = MetricsLog.write
def writes(self, step, metrics):
    write(self, step, metrics)
    if step == 26:
        time.sleep(10**6)
MetricsLog.write = writes
sys.exit(run_command(main))
"""
"""The command, with a training that waits to be killed after step 26."""


def test_a_killed_table_goes_on_where_it_was(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "draw", lambda _: None)
    arguments = command(tiny, tmp_path, LONG, ways="2")
    assert run([*arguments, "--shots", "1"], monkeypatch) == 0
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    first, second = tmp_path / "table" / "2w1s", tmp_path / "table" / "2w2s"
    wait_for(lambda: len(read_metrics(second)) == 26, "step 26", process)
    process.kill()
    out, error = process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGKILL, error
    assert out.splitlines()[0] == b"cell 1 of 2: 2w1s, already finished"
    assert out.splitlines()[1].startswith(b"cell 2 of 2: 2w2s, 114 steps, ")
    assert (second / "checkpoints" / "step-00000019").exists()
    assert not (second / "result.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (first / "result.json", first / "metrics.jsonl")}

    assert run(arguments, monkeypatch) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    whole = ray_train.fit(read_config(second).replace(storage=str(tmp_path / "whole")))
    assert [row["step"] for row in read_metrics(second)] == list(range(1, 115))
    for name in ("train/loss", "optim/grad_norm"):
        assert [row[name] for row in read_metrics(second)] == [row[name] for row in read_metrics(whole)]
    figures = [json.loads((folder / "result.json").read_text()) for folder in (second, whole)]
    assert figures[0]["test/accuracy"] == figures[1]["test/accuracy"]
