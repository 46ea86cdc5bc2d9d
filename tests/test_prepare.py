"""From a name to a manifest, and scripts/prepare.py."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_fc100 import write_parquet
from test_folder import save

from lgm_dist.data import shards
from lgm_dist.data.prepare import ensure_manifest

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare.py"
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_parquet(tmp_path_factory.mktemp("parquet")))


def test_manifests_and_urls_are_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch()
    assert ensure_manifest(str(path), "data", "") == str(path)
    assert ensure_manifest("https://host/x.json", "data", "") == "https://host/x.json"
    with pytest.raises(ValueError, match=r"there is no manifest .*none\.json"):
        ensure_manifest(str(tmp_path / "none.json"), "data", "")


def test_a_name_finds_what_is_prepared_and_others_are_explained(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "birds.json").touch()
    assert ensure_manifest("birds", str(tmp_path), "") == str(tmp_path / "birds" / "birds.json")
    with pytest.raises(ValueError, match=r"data \('bees'\) is no data set.*fc100, glyphs.*manifest.*--name bees --out"):
        ensure_manifest("bees", str(tmp_path), "")


def prepare_and_count(root: Path, parquet: str, log: Path) -> None:
    real = shards.write_shards

    def counted(*args: object) -> Path:
        with log.open("a") as file:
            file.write("written\n")
        return real(*args)  # type: ignore[arg-type]

    shards.write_shards = counted  # type: ignore[assignment]
    assert ensure_manifest("fc100", str(root), parquet) == str(root / "fc100" / "fc100.json")


def test_fc100_is_prepared_once_by_processes_that_start_together(tmp_path: Path, parquet: str) -> None:
    workers = [
        fork.Process(target=prepare_and_count, args=(tmp_path / "data", parquet, tmp_path / "log")) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "written\n"
    manifest = shards.read_manifest(str(tmp_path / "data" / "fc100" / "fc100.json"))
    assert [manifest.splits[split].images for split in ("train", "val", "test")] == [180, 60, 60]


def test_glyphs_need_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glyphs = pytest.importorskip("lgm_dist.data.sources.glyphs")
    monkeypatch.setattr(glyphs, "IMAGES_PER_CLASS", 2)
    manifest = shards.read_manifest(ensure_manifest("glyphs", str(tmp_path), ""))
    assert manifest.name == "glyphs"
    assert all(info.images == 2 for entry in manifest.splits.values() for info in entry.classes)


def script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    if done.value.code:
        raise done.value


def test_the_script_prepares_a_folder_and_prints_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val", "test"):
        for i in range(3):
            save(tmp_path / "in" / split / f"{split}_bird" / f"{i}.jpg")
    out = tmp_path / "out"
    script(monkeypatch, "folder", "--source", str(tmp_path / "in"), "--out", str(out), "--name", "zoo", "--size", "12")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[1:-1] == [" train ", " 1       ", " 3      ", " 1      "]
    assert lines[5].startswith("images    12 x 12, mean ")
    assert f"{out}/zoo.json" in lines[6]
    assert json.loads((out / "zoo.json").read_bytes())["shape"] == [12, 12, 3]


def test_the_script_prepares_fc100(
    tmp_path: Path, parquet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, "fc100", "--source", parquet, "--out", str(tmp_path))
    assert [line.replace("|", " ").split() for line in capsys.readouterr().out.splitlines()[2:5]] == [
        ["train", "60", "180", "1"],
        ["val", "20", "60", "1"],
        ["test", "20", "60", "1"],
    ]


def test_a_user_error_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "fc100", "--source", str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"prepare.py: source {tmp_path}/none holds no CIFAR-100")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["fc100", "--sauce", "x", "--out", "y"], ["fc100"], ["tables"], ["folder", "--size", "big"]]
)
def test_unknown_and_missing_flags_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script(monkeypatch, *arguments)
    assert caught.value.code not in (0, None)
