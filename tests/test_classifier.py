"""Classifiers: the answers of an evaluation, unequal shots, adding and removing, the file, the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.headers import rewritten
from PIL import Image

from lgm_dist import Classifier, Config, Learner, learners, load
from lgm_dist.adapt import examples, learner_file
from lgm_dist.adapt.report import Share
from lgm_dist.config import PRESETS, ModelConfig
from lgm_dist.data import ImageBank, open_bank
from lgm_dist.data.episodes import draw_rows
from lgm_dist.model import build_model
from lgm_dist.runs.checkpoint import ImageFacts, TrainState
from lgm_dist.training.base_statistics import fit_head
from lgm_dist.training.calibration import RATES, Calibration, Cell
from lgm_dist.training.evaluation import predictions
from lgm_dist.training.worker import Worker

MEANS: dict[str, Any] = {"generator": "none", "head": "class_means"}
STRONG: dict[str, Any] = {
    **MEANS, "rotations": 4, "blocks": 2, "pool": 2, "power": 0.5, "centre": True, "shrinkage": 0.6
}  # fmt: skip
DIRECTIONS: dict[str, Any] = {**STRONG, "generator": "base_directions"}
NETWORKS: dict[str, dict[str, Any]] = {
    "paper": {},
    "means": MEANS,
    "strong": STRONG,
    "directions": DIRECTIONS,
    "ridge": {"generator": "low_rank", "head": "ridge"},
    "cnaps": {"generator": "none", "head": "cnaps"},
    "logistic": {"generator": "none", "head": "logistic"},
    "completion": {"generator": "completion", "head": "class_means"},
}


@pytest.fixture(scope="module")
def bank(tiny: Path) -> ImageBank:
    return open_bank(tiny, "test")


def make(small: Config, tiny: Path, settings: dict[str, Any], **others: Any) -> Learner:
    """A learner with random weights and, if its head needs them, statistics."""
    base = open_bank(tiny, "train")
    config = small.replace(model=replace(small.model, **settings), **others)
    model = build_model(config.model, seed=1).eval()
    fit_head(model, base, config, images_per_class=8)
    return Learner("random", model, config, TrainState(), ImageFacts.of(base, config))


@pytest.fixture(scope="module")
def means(small: Config, tiny: Path) -> Learner:
    return make(small, tiny, MEANS)


@pytest.fixture(scope="module")
def photos(bank: ImageBank) -> dict[str, list[np.ndarray]]:
    """1 to 5 photos of five classes."""
    return {f"c{c}": list(bank.images[bank.offsets[c] : bank.offsets[c] + c + 1]) for c in range(5)}


def queries(bank: ImageBank) -> list[np.ndarray]:
    return list(bank.images[10::24]) + list(bank.images[11::24])


def table(classifier: Classifier, images: list[Any]) -> np.ndarray:
    return np.array([list(p.probabilities.values()) for p in classifier.predict(images)])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("copies", "flips"), [(0, False), (2, True)])
def test_the_answers_on_an_episode_are_those_of_an_evaluation(
    name: str, copies: int, flips: bool, small: Config, tiny: Path, bank: ImageBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(small, tiny, NETWORKS[name], eval_copies=copies, eval_flips=flips)
    row_of = {image.tobytes(): row for row, image in enumerate(bank.images)}
    monkeypatch.setattr(examples, "counters", lambda pixels: np.array([row_of[x.tobytes()] for x in pixels]))
    drawn = draw_rows(bank, learner.config, "test", 0, 3)
    ((_, log_p, labels),) = predictions(learner.model, bank, learner.config, "test", 3, 0, Worker())
    for support, query, expected in zip(drawn.support, drawn.query, log_p[0], strict=True):
        problem = {f"c{c}": list(bank.images[rows]) for c, rows in enumerate(support.reshape(3, 2))}
        found = table(learner.adapt(problem), list(bank.images[query]))
        np.testing.assert_allclose(found, expected.exp().numpy(), atol=2e-5)
    assert labels.shape == (3, 9)


def test_unequal_shots_against_a_loop(means: Learner, photos: Any, bank: ImageBank) -> None:
    def vector(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return means.model.embed(means.prepare(image[None]))[0][0].flatten().double().numpy()

    centres = np.stack([np.mean([vector(image) for image in given], 0) for given in photos.values()])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    asked = np.stack([vector(image) for image in queries(bank)])
    logits = 10 * asked / np.linalg.norm(asked, axis=1, keepdims=True) @ centres.T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    classifier = means.adapt(photos)
    assert classifier.classes == {"c0": 1, "c1": 2, "c2": 3, "c3": 4, "c4": 5}
    np.testing.assert_allclose(table(classifier, queries(bank)), expected, atol=1e-5)
    first = classifier.predict(queries(bank)[:1])[0]
    assert (first.label, first.probability) == (f"c{expected[0].argmax()}", max(first.probabilities.values()))
    assert first.unknown is None  # without a calibration


def test_a_network_that_needs_equal_shots_says_so(small: Config, tiny: Path, photos: Any) -> None:
    learner = make(small, tiny, NETWORKS["completion"])
    sentence = (
        r"^the classes have 1 to 5 photos, and the learner's model\.generator \('completion'\) needs the same number of "
        r"each class; give each class the same number of photos$"
    )
    with pytest.raises(ValueError, match=sentence):
        learner.adapt(photos)
    classifier = learner.adapt({name: given[:1] for name, given in photos.items()})
    with pytest.raises(ValueError, match="give each class the same number"):
        classifier.add("new", photos["c3"])
    assert "new" not in classifier.classes


def test_order_names_and_repetition_of_photos_do_not_matter(small: Config, tiny: Path, photos: Any, bank: Any) -> None:
    learner = make(small, tiny, MEANS, eval_copies=3, eval_flips=True)
    expected = table(learner.adapt(photos), queries(bank))
    turned = {name: given[::-1] for name, given in reversed(photos.items())}
    np.testing.assert_allclose(table(learner.adapt(turned), queries(bank))[:, ::-1], expected, atol=1e-6)
    assert np.array_equal(table(learner.adapt(photos), queries(bank)), expected)


def test_many_problems_at_once_are_the_same_as_one_by_one(means: Learner, photos: Any, bank: ImageBank) -> None:
    problems = [photos, {name: given[:1] for name, given in photos.items()}, {"a": photos["c3"], "b": photos["c4"]}]
    for together, problem in zip(means.adapt_many(problems), problems, strict=True):
        np.testing.assert_allclose(
            table(together, queries(bank)), table(means.adapt(problem), queries(bank)), atol=1e-6
        )


@pytest.mark.parametrize("name", ["means", "paper"])
def test_adding_and_removing(name: str, small: Config, tiny: Path, photos: Any, bank: ImageBank) -> None:
    learner, asked = make(small, tiny, NETWORKS[name]), queries(bank)
    whole, part = learner.adapt(photos), learner.adapt({n: g for n, g in photos.items() if n != "c4"})
    before = table(part, asked)
    part.add("c4", photos["c4"])
    np.testing.assert_allclose(table(part, asked), table(whole, asked), atol=1e-6)
    part.remove("c4")
    assert np.array_equal(table(part, asked), before)
    part.add("c3", photos["c4"])  # more photos of a class
    both = {**{n: photos[n] for n in ("c0", "c1", "c2")}, "c3": photos["c3"] + photos["c4"]}
    assert part.classes["c3"] == 9
    np.testing.assert_allclose(table(part, asked), table(learner.adapt(both), asked), atol=1e-6)
    with pytest.raises(ValueError, match=r"^class 'c9' is not in the classifier; "):
        part.remove("c9")
    for other in ("c0", "c1"):
        part.remove(other)
    with pytest.raises(ValueError, match=r"^a classifier of 1 classes is not possible; it has 2 to 1,000$"):
        part.remove("c2")
    with pytest.raises(ValueError, match=r"^class 'x' has no photos; give it one or leave it out$"):
        part.add("x", [])
    assert part.classes == {"c2": 3, "c3": 9}


@pytest.mark.parametrize("name", ["means", "strong", "directions", "paper", "cnaps"])
def test_a_saved_classifier_answers_the_same(
    name: str, small: Config, tiny: Path, photos: Any, bank: Any, tmp_path: Path
) -> None:
    learner = make(small, tiny, NETWORKS[name])
    classifier, asked = learner.adapt(photos), queries(bank)
    expected = table(classifier, asked)
    path = classifier.save(tmp_path / "a.lgm")
    loaded = Classifier.load(path)
    assert loaded.classes == classifier.classes
    np.testing.assert_allclose(table(loaded, asked), expected, atol=3e-3)  # half precision
    assert loaded.report() == classifier.report()
    assert np.abs(table(Classifier.load(loaded.save(tmp_path / "b.lgm")), asked) - table(loaded, asked)).max() < 3e-3
    loaded.add("new", photos["c2"])
    loaded.remove("c2")
    renamed = learner.adapt({**{n: g for n, g in photos.items() if n != "c2"}, "new": photos["c2"]})
    np.testing.assert_allclose(table(loaded, asked), table(renamed, asked), atol=3e-3)
    if name in ("means", "strong", "directions"):
        with pytest.raises(
            ValueError, match=r"^report: a classifier's file does not keep the photos \(class 'c0'\), .*adapt again"
        ):
            loaded.report()
        loaded.save(tmp_path / "c.lgm")  # without a report


def test_a_whitening_cut_to_a_rank_keeps_the_classes(
    small: Config, tiny: Path, photos: Any, bank: Any, tmp_path: Path
) -> None:
    """The vectors of the file's network point elsewhere; the means have to be its own."""
    classifier = make(small, tiny, {**STRONG, "rotations": 1, "blocks": 1}).adapt(photos)
    loaded = Classifier.load(classifier.save(tmp_path / "a.lgm", rank=31))  # of D = 32 values
    np.testing.assert_allclose(table(loaded, queries(bank)), table(classifier, queries(bank)), atol=0.02)


