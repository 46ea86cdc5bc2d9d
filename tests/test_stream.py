"""The stream of base classes from shards: its order, its pixels against the bank's, and runs that train on it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import IMAGES
from helpers.stages import bits, history, train
from scipy import stats

from lgm_dist.config import Config, ModelConfig, Split
from lgm_dist.data import open_bank, stream
from lgm_dist.data.bank import LARGEST_BANK, fits
from lgm_dist.data.labelled import ImageSampler
from lgm_dist.data.manifest import Manifest, Shard, read_manifest
from lgm_dist.data.shards import StoredSample, read_samples, read_shard, write_shards
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource
from lgm_dist.data.stream import ImageStream, StreamOrder
from lgm_dist.data.streamed import StreamedSplit
from lgm_dist.runs.announce import describe
from lgm_dist.runs.job import make_job
from lgm_dist.training.pretraining_task import Pretraining
from lgm_dist.training.worker import Worker

N = 6 * IMAGES
BUFFER = 40
"""Of the streams below, whose shards have 30 samples."""


@pytest.fixture(scope="module")
def sharded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set `tiny` again, in shards of 30 samples."""
    found = read_manifest(str(tiny))
    splits = {}
    for split, entry in found.splits.items():
        samples = [Sample(key, label, lambda png=png: png) for key, png, label in read_samples(found, split)]  # type: ignore[misc]
        splits[split] = SplitSource(tuple(ClassInfo(c.name) for c in entry.classes), samples)
    return write_shards(DataSource("tiny", found.shape, splits), tmp_path_factory.mktemp("sharded"), 30)


@pytest.fixture(scope="module")
def split(sharded: Path) -> StreamedSplit:
    return StreamedSplit(read_manifest(str(sharded)))


@pytest.fixture(autouse=True)
def _buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER", BUFFER)


@pytest.fixture
def config(small: Config, sharded: Path, tmp_path: Path) -> Config:
    model = ModelConfig(channels=3, filters=8, noise_size=4, generator="none", head="class_means")
    of_pretraining = {"batch": 8, "steps": 12, "eval_every": 4, "augmentations": ("flip_shift",)}
    settings = {f"pretraining.{name}": value for name, value in of_pretraining.items()}
    run = small.replace(stages=("pretraining",), storage=str(tmp_path), name="run", model=model, data=str(sharded))
    return run.replace(**settings)


def plain(**settings: object) -> Config:
    return Config.of(**{"pretraining.augmentations": (), "pretraining.rotations": 1, "pretraining.batch": 8} | settings)


@pytest.mark.parametrize(("samples", "buffer"), [([30, 30, 30, 30, 24], 40), ([7], 40), ([1, 50, 3, 9], 9)])
def test_each_epoch_is_a_permutation_of_its_own_that_needs_no_more_than_the_buffer(
    samples: list[int], buffer: int
) -> None:
    order, n = StreamOrder(0, samples, buffer), sum(samples)
    for epoch in range(3):
        shards, starts, places = order.of_epoch(epoch)
        assert sorted(shards) == list(range(len(samples)))
        assert np.diff(starts).tolist() == [samples[s] for s in shards]
        assert sorted(places) == list(range(n))
        # read up to place p: what has not left the buffer yet was read at most 2 * buffer places ago
        for i in range(n):
            assert places[i:].min() > i - 2 * buffer
            assert places[: i + 1].max() <= i + buffer
        assert epoch == 0 or places.tolist() != order.of_epoch(epoch - 1).places.tolist()
    assert StreamOrder(0, samples, buffer).of_epoch(2).places.tolist() == order.of_epoch(2).places.tolist()
    assert (
        len(samples) == 1
        or StreamOrder(1, samples, buffer).of_epoch(0).places.tolist() != order.of_epoch(0).places.tolist()
    )


def test_an_epoch_has_the_images_and_labels_of_the_bank_each_once(split: StreamedSplit, sharded: Path) -> None:
    bank = open_bank(str(sharded), "train")
    expected = Counter(
        (label, image.tobytes()) for label, image in zip(np.repeat(np.arange(6), 24), bank.images, strict=True)
    )
    of = ImageStream(split, plain())
    for epoch in range(2):
        pixels, rows, classes = of(epoch * N, N)
        found = Counter(
            (int(label), image.numpy().tobytes()) for label, image in zip(classes, pixels[rows], strict=True)
        )
        assert found == expected


