"""From a name to a manifest, `lgm-dist prepare`, and data sets from outside the package."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_fc100 import write_parquet
from test_folder import save

from lgm_dist.cluster.fit import fit
from lgm_dist.config import SPLITS, Config
from lgm_dist.data import open_bank, shards
from lgm_dist.data.prepare import ensure_manifest, prepare
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource
from lgm_dist.data.sources import SOURCES, prepare_command, register_source

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
    assert lines[5].startswith("images    12 x 12, RGB, mean ")
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


# ---- from outside the package ----


def stripe(label: int, index: int) -> bytes:
    x = np.arange(16) * (1 + label) + index
    file = io.BytesIO()
    Image.fromarray(np.broadcast_to((40 * x % 256).astype(np.uint8), (16, 16))).save(file, "PNG")
    return file.getvalue()


@register_source("stripes")
def stripes(images: int = 8) -> DataSource:
    """Stripes of several widths.

    Args:
        images: Images of each class.
    """
    splits = {}
    for number, split in enumerate(SPLITS):
        names = tuple(ClassInfo(f"{split}{label}") for label in range(3))
        rows = [(label, i) for label in range(3) for i in range(images)]
        samples = [Sample(f"{c}_{i}", c, functools.partial(stripe, 3 * number + c, i)) for c, i in rows]
        splits[split] = SplitSource(names, samples)
    return DataSource("stripes", (16, 16, 1), splits)


def test_a_source_from_outside_is_prepared_and_trained_by_its_name(tmp_path: Path, small: Config) -> None:
    config = small.replace(data="stripes", data_root=str(tmp_path), storage=str(tmp_path), name="run", shot=1)
    config = config.replace(**{"model.channels": 0}, steps_per_epoch=2, eval_every=2)
    run = fit(config)
    assert json.loads((run / "config.json").read_bytes())["model"]["channels"] == 1
    bank = open_bank(tmp_path / "stripes" / "stripes.json", "val", str(tmp_path / "cache"))
    assert bank.counts.tolist() == [8, 8, 8]
    np.testing.assert_array_equal(bank.images[9, ..., 0], np.asarray(Image.open(io.BytesIO(stripe(4, 1)))))


def test_a_source_from_outside_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, "stripes", "--images", "5", "--out", str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[2:4] == [" 3       ", " 15     "]
    assert lines[5].startswith("images    16 x 16, grey, mean ")
    script(monkeypatch, "stripes", "--help")
    assert "Images of each class." in capsys.readouterr().out


def test_sources_are_prepared_from_python_with_their_options(tmp_path: Path) -> None:
    manifest = shards.read_manifest(str(prepare("stripes", tmp_path, images=4)))
    assert manifest.splits["train"].images == 12
    for source, options, sentence in (
        (
            "strips",
            {},
            r"data \('strips'\) must be one of .*stripes; to use your own, import its module, which registers it with @reg",
        ),
        ("stripes", {"size": 3}, "size is not an option of source stripes; it takes images"),
        ("glyphs", {"size": 3}, "size is not an option of source glyphs; it takes none"),
        ("folder", {"source": "x"}, "source folder needs the option name; give it a value"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prepare(source, tmp_path, **options)


def test_the_command_that_prepares_a_data_set() -> None:
    @register_source("needy")
    def needy(some_place: str, source: str = "", size: int = 3, depth: int = 1) -> DataSource:
        raise NotImplementedError

    try:
        assert prepare_command("needy", "out", (8, 8, 3)) == (
            "lgm-dist prepare needy --some-place SOME_PLACE --source PATH --size 8 --out out"
        )
        assert prepare_command("needy", "o", (8, 9, 3)).endswith("SOME_PLACE --source PATH --out o")
        with pytest.raises(ValueError, match=r"data \('needy'\) is no data set: .*use fc100, glyphs, .*the path"):
            ensure_manifest("needy", "nowhere", "")
    finally:
        SOURCES._known.pop("needy")
    assert prepare_command("glyphs", "DIR", (32, 32, 3)) == "lgm-dist prepare glyphs --out DIR"
    assert prepare_command("fc100", "DIR", (32, 32, 3)) == "lgm-dist prepare fc100 --source PATH --out DIR"
    assert prepare_command("my birds", "DIR", (84, 84, 3)) == (
        "lgm-dist prepare folder --source PATH --name 'my birds' --size 84 --out DIR"
    )


def test_two_sources_cannot_have_one_name() -> None:
    with pytest.raises(ValueError, match="source 'stripes' is registered already; choose another name"):
        register_source("stripes")(lambda: stripes())
    assert register_source("stripes")(stripes) is stripes  # a notebook's cell that runs twice