def test_the_file_of_the_strong_network_takes_less_than_a_megabyte(tmp_path: Path) -> None:
    config = PRESETS["strong"]
    facts = ImageFacts((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 32, 32, 3, tuple(f"class {i}" for i in range(60)))
    learner = Learner("x", build_model(config.model).eval(), config.replace(eval_copies=0), TrainState(), facts)
    random = np.random.default_rng(0)
    photos = {f"c{c}": list(random.integers(0, 256, (5, 32, 32, 3), np.uint8)) for c in range(5)}
    assert learner.adapt(photos).save(tmp_path / "a.lgm").stat().st_size < 1_000_000


def test_a_hundred_classes_and_a_thousand_photos(means: Learner) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (100, 16, 16, 3), np.uint8)
    classifier = means.adapt({f"c{i}": [image] for i, image in enumerate(images)})
    found = classifier.predict(iter(images[i % 100] for i in range(600)))  # several batches
    assert [p.label for p in found] == [f"c{i % 100}" for i in range(600)]
    assert repr(classifier) == "Classifier(100 classes: c0, c1, c2, c3, c4, …; 100 photos; random)"


def test_photos_of_every_kind(means: Learner, tmp_path: Path, bank: ImageBank) -> None:
    image = bank.images[7]
    Image.fromarray(image).save(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image), image, torch.from_numpy(image.copy())]
    classifier = means.adapt({"same": kinds, "other": [bank.images[60]]})
    assert len({p.probability for p in classifier.predict(kinds)}) == 1
    with pytest.raises(ValueError, match=r"^photo 3 is bytes"):
        classifier.predict([image, image, b"x"])
    with pytest.raises(ValueError, match=r"^class 'b', photo 2 \(int\) must be a path"):
        means.adapt({"a": [image], "b": [image, 3]})
    with pytest.raises(ValueError, match=r"^photos \(str\) must be a list of photos"):
        classifier.predict("a.png")
    assert classifier.predict([]) == []


