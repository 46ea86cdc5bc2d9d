"""The scripts as a user runs them: bad input ends in one sentence and status 1 before Ray starts; evaluate's grid."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lgm_dist.cluster import fit as ray_train
from lgm_dist.cluster.fit import fit
from lgm_dist.config import Config
from lgm_dist.console import run_command

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # tyro looks up the annotations of its dataclass there
    spec.loader.exec_module(module)
    return module


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return run_command(script(name).main)


@pytest.fixture
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any) -> None:
        raise AssertionError("Ray was about to start")

    monkeypatch.setattr(ray_train, "prepare_for_ray", started)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the data set `tiny` to damage, with a cache of its own: returns the manifest."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in tiny.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / tiny.name


def missing(shard: Path) -> None:
    shard.unlink()


def truncated(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def flipped(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))


@pytest.mark.usefixtures("_no_ray")
@pytest.mark.parametrize("damage", [missing, truncated, flipped])
def test_a_bad_shard_is_named_with_the_command_that_mends_it(
    damage: Any, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next(copy.parent.glob("tiny-val-*.tar"))
    damage(shard)
    arguments = ["--data", str(copy), "--cache", str(tmp_path / "cache"), "--workers", "2", "--storage", str(tmp_path)]
    assert run("train", [*arguments, "--name", "run"], monkeypatch) == 1
    *decoding, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("decoding 144 images of tiny, split ") for line in decoding)
    assert error.startswith("train.py: ")
    assert shard.name in error
    assert "prepare" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_no_ray")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ways", "20"], "20 ways need 20 classes, split train of 'tiny' has 6"),
        (["--shot", "10", "--query", "15"], "shot (10) + query (15) = 25 images a class"),
        (["--meta-batch", "10", "--workers", "4"], "meta_batch (10) must be divisible by workers (4); use 8 or 12"),
        (["--lr", "0"], "lr (0.0) must be positive"),
        (["--preset", "huge"], "preset ('huge') must be one of paper, strong, quick, demo"),
        (["--data", "nowhere"], "data ('nowhere') is no data set"),
        (["--data", "nowhere.json"], "there is no manifest nowhere.json"),
    ],
)
def test_bad_settings_end_in_one_sentence(
    arguments: list[str],
    sentence: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = tmp_path / "runs"
    places = ["--data", str(tiny), "--storage", str(storage), "--data-root", str(tmp_path), "--workers", "2"]
    assert run("train", [*places, *arguments], monkeypatch) == 1
    *before, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("decoding 144 images of tiny, split ") for line in before)
    assert error.startswith("train.py: ")
    assert sentence in error
    assert not storage.exists()


@pytest.mark.parametrize(("name", "arguments"), [("train", []), ("evaluate", ["runs/some"]), ("prepare", ["glyphs"])])
def test_an_unknown_flag_is_named(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(name, [*arguments, "--no-such-flag", "1"], monkeypatch)
    assert stopped.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"ways": 3, "query": 2, "epochs": 1, "steps_per_epoch": 6, "meta_batch": 4, "eval_every": 3, "workers": 0}
    counts = {"eval_episodes": 5, "test_episodes": 10, "eval_query": 3}
    places = {"data": str(tiny), "storage": str(tmp_path_factory.mktemp("runs")), "name": "run"}
    return fit(Config.from_dict(small | counts | places))


def test_evaluate_prints_and_writes_the_grid(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--ways", "2", "3", "--shot", "1", "5", "--protocol", "standard", "paper", "--episodes", "30"]
    assert run("evaluate", [str(trained), *grid, "--draws", "3"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.count("| test ") == 2 * 2 * 2 * 3
    assert "LEAKS THE LABEL" in out
    results = json.loads((trained / "evaluation-test.json").read_text())["results"]
    cells = [(r["protocol"], r["ways"], r["shot"]) for r in results]
    assert cells == [(p, w, s) for p in ("standard", "paper") for w in (2, 3) for s in (1, 5)]
    for result in results:
        assert result["draws"] == 3
        assert list(result["scores"]) == ["single draw", "vote", "mean probability"]
        printed = f"{100 * result['scores']['vote']['accuracy']:.2f} ± {100 * result['scores']['vote']['ci95']:.2f} %"
        assert printed in out


def test_evaluate_repeats_the_test_accuracy_of_the_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e.json"
    assert run("evaluate", [str(trained), "--episodes", "10", "--out", str(out)], monkeypatch) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert (
        result["scores"]["mean noise"]["accuracy"] == json.loads((trained / "result.json").read_text())["test/accuracy"]
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ways", "7"], "7 ways need 7 classes, split test of 'tiny' has 6"),
        (["--shot", "22"], "shot (22) + eval_query (3) = 25 images a class"),
        (["--draws", "-1"], "draws (-1) must be at least 0"),
        (["--episodes", "1"], "test_episodes (1) must be at least 2"),
    ],
)
def test_evaluate_refuses_in_one_sentence(
    arguments: list[str],
    sentence: str,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("evaluate", [str(trained), *arguments], monkeypatch) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_evaluate_of_a_folder_that_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", [str(tmp_path)], monkeypatch) == 1
    assert "has no checkpoint" in capsys.readouterr().err
