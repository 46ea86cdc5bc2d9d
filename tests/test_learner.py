"""`load` of a run that was copied elsewhere, with no data set beside it; images normalised as in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lgm_dist import Config, evaluate, fit, load, open_bank, sample_episodes
from lgm_dist.config import Protocol
from lgm_dist.data.episodes import draw_rows
from lgm_dist.data.manifest import read_manifest
from lgm_dist.runs.metrics import read_metrics

FIRST_VERSION = Path(__file__).parent / "fixtures/runs-82eed57/standard"


@pytest.fixture(scope="module")
def trained(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(small.replace(storage=str(tmp_path_factory.mktemp("runs")), name="run"))


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The checkpoints alone, elsewhere, and the data set renamed in what they say of it."""
    shutil.copytree(trained / "checkpoints", tmp_path / "copy/checkpoints")
    return tmp_path / "copy"


def test_a_copied_run_classifies_as_the_trained_one_without_its_data(
    trained: Path, copied: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = load(trained)
    bank = open_bank(tiny, "test")
    batch = sample_episodes(bank, learner.config, "test", 0, 4)
    with torch.no_grad():
        wanted = learner.model(batch.support, batch.query, 3)  # (4, T, 3)

    drawn = draw_rows(bank, learner.config, "test", 0, 4)
    rows = np.concatenate([drawn.support, drawn.query], axis=1)  # (4, S + T)
    monkeypatch.setattr("lgm_dist.data.bank.read_manifest", None)  # nothing opens the data set
    copy = load(str(copied))
    assert not copy.model.training
    pixels = np.stack([bank.images[row] for row in rows.flatten().tolist()])  # (4 * (S + T), H, W, C)
    images = copy.prepare(pixels).unflatten(0, rows.shape)  # (4, S + T, C, H, W)
    assert torch.equal(images, batch.images)
    with torch.no_grad():
        assert torch.equal(copy.model(images[:, :6], images[:, 6:], 3), wanted)


def test_the_best_checkpoint_is_loaded_or_the_one_that_is_named(trained: Path) -> None:
    rows = [row for row in read_metrics(trained) if "val/accuracy" in row]
    best = max(rows, key=lambda row: row["val/accuracy"])  # the earliest of equals
    learner = load(trained)
    assert (learner.state.step, learner.state.val_accuracy) == (best["step"], best["val/accuracy"])
    assert learner.config == Config.from_dict(json.loads((trained / "config.json").read_text()))
    assert repr(learner).endswith(f"step {best['step']}, val accuracy {100 * best['val/accuracy']:.2f} %)")
    last = load(trained / "checkpoints/step-00000012")
    assert (last.state.step, Path(last.name).name) == (12, "step-00000012")


def test_images_are_what_the_manifest_says(trained: Path, tiny: Path) -> None:
    facts, manifest = load(trained).images, read_manifest(str(tiny))
    assert facts is not None
    assert (facts.height, facts.width, facts.channels) == manifest.shape
    assert (facts.mean, facts.std) == (manifest.mean, manifest.std)
    assert facts.classes == tuple(f"train{i}" for i in range(6))


@pytest.mark.parametrize(("protocol", "mean", "std"), [("standard", None, None), ("paper", 113.77, 70.1899)])
def test_pixels_are_normalised_as_the_protocol_does(
    protocol: Protocol, mean: float | None, std: float | None, small: Config, tiny: Path, tmp_path: Path
) -> None:
    config = small.replace(
        storage=str(tmp_path), protocol=protocol, epochs=1, steps_per_epoch=1, test_episodes=0, eval_every=1
    )
    learner = load(fit(config))
    manifest = read_manifest(str(tiny))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    for given in (pixels, torch.from_numpy(pixels)):
        x = learner.prepare(given)
        assert (x.shape, x.dtype) == ((3, 3, 16, 16), torch.float32)
        for channel in range(3):
            low = manifest.mean[channel] if mean is None else mean
            scale = manifest.std[channel] if std is None else std
            wanted = (pixels[..., channel].astype(np.float64) - low) / scale
            assert np.abs(x[:, channel].numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (
            np.zeros((2, 8, 8, 3), np.uint8),
            r"pixels \(uint8 \(2, 8, 8, 3\)\) must be uint8 \(n, 16, 16, 3\), .*resize them",
        ),
        (np.zeros((2, 16, 16, 1), np.uint8), r"pixels \(uint8 \(2, 16, 16, 1\)\) must be uint8 \(n, 16, 16, 3\)"),
        (np.zeros((16, 16, 3), np.uint8), r"pixels \(uint8 \(16, 16, 3\)\) must be"),
        (np.zeros((2, 16, 16, 3), np.float32), r"pixels \(float32 \(2, 16, 16, 3\)\) must be uint8"),
    ],
)
def test_pixels_of_another_size_or_type_are_refused(pixels: np.ndarray, sentence: str, trained: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(trained).prepare(pixels)


def test_a_run_of_the_first_version_is_loaded_but_knows_nothing_of_images() -> None:
    learner = load(FIRST_VERSION)
    assert (learner.state.step, learner.images) == (4, None)
    with torch.no_grad():
        log_p = learner.model(torch.zeros(1, 5, 3, 32, 32), torch.zeros(1, 2, 3, 32, 32), 5)  # (1, 2, 5)
    assert log_p.exp().sum(-1).tolist() == [pytest.approx([1.0, 1.0])]
    with pytest.raises(
        ValueError, match=r"checkpoint .*step-00000004 is of an earlier version, .*or train the run again$"
    ):
        learner.prepare(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint; train it with lgm-dist train first"):
        load(tmp_path)


def test_the_example_of_the_package(tiny: Path, trained: Path) -> None:
    """`evaluate` of a loaded run on another split: what `lgm_dist.__doc__` shows."""
    learner = load(trained)
    found = evaluate(learner.model, open_bank(tiny, "test"), learner.config, "test", episodes=6)
    result = json.loads((trained / "result.json").read_text())
    assert found.score.accuracy == result["test/accuracy"]


def test_banks_and_batches_show_themselves_in_one_line(tiny: Path, small: Config) -> None:
    bank = open_bank(tiny, "train")
    assert repr(bank) == "ImageBank('tiny', train: 6 classes, 144 images of 16 x 16 x 3)"
    batch = sample_episodes(bank, small, "train", 0, 4)
    assert repr(batch) == "EpisodeBatch(4 episodes: 3-way 2-shot, 6 queries, images (3, 16, 16), cpu)"
