"""ImageBank: the right images in the right order, decoded once, even if several processes start together or one is killed."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_shards import tiny_source

from lgm_dist.data import shards
from lgm_dist.data.bank import ImageBank, cache_folder, make_once, open_bank
from lgm_dist.data.lock import exclusive
from lgm_dist.data.shards import write_shards

fork = multiprocessing.get_context("fork")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_shards(tiny_source(), tmp_path / "tiny", samples_per_shard=5)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def read_plainly(manifest: Path, split: str) -> tuple[np.ndarray, list[int]]:
    """The images sorted by label and key, read with tarfile and PIL only."""
    members: dict[str, bytes] = {}
    for path in manifest.parent.glob(f"*-{split}-*.tar"):
        with tarfile.open(path) as tar:
            members |= {info.name: tar.extractfile(info).read() for info in tar}
    rows = sorted((int(members[n.replace(".png", ".cls")]), n) for n in members if n.endswith(".png"))
    return np.stack([np.asarray(Image.open(io.BytesIO(members[n]))) for _, n in rows]), [label for label, _ in rows]


def same(a: ImageBank, b: ImageBank) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.offsets, b.offsets)


def test_a_bank_holds_the_images_of_its_split_by_class_and_key(manifest: Path, cache: str) -> None:
    for split in ("train", "val", "test"):
        bank = open_bank(manifest, split, cache)
        images, labels = read_plainly(manifest, split)
        assert np.array_equal(bank.images, images)
        assert bank.images.shape == (12, 4, 6, 3)
        assert bank.images.dtype == np.uint8
        assert bank.offsets.tolist() == [0, 5, 8, 12] == np.searchsorted(labels, [0, 1, 2, 3]).tolist()
        assert bank.counts.tolist() == [5, 3, 4]
        assert bank.classes == (f"{split}-c0", f"{split}-c1", f"{split}-c2")
        assert bank.groups == ("g0", "g1", "g0")
        assert (bank.name, bank.split) == ("tiny", split)
    train, _ = read_plainly(manifest, "train")
    np.testing.assert_allclose(bank.mean, train.mean((0, 1, 2)))  # of train, in the bank of test too
    np.testing.assert_allclose(bank.std, train.std((0, 1, 2)))


def test_the_order_does_not_depend_on_the_shards(tmp_path: Path, manifest: Path, cache: str) -> None:
    other = write_shards(tiny_source(), tmp_path / "other", samples_per_shard=2)
    assert same(open_bank(other, "train", cache), open_bank(manifest, "train", cache))
    assert len(list(Path(cache).glob("*.uint8"))) == 2  # another manifest, another bank


def test_the_images_are_one_read_only_mapped_file(manifest: Path, cache: str) -> None:
    bank = open_bank(manifest, "train", cache)
    assert not bank.images.flags.writeable
    assert isinstance(bank.images.base, np.memmap)
    (file,) = Path(cache).glob("*.uint8")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    assert [line[1] for line in lines] == ["r--s"]  # readable, shared


def test_a_later_open_needs_no_shards(manifest: Path, cache: str) -> None:
    first = open_bank(manifest, "train", cache)
    for path in manifest.parent.glob("*.tar"):
        path.unlink()
    assert same(open_bank(str(manifest), "train", cache), first)


def test_a_later_open_needs_torch_and_numpy_alone(manifest: Path, cache: str) -> None:
    open_bank(manifest, "train", cache)
    blocked = ("webdataset", "PIL", "torchvision", "pyarrow", "tqdm", "ray", "wandb")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); from lgm_dist.data.bank import open_bank; "
    code += f"print(open_bank({str(manifest)!r}, 'train', {cache!r}).images.sum())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(out) == int(read_plainly(manifest, "train")[0].sum())


def open_and_log(manifest: Path, cache: str, barrier: Any, log: Path) -> None:
    logger = logging.getLogger("lgm_dist.data.bank")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.FileHandler(log))
    barrier.wait()
    bank = open_bank(manifest, "train", cache)
    assert np.array_equal(bank.images, read_plainly(manifest, "train")[0])


def test_four_processes_that_start_together_decode_once(manifest: Path, cache: str, tmp_path: Path) -> None:
    log, barrier = tmp_path / "log", fork.Barrier(4)
    workers = [fork.Process(target=open_and_log, args=(manifest, cache, barrier, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert log.read_text().count("decoded 12 images of train") == 1
    assert len(log.read_text().splitlines()) == 1


def open_and_die(manifest: Path, cache: str) -> None:
    real = shards.read_images

    def deadly(*args: Any) -> Iterator[Any]:
        for number, row in enumerate(real(*args)):
            if number == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    shards.read_images = deadly
    open_bank(manifest, "train", cache)


def test_who_waits_for_another_builder_shows_signs_of_life(tmp_path: Path) -> None:
    path, beaten, order = tmp_path / "a.uint8", threading.Event(), []

    def build(name: str, target: Path) -> None:
        order.append(name)
        target.write_bytes(b"1234")

    with exclusive(path.with_suffix(".lock")):
        other = threading.Thread(target=make_once, args=(path, 4, partial(build, "other"), beaten.set))
        other.start()
        assert beaten.wait(60)
        assert not order
    other.join(60)
    assert (order, path.read_bytes()) == (["other"], b"1234")


def test_a_builder_that_is_killed_half_way_leaves_nothing_harmful(manifest: Path, cache: str) -> None:
    victim = fork.Process(target=open_and_die, args=(manifest, cache))
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert list(Path(cache).glob("*.uint8")) == []
    assert np.array_equal(open_bank(manifest, "train", cache).images, read_plainly(manifest, "train")[0])
    assert sorted(path.suffix for path in Path(cache).iterdir()) == [".lock", ".uint8"]


def test_a_cut_cache_file_is_built_anew(manifest: Path, cache: str) -> None:
    open_bank(manifest, "train", cache)
    (file,) = Path(cache).glob("*.uint8")
    file.write_bytes(file.read_bytes()[:-1])
    assert np.array_equal(open_bank(manifest, "train", cache).images, read_plainly(manifest, "train")[0])


def test_a_bad_shard_is_named_and_leaves_no_bank(manifest: Path, cache: str) -> None:
    shard = manifest.parent / "tiny-train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(ValueError, match=rf"shard {shard}: its sha256 .*prepare the shards again with"):
        open_bank(manifest, "train", cache)
    assert [path.suffix for path in Path(cache).iterdir()] == [".lock"]
    assert open_bank(manifest, "val", cache).counts.sum() == 12


def test_wrong_names_are_refused(tmp_path: Path, manifest: Path, cache: str) -> None:
    with pytest.raises(ValueError, match=r"split \('valid'\) must be one of train, val, test"):
        open_bank(manifest, "valid", cache)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot read the manifest .*none\.json"):
        open_bank(tmp_path / "none.json", "train", cache)


def test_the_cache_folder_is_the_argument_then_the_environments_then_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LGM_DIST_CACHE", "/env")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder("/arg") == Path("/arg")
    assert cache_folder("") == Path("/env")
    monkeypatch.delenv("LGM_DIST_CACHE")
    assert cache_folder("") == Path("/xdg/lgm_dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("") == Path("/home/me/.cache/lgm_dist")