# The report


def test_leaving_one_out_against_a_loop(small: Config, tiny: Path, photos: Any) -> None:
    """Each photo is classified by a classifier of all others."""
    for settings in (MEANS, STRONG, DIRECTIONS):
        learner = make(small, tiny, settings, eval_copies=1, eval_flips=True)
        report = learner.adapt(photos).report()
        for name, given in photos.items():
            hits = [
                learner.adapt({**photos, name: given[:i] + given[i + 1 :]}).predict([given[i]])[0].label == name
                for i in range(len(given))
                if len(given) > 1
            ]
            assert report.classes[name] == Share(sum(hits), len(hits))
        assert (report.total.count, report.single) == (14, ("c0",))
        assert report.shots == {f"c{c}": c + 1 for c in range(5)}


def test_leaving_out_by_rounds_against_a_loop(small: Config, tiny: Path, photos: Any) -> None:
    """Round j leaves out photo j of every class that has it and another one."""
    learner = make(small, tiny, NETWORKS["paper"])
    report = learner.adapt(photos).report()
    hits = dict.fromkeys(photos, 0)
    for j in range(5):
        left = {name: given[j] for name, given in photos.items() if len(given) > max(j, 1)}
        rest = {n: [x for i, x in enumerate(given) if i != j or n not in left] for n, given in photos.items()}
        answers = learner.adapt(rest).predict(list(left.values()))
        for name, answer in zip(left, answers, strict=True):
            hits[name] += answer.label == name
    assert {name: share.hits for name, share in report.classes.items()} == hits
    assert [share.count for share in report.classes.values()] == [0, 2, 3, 4, 5]


