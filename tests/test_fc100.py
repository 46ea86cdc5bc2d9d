"""FC100 from all its sources, on small files in the formats of the real ones."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import pickle
import socket
import struct
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lgm_dist.config import SPLITS
from lgm_dist.data.shards import channel_statistics, image_histogram
from lgm_dist.data.source import DataSource
from lgm_dist.data.sources import fc100
from lgm_dist.data.sources.fc100 import fc100_source, split_table

SHARED = Path(__file__).parents[2] / "shared" / "data"
GROUPS = {name: group for t in split_table().values() for group, names in t.items() for name in names}
FINE, COARSE = sorted(GROUPS), sorted(set(GROUPS.values()))


def records() -> dict[str, list[tuple[str, int, int, np.ndarray]]]:
    """(file name, fine label, coarse label, pixels): two images a class in train, one in test."""
    rng = np.random.default_rng(3)
    rows: dict[str, list[Any]] = {"train": [], "test": []}
    for number, part in enumerate(("train", "train", "test")):
        for fine, name in enumerate(FINE):
            # The real archive has file names twice in one split of FC100, in the classes baby and girl.
            file = "baby_s_000222.png" if number == 0 and name in ("baby", "girl") else f"{name}_s_{number:06d}.png"
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            rows[part].append((file, fine, COARSE.index(GROUPS[name]), pixels))
    return {part: [found[i] for i in rng.permutation(len(found))] for part, found in rows.items()}


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes byte strings as Python 2 wrote its str, as in the official archive."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_str2(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    def save_text(self, value: str) -> None:
        self.save_str2(value.encode())

    dispatch[bytes], dispatch[str] = save_str2, save_text


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_official(folder: Path) -> Path:
    """A small cifar-100-python folder."""
    (folder / "cifar-100-python").mkdir(parents=True)
    meta = {"fine_label_names": FINE, "coarse_label_names": COARSE}
    (folder / "cifar-100-python" / "meta").write_bytes(python2_pickle(meta))
    for part, rows in records().items():
        data = np.stack([pixels.transpose(2, 0, 1).reshape(3072) for *_, pixels in rows])  # (n, 3072), planes R, G, B
        record = {"filenames": [r[0] for r in rows], "batch_label": f"{part}ing batch 1 of 1", "data": data}
        record |= {"fine_labels": [r[1] for r in rows], "coarse_labels": [r[2] for r in rows]}
        (folder / "cifar-100-python" / part).write_bytes(python2_pickle(record))
    return folder / "cifar-100-python"


def pack(folder: Path) -> Path:
    archive = folder.parent / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def declare_official(monkeypatch: pytest.MonkeyPatch, folder: Path, archive: Path | None = None) -> None:
    """Make these files the official ones for as long as the test runs."""
    from torchvision.datasets import CIFAR100

    for part in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{part}_list", [[part, md5(folder / part)]])
    if archive:
        monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def png_bytes(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)  # not the level of our own encoder
    return file.getvalue()


def write_parquet(
    folder: Path, names: bool = True, change: Callable[[dict[str, list[Any]]], object] = lambda _: None
) -> Path:
    """A small folder of Hugging Face parquet files; `change` spoils the columns of train."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in records().items():
        columns: dict[str, list[Any]] = {
            "img": [{"bytes": png_bytes(r[3]), "path": r[0]} for r in rows],
            "fine_label": [r[1] for r in rows],
            "coarse_label": [r[2] for r in rows],
        }
        if part == "train":
            change(columns)
        table = pa.table(columns)
        features = {"fine_label": {"names": FINE}, "coarse_label": {"names": COARSE}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{part}-00000-of-00001.parquet")
    return folder


def content(source: DataSource) -> dict[str, dict[str, tuple[str, bytes]]]:
    """Class and pixels by split and key."""
    return {
        split: {s.key: (found.classes[s.label].name, Image.open(io.BytesIO(s.read())).tobytes()) for s in found.samples}
        for split, found in source.splits.items()
    }


def expected_content() -> dict[str, dict[str, tuple[str, bytes]]]:
    home = {name: split for split, t in split_table().items() for names in t.values() for name in names}
    result: dict[str, dict[str, tuple[str, bytes]]] = {split: {} for split in SPLITS}
    for rows in records().values():
        for file, fine, _, pixels in rows:
            key = file.removesuffix(".png") + (f"-{FINE[fine]}" if file == "baby_s_000222.png" else "")
            result[home[FINE[fine]]][key] = (FINE[fine], pixels.tobytes())
    return result


def test_the_split_table_is_fc100s_and_carries_its_citation() -> None:
    table = split_table()
    assert {split: sum(map(len, groups.values())) for split, groups in table.items()} == {
        "train": 60,
        "val": 20,
        "test": 20,
    }
    assert {split: len(groups) for split, groups in table.items()} == {"train": 12, "val": 4, "test": 4}
    assert len(GROUPS) == 100
    assert len(COARSE) == 20
    text = (Path(fc100.__file__).parent / "fc100_split.json").read_text()
    assert "TADAM" in text
    assert "NeurIPS 2018" in text
    assert "Krizhevsky" in text


def test_archive_folder_and_parquet_hold_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_official(tmp_path / "a")
    archive = pack(folder)
    declare_official(monkeypatch, folder, archive)
    for source in (folder, folder.parent, archive, write_parquet(tmp_path / "p")):
        found = fc100_source(str(source))
        assert (found.name, found.shape) == ("fc100", (32, 32, 3))
        assert content(found) == expected_content()
        for split, entry in found.splits.items():
            names = [(group, name) for group, members in split_table()[split].items() for name in members]
            assert [(info.group, info.name) for info in entry.classes] == names
            assert set(Counter(s.label for s in entry.samples).values()) == {3}  # CIFAR's train and test merged


def test_parquet_bytes_pass_through(tmp_path: Path) -> None:
    found = fc100_source(str(write_parquet(tmp_path)))
    given = {png_bytes(pixels) for rows in records().values() for *_, pixels in rows}
    assert {s.read() for entry in found.splits.values() for s in entry.samples} == given


def test_an_archive_in_a_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_official(tmp_path / "a")
    declare_official(monkeypatch, folder, pack(folder))
    for file in folder.iterdir():
        file.unlink()
    assert content(fc100_source(str(tmp_path / "a"))) == expected_content()


def test_labels_without_names_are_cifars_alphabetical_lists(tmp_path: Path) -> None:
    assert content(fc100_source(str(write_parquet(tmp_path / "p", names=False)))) == expected_content()


def test_images_without_file_names_get_their_row(tmp_path: Path) -> None:
    def forget(columns: dict[str, list[Any]]) -> None:
        columns["img"] = [
            {"bytes": cell["bytes"], "path": None if i == 4 else cell["path"]} for i, cell in enumerate(columns["img"])
        ]

    found = fc100_source(str(write_parquet(tmp_path / "null", change=forget)))
    assert sum("train-00000-of-00001_00004" in found for found in content(found).values()) == 1
    bare = write_parquet(
        tmp_path / "bare", change=lambda c: c.update(img=[{"bytes": cell["bytes"]} for cell in c["img"]])
    )
    keys = [s.key for entry in fc100_source(str(bare)).splits.values() for s in entry.samples]
    assert sum(key.startswith("train-00000-of-00001_") for key in keys) == 200


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_official(tmp_path)
    declare_official(monkeypatch, folder)
    (folder / "test").write_bytes(pickle.dumps({"data": Attack(tmp_path / "ran")}, 2))
    pickle.loads((folder / "test").read_bytes())
    assert (tmp_path / "ran").exists()  # the attack works on a plain unpickler
    (tmp_path / "ran").unlink()
    found, official = md5(folder / "test"), r"\w{32}"
    sentence = (
        rf"source {folder}, file test is not the official file: its md5 is {found}, not {official}; download it again"
    )
    with pytest.raises(ValueError, match=sentence):
        fc100_source(str(folder))
    assert not (tmp_path / "ran").exists()


def test_the_md5_sum_of_the_archive_is_the_published_one(tmp_path: Path) -> None:
    archive = pack(write_official(tmp_path))  # not the official one
    with pytest.raises(ValueError, match=rf"md5 is {md5(archive)}, not eb9058c3a382ffc7106e4002c42a8d85; download it"):
        fc100_source(str(archive))


def test_damaged_and_incomplete_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_official(tmp_path)
    archive = pack(folder)
    declare_official(monkeypatch, folder, archive)
    for damaged in (archive.read_bytes()[:200_000], b"<html>404</html>", b""):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"source {archive} is not the official file: its md5 is .*; download it"):
            fc100_source(str(archive))
    archive.unlink()
    (folder / "train").write_bytes((folder / "train").read_bytes()[:-100])
    with pytest.raises(ValueError, match="file train is not the official file"):
        fc100_source(str(folder))
    (folder / "train").unlink()
    with pytest.raises(ValueError, match=r"holds no CIFAR-100 .*use --source .*parquet files"):
        fc100_source(str(folder))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["fine_label"].__setitem__(0, 100), "a fine label does not lie between 0 and 99"),
        (lambda c: c["coarse_label"].__setitem__(0, None), "a coarse label does not lie between 0 and 19"),
        (
            lambda c: c["coarse_label"].__setitem__(0, (c["coarse_label"][0] + 1) % 20),
            "image 0 is of class .* which CIFAR-100 lacks",
        ),
        (lambda c: c["img"].__setitem__(0, {"bytes": None, "path": "x"}), "1 images have no bytes"),
        (lambda c: c.update(label=c.pop("fine_label")), "lacks the columns img"),
        (lambda c: [column.pop() for column in c.values()], r"is incomplete: 2 images of class \w+, 3 of"),
    ],
)
def test_a_wrong_parquet_file_is_refused(tmp_path: Path, change: Callable[[Any], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"{sentence}.*--source"):
        fc100_source(str(write_parquet(tmp_path, change=change)))


def test_cut_and_missing_parquet_files_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    (file,) = tmp_path.glob("test*")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet lacks the columns"):
        fc100_source(str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match="holds no CIFAR-100"):
        fc100_source(str(tmp_path))


@pytest.fixture
def torchvisions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """CIFAR100 of torchvision, which downloads into tmp_path."""
    from torchvision.datasets import CIFAR100

    monkeypatch.setenv("LGM_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(CIFAR100, "url", CIFAR100.url)
    monkeypatch.setattr(CIFAR100, "tgz_md5", CIFAR100.tgz_md5)
    return CIFAR100


def test_a_download_that_fails_names_the_other_sources(torchvisions: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        torchvisions.url = f"http://127.0.0.1:{free.getsockname()[1]}/cifar-100-python.tar.gz"
        with pytest.raises(
            ValueError,
            match=r"cannot download CIFAR-100 from http://127.*refused.*tar\.gz, its unpacked folder.*parquet",
        ):
            fc100_source("")
    assert socket.getdefaulttimeout() is None


def test_without_a_source_the_archive_is_downloaded(
    torchvisions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_official(tmp_path / "served")
    archive = pack(folder)
    declare_official(monkeypatch, folder, archive)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        torchvisions.url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        first = content(fc100_source(""))
        server.shutdown()
    assert first == expected_content()
    assert content(fc100_source("")) == first  # from the cache folder, the server is gone
    torchvisions.tgz_md5 = "0" * 32
    with pytest.raises(ValueError, match="cannot download CIFAR-100"):
        fc100_source("")


@pytest.mark.skipif(not (SHARED / "cifar100").is_dir(), reason="the real CIFAR-100 is not beside the repository")
def test_the_real_images_have_the_published_statistics() -> None:
    source = fc100_source(str(SHARED / "cifar100"))
    shape = {split: (len(e.classes), len(e.samples)) for split, e in source.splits.items()}
    assert shape == {"train": (60, 36_000), "val": (20, 12_000), "test": (20, 12_000)}
    assert all(set(Counter(s.label for s in e.samples).values()) == {600} for e in source.splits.values())
    keys = [{s.key for s in e.samples} for e in source.splits.values()]
    assert [len(found) for found in keys] == [36_000, 12_000, 12_000]
    samples = [s for e in source.splits.values() for s in e.samples]
    histogram = np.zeros((3, 256), np.int64)  # (C, 256)
    for start in range(0, len(samples), 500):
        rows = b"".join(Image.open(io.BytesIO(s.read())).tobytes() for s in samples[start : start + 500])
        histogram += image_histogram(np.frombuffer(rows, np.uint8).reshape(-1, 32, 3))  # (500 * H, W, C)
    mean, std = channel_statistics(histogram)
    np.testing.assert_allclose(mean, [129.37731888, 124.10583864, 112.47758569], rtol=0, atol=1e-6)
    np.testing.assert_allclose(std, [68.20947949, 65.43124043, 70.45866994], rtol=0, atol=1e-6)
