"""`lgm-dist adapt` and `lgm-dist predict` on folders of photos, with bad files among them."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lgm_dist import Classifier, Config, Learner
from lgm_dist.adapt.files import files_of
from lgm_dist.cli import adapt, predict
from lgm_dist.console import run_command
from lgm_dist.data import open_bank
from lgm_dist.model import build_model
from lgm_dist.runs.checkpoint import ImageFacts, TrainState
from lgm_dist.training.calibration import RATES, Calibration, Cell

NAMES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def learner(small: Config, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner's file; with its thresholds about half of all photos are "none of these" at a rate of 0.5."""
    config = small.replace(model=replace(small.model, generator="none", head="class_means"))
    facts = ImageFacts.of(open_bank(tiny, "train"), config)
    cell = Cell(5, 1, 9, 0.1, 0.0, 0.0, tuple(np.linspace(-10, 9.999, len(RATES))), {})
    made = Learner(
        "x", build_model(config.model, seed=1).eval(), config, TrainState(), facts, Calibration("similarity", (cell,))
    )
    return made.save(tmp_path_factory.mktemp("learner") / "tiny.safetensors")


def photo(path: Path, label: int, seed: int) -> Path:
    """A noisy photo of one colour."""
    pixels = np.random.default_rng([label, seed]).integers(0, 90, (40, 30, 3), dtype=np.uint8)
    pixels[..., 2 - label] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(NAMES):
        for i in range(label + 1):
            photo(tmp_path / "photos" / name / f"{i}.png", label, i)
    return tmp_path / "photos"


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", [f"lgm-dist {command.__name__.rsplit('.', 1)[-1]}"])
    return run_command(command.main, [str(word) for word in words])