def test_near_duplicates_over_classes(means: Learner, bank: ImageBank) -> None:
    x = [np.asarray(image) for image in bank.images[[0, 1, 30, 31, 60]]]
    brighter = np.clip(x[0].astype(int) + 5, 0, 255).astype(np.uint8)
    noisy = np.clip(x[2].astype(int) + np.random.default_rng(0).integers(-3, 4, x[2].shape), 0, 255).astype(np.uint8)
    report = means.adapt({"a": [x[0], x[1]], "b": [x[2], brighter, x[3]], "c": [noisy[:, ::-1], x[4], x[4]]}).report()
    assert report.near_duplicates == (
        ("class 'a', photo 1", "class 'b', photo 2"),
        ("class 'b', photo 1", "class 'c', photo 1"),  # a mirror image
    )
    text = str(report)
    assert "Nearly the same photo in two classes: class 'a', photo 1 and class 'b', photo 2.\n" in text
    assert means.adapt({"a": x[:2], "b": x[2:]}).report().near_duplicates == ()


def test_the_report_as_text(means: Learner, photos: Any) -> None:
    lines = str(means.adapt(photos).report()).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:8]] == [*photos, "all"]
    assert lines[2].split("|")[3].strip() == "not known"
    assert lines[8] == "One photo only, so that the accuracy is not known: c0."
    assert str(Share(4, 5)) == "80 % (38 to 96 %)"  # statsmodels: 0.3755, 0.9638


# Calibration and files


CELLS = tuple(
    Cell(5, shot, 600, temperature, 0.01, 0.2, tuple(np.linspace(low, low + 1, len(RATES))), {})
    for shot, temperature, low in ((1, 0.5, 0.0), (4, 0.125, 2.0))
)


def test_the_calibration_scales_probabilities_and_finds_unknown_photos(means: Learner, photos: Any, bank: Any) -> None:
    learner = replace(means, calibration=Calibration("similarity", CELLS))
    asked = queries(bank)
    equal = {name: given[:2] for name, given in photos.items() if len(given) > 1}
    plain, calibrated = means.adapt(equal), learner.adapt(equal)
    logits = np.log(table(plain, asked))
    expected = np.exp(logits / 0.25)  # 2 shots lie midway between 1 and 4 in log(shot)
    np.testing.assert_allclose(table(calibrated, asked), expected / expected.sum(1, keepdims=True), atol=1e-5)
    for rate in (0.05, 0.5):
        threshold = 1 + rate * 2  # midway between the cells, at this share of 0 to 0.5
        largest = calibrated.logits(np.stack(asked)).max(1).values.numpy()
        assert [p.unknown for p in calibrated.predict(asked, rate)] == (largest < threshold).tolist()
    for rate in (0, 0.6, float("nan")):
        with pytest.raises(ValueError, match=r"^unknown_rate \(.*\) must be above 0 and at most 0\.5; 0\.05 is usual$"):
            calibrated.predict(asked, rate)