def test_the_buffer_mixes_classes_that_lie_together() -> None:
    """100 shards of 100 samples of one class each: in an order by shard, a batch of 128 has 2 or 3 classes.

    Drawn at random from a buffer that holds about 2,000 of its 4,000 places' images, that is of about 40 shards, it has 37 on
    average (40 * (1 - (39 / 40) ** 128) = 38). Over whole epochs, the position of a class is uniform.
    """
    order = StreamOrder(3, [100] * 100, 4000)
    tenths = np.zeros((100, 10))
    for epoch in range(20):
        shards, starts, places = order.of_epoch(epoch)
        classes = shards[np.searchsorted(starts, places, side="right") - 1]  # (n,)
        batches = classes[: 78 * 128].reshape(78, 128)
        assert np.mean([len(set(batch)) for batch in batches]) > 30
        np.add.at(tenths, (classes, np.arange(10_000) // 1000), 1)
    means = tenths.sum(0)
    assert (means == 20_000).all()
    # chi-square over the tenths of the epoch in which shards are read: 20 epochs x 100 shards
    first = np.array([order.of_epoch(epoch).shards.argsort() // 10 for epoch in range(20)])  # (20, 100)
    assert stats.chisquare(np.bincount(first[:, :10].ravel(), minlength=10)).pvalue > 0.001


@pytest.mark.parametrize("mixup", [0.0, 0.5])
@pytest.mark.parametrize("batch", [8, 7])
def test_slices_of_two_workers_are_the_batch_of_one(
    config: Config, split: StreamedSplit, batch: int, mixup: float
) -> None:
    """Over two epochs, whose ends lie within batches; 7 images are shared unevenly."""
    config = config.replace(**{"pretraining.batch": batch, "pretraining.mixup": mixup})
    whole, *halves = (Pretraining(config, {"train": split}, Worker(r, w)) for r, w in ((0, 1), (0, 2), (1, 2)))
    for step in range(2 * N // batch):
        both = [half.batch(step) for half in halves]
        for name in ("images", "labels", "others"):
            assert torch.equal(getattr(whole.batch(step), name), torch.cat([getattr(half, name) for half in both]))


def test_a_stream_that_begins_anywhere_goes_on_as_the_whole_one(split: StreamedSplit) -> None:
    whole = ImageSampler(split, plain())(0, 3 * N)
    for start in (0, 1, 59, 100, N - 3, N + 77):
        of = ImageSampler(split, plain())
        for first in range(start, start + 64, 8):
            assert torch.equal(of(first, 8).images, whole.images[first : first + 8])
    assert torch.equal(of(40, 8).images, whole.images[40:48]), "backwards"


def test_a_late_start_reads_no_shard_that_is_used_up(split: StreamedSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    ours = replace(split.manifest)  # a copy, since the threads of other tests may read on

    def recorded(manifest: Manifest, of: Split, shard: Shard) -> Iterator[StoredSample]:
        if manifest is ours:
            read.append(shard.file)
        return read_shard(manifest, of, shard)

    monkeypatch.setattr(stream, "read_shard", recorded)
    order = StreamOrder(0, [shard.samples for shard in split.manifest.splits["train"].shards], BUFFER)
    shards, starts, places = order.of_epoch(0)
    start = N - 8
    ImageStream(StreamedSplit(ours), plain(seed=0))(start, 8)
    oldest = np.searchsorted(starts, places[start:].min(), side="right") - 1
    assert oldest >= 2
    assert read[0] == split.manifest.splits["train"].shards[shards[oldest]].file


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "its sha256 is"),
    ],
)
def test_an_error_names_the_shard(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(sharded.parent, tmp_path / "copy")
    damage(tmp_path / "copy" / "tiny-train-000002.tar")
    of = ImageStream(StreamedSplit(read_manifest(str(tmp_path / "copy" / sharded.name))), plain())
    with pytest.raises(ValueError, match=rf"shard .*tiny-train-000002\.tar: {message}.*prepare the shards again with"):
        [of(start, 8) for start in range(0, N, 8)]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_with_another_number_of_samples_is_named(split: StreamedSplit, change: int) -> None:
    manifest = split.manifest
    first, *others = manifest.splits["train"].shards
    shards = (replace(first, samples=first.samples + change), *others)
    wrong = replace(manifest, splits=manifest.splits | {"train": replace(manifest.splits["train"], shards=shards)})
    of = ImageStream(StreamedSplit(wrong), plain())
    with pytest.raises(ValueError, match=rf"shard .*-000000\.tar: holds 30 samples, the manifest says {30 + change};"):
        [of(start, 8) for start in range(0, N, 8)]


def test_the_first_images_are_those_of_the_bank(split: StreamedSplit, sharded: Path) -> None:
    beats: list[int] = []
    bank, part = open_bank(str(sharded), "train"), split.first_images(5, lambda: beats.append(1))
    assert len(beats) == len(split.manifest.splits["train"].shards)
    assert (part.classes, part.mean, part.std, part.digest) == (bank.classes, bank.mean, bank.std, bank.digest)
    assert part.counts.tolist() == [5] * 6
    for c in range(6):
        assert np.array_equal(part.images[5 * c : 5 * c + 5], bank.images[bank.offsets[c] : bank.offsets[c] + 5])
    whole = split.first_images(100, lambda: None)
    assert np.array_equal(whole.images, bank.images)
    assert (whole.offsets.tolist(), whole.shape) == (bank.offsets.tolist(), split.shape)


def test_which_banks_fit(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, cache = read_manifest(str(sharded)), str(tmp_path / "none" / "yet")
    assert fits(manifest, "train", cache), "110 kB"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * N * 16 * 16 * 3 - 2))
    assert not fits(manifest, "train", cache)
    open_bank(str(sharded), "train", cache)
    assert fits(manifest, "train", cache), "it is there"
    monkeypatch.setenv(LARGEST_BANK, str(N * 16 * 16 * 3 - 1))
    assert not fits(manifest, "train", cache)
    monkeypatch.setenv(LARGEST_BANK, str(N * 16 * 16 * 3))
    assert fits(manifest, "train", cache)
    monkeypatch.setenv(LARGEST_BANK, "20 GB")
    with pytest.raises(ValueError, match=r"LGM_DIST_LARGEST_BANK \('20 GB'\) must be a whole number of bytes"):
        fits(manifest, "train", cache)


class TestRuns:
    """With an artificial limit, by which the bank of the train split does not fit."""

    @pytest.fixture(autouse=True)
    def _limit(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("LGM_DIST_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv(LARGEST_BANK, "1000")

    def test_a_run_streams_and_builds_no_bank(self, config: Config, tmp_path: Path) -> None:
        job = make_job(config)
        assert describe(job)[-1] == "the base classes, 0.000111 GB decoded, are streamed from 5 shards"
        train(config)
        assert sorted(path.name.split("-")[1] for path in (tmp_path / "cache").glob("*.uint8")) == ["test", "val"]

    def test_a_run_that_is_resumed_ends_with_the_same_bits_whatever_fits_now(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = train(config.replace(storage=str(tmp_path / "whole")))
        config = config.replace(storage=str(tmp_path / "stopped"))
        run = train(config, stop_before=6)
        assert len(history(run)) < 12
        monkeypatch.delenv(LARGEST_BANK)
        assert train(config) == run
        assert history(run) == history(whole)
        assert bits(run)["step-00000012"] == bits(whole)["step-00000012"]

    def test_a_run_sees_as_many_images_of_each_class_as_from_the_bank(self, config: Config) -> None:
        config = config.replace(**{"pretraining.batch": 12, "pretraining.rotations": 1})
        split = StreamedSplit(read_manifest(config.data.name))
        for base in (split, open_bank(config.data.name, "train")):
            task = Pretraining(config, {"train": base}, Worker())
            for epoch in range(2):
                labels = torch.cat([task.batch(epoch * 12 + step).labels for step in range(12)])
                assert labels.bincount().tolist() == [24] * 6

    def test_stages_that_need_any_image_at_any_time(self, config: Config) -> None:
        both = config.replace(stages=("pretraining", "episodes"))
        assert make_job(both).config["data"]["stream"] == "auto", "they keep the bank"
        with pytest.raises(ValueError, match=r"stream \('always'\) does not suit stage episodes.*use --stream never"):
            make_job(both.replace(stream="always", name="other"))
        assert make_job(config.replace(stream="never", name="third")).config["data"]["stream"] == "never"