@pytest.fixture
def classifier(learner: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert run(adapt, monkeypatch, folder, "--learner", learner, "--out", tmp_path / "birds.lgm") == 0
    return tmp_path / "birds.lgm"


def test_adapt_prints_the_report_and_writes_the_classifier(
    capsys: pytest.CaptureFixture[str], classifier: Path
) -> None:  # the order matters: the fixture's output is looked at
    loaded = Classifier.load(classifier)
    assert loaded.classes == {"blue": 1, "green": 2, "red": 3}
    out, errors = capsys.readouterr()
    assert errors == ""
    assert out.splitlines()[0].startswith("Classifier(3 classes: blue, green, red; 6 photos; ")
    assert str(loaded.report()) in out
    assert "One photo only, so that the accuracy is not known: blue.\n" in out
    assert out.endswith(f"written to {classifier} ({classifier.stat().st_size / 1e6:.2f} MB)\n")


def test_the_commands_of_the_readme(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the learner of the package, which tells photos of three colours apart."""
    new = [photo(tmp_path / "new" / f"{i}.png", i, 50 + i) for i in range(3)]
    assert run(adapt, monkeypatch, folder, "--learner", "fc100-conv4", "--out", tmp_path / "birds.lgm") == 0
    assert run(predict, monkeypatch, tmp_path / "birds.lgm", tmp_path / "new", "--sheet", tmp_path / "birds.html") == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    answers = Classifier.load(tmp_path / "birds.lgm").predict(new)
    assert [answer.label for answer in answers] == list(NAMES)
    assert all(answer.unknown is not None for answer in answers)
    assert all(str(path) in out for path in new)
    assert (tmp_path / "birds.lgm").stat().st_size < 1_000_000
    assert (tmp_path / "birds.html").read_text().count("<img") == 3


def test_predict_prints_and_writes_all_answers(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    new = tmp_path / "new"
    paths = [photo(new / f"{i}.png", i, 50 + i) for i in range(3)]
    extra = photo(tmp_path / "other.jpg", 1, 70)
    files = [tmp_path / f"out.{ending}" for ending in ("csv", "json", "html")]
    status = run(
        predict, monkeypatch, classifier, new, extra, "--csv", files[0], "--json", files[1], "--sheet", files[2]
    )
    out, errors = capsys.readouterr()
    assert (status, errors) == (0, "")
    expected = Classifier.load(classifier).predict([*paths, extra])
    assert [p.label for p in expected] == ["blue", "green", "red", "green"]
    for line, path, p in zip(out.splitlines()[2:6], [*paths, extra], expected, strict=True):
        assert [cell.strip() for cell in line.split("|")[1:4]] == [str(path), p.label, f"{100 * p.probability:.0f} %"]
    assert out.endswith("".join(f"written to {file}\n" for file in files))
    rows = list(csv.DictReader(files[0].open()))
    record = json.loads(files[1].read_text())
    assert record["classes"] == {"blue": 1, "green": 2, "red": 3}
    for row, entry, path, p in zip(rows, record["photos"], [*paths, extra], expected, strict=True):
        assert (row["photo"], row["label"], row["unknown"], row["problem"]) == (str(path), p.label, "false", "")
        assert float(row["probability"]) == pytest.approx(p.probability, abs=1e-6)
        assert [float(row[f"p({n})"]) for n in NAMES] == pytest.approx(list(p.probabilities.values()), abs=1e-6)
        assert (entry["photo"], entry["label"], entry["unknown"]) == (str(path), p.label, False)
        assert entry["probabilities"] == pytest.approx(dict(p.probabilities))


def test_bad_files_are_named_and_counted_and_nothing_else_is_lost(
    classifier: Path, learner: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    good, note = photo(tmp_path / "new" / "a.png", 0, 9), tmp_path / "new" / "note.txt"
    note.write_text("no photo")
    files = [tmp_path / f"out.{ending}" for ending in ("csv", "json", "html")]
    words = (classifier, tmp_path / "new", tmp_path / "gone.jpg")
    capsys.readouterr()
    assert run(predict, monkeypatch, *words, "--csv", files[0], "--json", files[1], "--sheet", files[2]) == 1
    out, errors = capsys.readouterr()
    lines = errors.splitlines()
    assert lines[0].startswith(f"left out: {note} is not an image that PIL reads (")
    assert lines[1].startswith(f"left out: {tmp_path}/gone.jpg is not an image that PIL reads (")
    assert lines[2:] == ["lgm-dist predict: 2 of 3 photos could not be read"]
    assert f"| {good}" in out
    assert out.count("could not be read") == 2
    assert [row["label"] for row in csv.DictReader(files[0].open())] == ["blue", "", ""]
    assert [entry.get("problem", "")[:3] for entry in json.loads(files[1].read_text())["photos"]] == ["", "/tm", "/tm"]
    assert files[2].read_text().count("<li") == 3

    (folder / "red" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert run(adapt, monkeypatch, folder, "--learner", learner, "--out", tmp_path / "b.lgm") == 1
    assert capsys.readouterr().err.endswith("lgm-dist adapt: 1 of 7 photos could not be read and are left out\n")
    assert Classifier.load(tmp_path / "b.lgm").classes == {"blue": 1, "green": 2, "red": 3}
    (folder / "blue" / "0.png").write_bytes(b"x")
    assert run(adapt, monkeypatch, folder, "--learner", learner, "--out", tmp_path / "c.lgm") == 1
    assert "class 'blue' has no photo that can be read; add one or remove its folder" in capsys.readouterr().err
    assert not (tmp_path / "c.lgm").exists()


def test_photos_of_no_class(classifier: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for rate, unknown in ((0.5, 9.999), (0.05, -8)):
        capsys.readouterr()
        assert run(predict, monkeypatch, classifier, folder, "--unknown-rate", rate) == 0
        found = Classifier.load(classifier).predict(files_of([folder]), rate)
        assert capsys.readouterr().out.count("none of these") == sum(p.unknown for p in found)
        assert any(p.unknown for p in found) == (unknown > 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["CLASSIFIER", "EMPTY"], "there are no photos in EMPTY; name files or folders"),
        (["CLASSIFIER", "EMPTY", "--unknown-rate", "0"], "there are no photos in EMPTY"),
        (["CLASSIFIER", "PHOTOS", "--unknown-rate", "0.7"], "unknown_rate (0.7) must be above 0 and at most 0.5"),
        (["PHOTOS", "PHOTOS"], "is a folder; name the file of a classifier, written with Classifier.save"),
        (["LEARNER", "PHOTOS"], "is the file of a learner; load it with lgm_dist.load, then adapt it"),
    ],
)
def test_what_is_wrong_with_predict_is_one_sentence(
    words: list[str], sentence: str, classifier: Path, learner: Path, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    places = {"CLASSIFIER": classifier, "EMPTY": tmp_path / "empty", "PHOTOS": folder, "LEARNER": learner}
    capsys.readouterr()
    assert run(predict, monkeypatch, *(places.get(word, word) for word in words)) == 1
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    assert sentence.replace("EMPTY", str(tmp_path / "empty")) in errors


def test_adapt_of_no_folder(learner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(adapt, monkeypatch, tmp_path / "x", "--learner", learner, "--out", tmp_path / "a") == 1
    assert capsys.readouterr().err == (
        f"lgm-dist adapt: the folder {tmp_path}/x does not exist; name a folder with one folder of photos for each class\n"
    )
    photo(tmp_path / "one" / "a" / "1.png", 0, 0)
    assert run(adapt, monkeypatch, tmp_path / "one", "--learner", learner, "--out", tmp_path / "a") == 1
    assert "has 1 classes; give 2 to 1,000" in capsys.readouterr().err


def test_files_in_folders_below_and_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/c/2.png", "b/1.png", "b/.hidden/3.png", "b/.DS_Store", "a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = files_of([tmp_path / "b", tmp_path / "a.png"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/1.png", "b/c/2.png", "a.png"]


class Page(HTMLParser):
    """What a contact sheet holds: its items, images and scripts, and all URLs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.items: list[dict[str, str | None]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "li":
            self.items.append(dict(attrs))
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_sheet_is_one_file_with_escaped_names_and_the_least_certain_first(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = photo(tmp_path / "new" / '"><script>alert(1)&amp;.png', 0, 3)
    for i in range(4):
        photo(tmp_path / "new" / f"{i}.png", i % 3, 40 + i)
    sheet = tmp_path / "out.html"
    assert run(predict, monkeypatch, classifier, tmp_path / "new", "--sheet", sheet) == 0
    text = sheet.read_text()
    page = Page(text)
    assert page.tags.count("script") == 1  # the page's own
    assert not any(word in text for word in ("http:", "https:", "url(", "@import", "src=/"))
    certain = [float(item["data-p"] or 0) for item in page.items]
    assert certain == sorted(certain)
    assert str(evil) in [item["data-name"] for item in page.items]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.images)
    assert len(page.images) == 5
    assert page.tags.count("button") == 4