def test_files_keep_the_calibration(means: Learner, photos: Any, bank: Any, tmp_path: Path) -> None:
    learner = replace(means, calibration=Calibration("similarity", CELLS))
    again = load(learner.save(tmp_path / "a"))
    assert again.calibration == learner.calibration
    loaded = Classifier.load(learner.adapt(photos).save(tmp_path / "b"))
    assert loaded.learner.calibration == learner.calibration
    assert loaded.predict(queries(bank))[0].unknown is not None
    assert load(means.save(tmp_path / "c")).calibration is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(format=2), r"a has format 2, newer than 1; update lgm_dist$"),
        (lambda r: r["classifier"].update(names=["a", "b"]), r"its names and shots are not those of classes"),
        (lambda r: r["classifier"].update(names=["a"] * 5), r"its names and shots are not those of classes"),
        (lambda r: r["classifier"]["shots"].__setitem__(0, -1), r"its names and shots are not those of classes"),
        (lambda r: r["classifier"]["report"].update(shots={}), r"its report is about other classes"),
        (
            lambda r: r["images"].update(height=10**9),
            r"a is not the file of a classifier \(images of 16 x 1000000000\)",
        ),
        (lambda r: r["classifier"].update(report=3), r"a is not the file of a classifier \("),
        (lambda r: r["config"]["model"].update(filters=16), r"a is not the file of a classifier \(.*tensors"),
        (lambda r: r.pop("classifier"), r"a is the file of a learner; load it with lgm_dist\.load, then adapt it$"),
    ],
)
def test_a_wrong_file_is_refused(change: Any, sentence: str, means: Learner, photos: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        Classifier.load(rewritten(means.adapt(photos).save(tmp_path / "a"), change))


def test_files_of_learners_and_classifiers_are_told_apart(means: Learner, photos: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is the file of a classifier; load it with lgm_dist\.Classifier\.load$"):
        load(means.adapt(photos).save(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"the file .*b does not exist; write one with Classifier\.save$"):
        Classifier.load(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"b is not the file of a classifier \("):
        Classifier.load(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(score="banana"),
        lambda c: c.update(cells=[]),
        lambda c: c["cells"][0].update(temperature=0),
        lambda c: c["cells"][0].update(temperature=float("nan")),
        lambda c: c["cells"][0].update(thresholds=[1, 2]),
        lambda c: c["cells"][0].update(banana=1),
    ],
)
def test_a_calibration_out_of_range_is_refused(change: Any, means: Learner, tmp_path: Path) -> None:
    path = replace(means, calibration=Calibration("similarity", CELLS)).save(tmp_path / "a")
    with pytest.raises(ValueError, match="a is not the file of a learner"):
        load(rewritten(path, lambda record: change(record["calibration"])))


def test_a_learner_of_the_first_version_has_no_images(means: Learner, photos: Any) -> None:
    with pytest.raises(ValueError, match=r"is of an earlier version, which did not keep"):
        replace(means, images=None).adapt(photos)


@pytest.mark.parametrize("name", learners())
def test_learners_of_the_package_adapt(name: str, photos: Any) -> None:
    assert load(name).adapt(photos).predict(photos["c4"])


def test_learner_file_names_are_not_those_of_classes() -> None:
    names = learner_file.pack(
        learner_file.Contents(
            build_model(ModelConfig(filters=8)), Config(), TrainState(), ImageFacts((), (), 1, 1, 3, ())
        )
    ).tensors
    assert not any(name.startswith("classes.") for name in names)
