"""The tables that a sweep writes at its end, from fabricated sweeps whose numbers are worked out by hand."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import results
from swept import BASE, add, begin, same, winner_and_second

from lgm_dist.config import Config
from lgm_dist.runs.sweep_folder import read_sweep


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the sweep `swept`, still without trials, that spares the seconds which the pictures take."""
    monkeypatch.setattr(results, "draw", lambda _: [])
    return begin(tmp_path / "swept")


def cells(sweep: Path) -> list[dict[str, str]]:
    """The rows of results.csv."""
    results.write_results(sweep)
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows(markdown: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is `first`."""
    after = iter(markdown.splitlines())
    header = next(line for line in after if line.startswith(f"| {first} "))
    body = itertools.takewhile(lambda line: line.startswith("|"), after)
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in [header, *body]]
    return found[2:]


def test_csv(sweep: Path) -> None:
    """Differences -.25, 0, -.25, -.25: mean -.1875, s = .125, 1.96 * .125 / sqrt(4) = .1225. 4 * 5 * (1 + 1) images a step."""
    winner_and_second(sweep)
    first, second = cells(sweep)
    assert first == {
        "trial": "0",
        "status": "finished",
        "protocol": "standard",
        "lr": "0.001",
        "model.norm": "batch",
        "model.norm_scope": "global",
        "val_accuracy": "50.0",
        "val_ci95": "1.0",
        "best_step": "20",
        "best_images": "800",
        "last_step": "20",
        "last_images": "800",
        "seconds": "60.0",
        "difference": "0.0",
        "difference_ci95": "0.0",
        "exploits": "",
        "error": "",
    }
    assert second == first | {
        "trial": "1",
        "status": "stopped",
        "lr": "0.01",
        "model.norm": "group",
        "model.norm_scope": "",
        "val_accuracy": "31.25",
        "best_step": "10",
        "best_images": "400",
        "difference": "-18.75",
        "difference_ci95": "12.25",
    }


@pytest.mark.parametrize(
    ("base", "own", "images"),
    [
        (BASE, {"ways": 10, "shot": 2, "meta_batch": 2}, 10 * 2 * 10 * (2 + 1)),
        (BASE, {"query": 4}, 10 * 4 * 5 * (1 + 4)),
        (Config.of(protocol="paper", query=4), {"meta_batch": 4}, 10 * 4 * (5 * 1 + 1)),
    ],
)
def test_images_are_those_of_the_trials_own_configuration(
    sweep: Path, base: Config, own: dict[str, Any], images: int
) -> None:
    begin(sweep, base)
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.5), config=own)
    assert cells(sweep)[0]["best_images"] == str(images)


def test_leaderboard(sweep: Path) -> None:
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.25))
    winner_and_second(sweep)
    results.write_results(sweep)
    text = (sweep / "comparison.md").read_text()
    assert text == results.markdown(read_sweep(sweep)), "what is printed is what is written"
    assert rows(text, "trial") == [
        ["1", "0.001", "batch", "global", "50.00 ± 1.00 %", "winner", "finished", "800", "1.0"],
        ["2", "0.01", "group", "", "31.25 ± 1.00 %", "-18.75 ± 12.25", "stopped", "800", "1.0"],
        ["0", "0.001", "group", "", "25.00 ± 1.00 %", "-25.00 ± 20.00", "finished", "400", "0.5"],  # s = .20412
    ]
    assert "3 trials: 2 finished, 1 stopped." in text
    assert "chance 20 %" in text


def test_table_of_each_parameter(sweep: Path) -> None:
    """50 % and 30 %: mean 40 %, s = 14.142, 1.96 * 14.142 / sqrt(2) = 19.6. A third of the range of lr is 2/3 of a decade."""
    add(sweep, {"lr": 3e-4, "model.norm": "batch", "model.norm_scope": "global"}, same(0.5))
    add(sweep, {"lr": 5e-3, "model.norm": "batch", "model.norm_scope": "global"}, same(0.3))
    add(sweep, {"lr": 1e-4, "model.norm": "group"}, same(0.25))
    text = results.markdown(read_sweep(sweep))
    assert rows(text, "model.norm") == [["batch", "2", "40.00 ± 19.60 %"], ["group", "1", "25.00 %"]]
    assert rows(text, "model.norm_scope") == [["global", "2", "40.00 ± 19.60 %"], ["episode", "0", ""]]
    assert rows(text, "lr") == [
        ["0.0001 to 0.000464", "2", "37.50 ± 24.50 %"],
        ["0.000464 to 0.00215", "0", ""],
        ["0.00215 to 0.01", "1", "30.00 %"],
    ]
    assert "### model.norm_scope (where model.norm is batch)\n" in text


def test_trials_without_an_evaluation_are_listed(sweep: Path) -> None:
    winner_and_second(sweep)
    add(sweep, {"lr": 1e-4, "model.norm": "group"}, status="failed", error="OutOfMemoryError: no room")
    failed = cells(sweep)[2]
    assert (failed["trial"], failed["status"], failed["error"]) == ("2", "failed", "OutOfMemoryError: no room")
    assert failed["lr"] == "0.0001"
    names = (
        "val_accuracy",
        "val_ci95",
        "best_step",
        "best_images",
        "last_step",
        "last_images",
        "seconds",
        "difference",
    )
    assert {failed[name] for name in names} == {""}
    text = (sweep / "comparison.md").read_text()
    assert "- trial 2 has no evaluation: OutOfMemoryError: no room\n" in text
    assert len(rows(text, "trial")) == 2


@pytest.mark.parametrize(("evaluated", "failed"), [(0, 0), (0, 1), (1, 0), (2, 1)])
def test_files(tmp_path: Path, evaluated: int, failed: int) -> None:
    """Tables always; how training went needs one evaluated trial, what compares trials needs two."""
    begin(tmp_path)
    for accuracy in (0.5, 0.25)[:evaluated]:
        add(tmp_path, {"lr": 1e-3, "model.norm": "group"}, same(accuracy))
    for _ in range(failed):
        add(tmp_path, {"lr": 1e-3, "model.norm": "group"}, status="failed", error="it broke")
    pictures = {"parallel.png": 2, "importance.png": 2, "time.png": 1}
    drawn = [name for name, needed in pictures.items() if evaluated >= needed]
    paths = results.write_results(tmp_path)
    assert [path.name for path in paths] == ["results.csv", "comparison.md", *drawn]
    assert all(path.parent == tmp_path and path.exists() for path in paths)
    notes = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("- no ")]
    needs = {1: "1 evaluated trial", 2: "2 evaluated trials"}
    assert notes == [f"- no {p}: it needs {needs[n]}, not {evaluated}" for p, n in pictures.items() if p not in drawn]


def test_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no sweep"):
        results.write_results(tmp_path)


def test_the_best_evaluation_is_that_of_the_best_checkpoint_left(sweep: Path) -> None:
    """The evaluation at step 10 was better; at step 20 -.25, 0, -.5, -.25 to the winner: s = .20412, / 2 * 1.96 = .20004."""
    winner_and_second(sweep)
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.375), same(0.25), kept=1)
    add(sweep, {"lr": 1e-3, "model.norm": "group"}, same(0.375), kept=0, status="stopped")
    *_, third, fourth = cells(sweep)
    names = ("val_accuracy", "best_step", "best_images", "difference", "difference_ci95")
    assert [third[name] for name in names] == ["25.0", "20", "800", "-25.0", "20.004166"]
    assert [fourth[name] for name in names] == [""] * 5
    text = (sweep / "comparison.md").read_text()
    assert [row[0] for row in rows(text, "trial")] == ["0", "1", "2"]
    assert "- trial 3 has no evaluation: stopped\n" in text


def test_no_difference_without_the_accuracies_of_the_episodes(sweep: Path) -> None:
    winner_and_second(sweep)
    (sweep / "trials/trial-001/checkpoints/step-00000010/val.npy").unlink()
    second = cells(sweep)[1]
    assert (second["val_accuracy"], second["difference"], second["difference_ci95"]) == ("31.25", "", "")
    assert rows((sweep / "comparison.md").read_text(), "trial")[1][4:6] == ["31.25 ± 1.00 %", ""]


@pytest.mark.parametrize(("accuracies", "lr"), [((0.3, 0.4), "0.02"), ((0.4, 0.3), "0.001")])
def test_exploits(sweep: Path, accuracies: tuple[float, float], lr: str) -> None:
    """The sample is the one in force at the best evaluation; perturbed values may lie outside the space."""
    exploits = [{"step": 10, "from": 0, "sample": {"lr": 0.02, "model.norm": "group"}}]
    add(sweep, {"lr": 1e-4, "model.norm": "group"}, same(0.5))
    sample = {"lr": 1e-3, "model.norm": "group"}
    add(sweep, sample, *(same(a) for a in accuracies), exploits=exploits)
    row = cells(sweep)[1]
    assert (row["lr"], row["exploits"]) == (lr, "step 10 from trial 0")
    assert sum(int(row[1]) for row in rows((sweep / "comparison.md").read_text(), "lr")) == 2


def test_protocol_paper_says_that_it_leaks(sweep: Path) -> None:
    begin(sweep, Config.of(protocol="paper"))
    winner_and_second(sweep)
    assert cells(sweep)[0]["protocol"] == "paper (LEAKS the label)"
    assert "LEAKS THE LABEL" in (sweep / "comparison.md").read_text()
