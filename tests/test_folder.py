"""Class folders: every format, mode and size, and an error for what cannot be used."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgm_dist.cluster.fit import fit
from lgm_dist.config import Config
from lgm_dist.data.bank import open_bank
from lgm_dist.data.shards import write_shards
from lgm_dist.data.sources.folder import folder_source
from lgm_dist.runs import checkpoint

RNG = np.random.default_rng(11)
PIXELS = RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray = PIXELS, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One class of one 8x10 image in each split."""
    for split in ("train", "val", "test"):
        save(tmp_path / split / f"{split}_bird" / "a.png")
    return tmp_path


def first_image(root: Path, size: int | None = None) -> np.ndarray:
    """The first train image as it goes into a shard."""
    return np.asarray(Image.open(io.BytesIO(folder_source(str(root), "x", size).splits["train"].samples[0].read())))


def replace_first(root: Path, image: Image.Image, name: str, **options: object) -> None:
    (root / "train" / "train_bird" / "a.png").unlink()
    image.save(root / "train" / "train_bird" / name, **options)


def test_classes_samples_and_shape_of_unequal_classes(root: Path) -> None:
    for i in range(3):
        save(root / "train" / "ant" / f"ant.{i}.png")
    (root / "train" / "ant" / ".DS_Store").write_bytes(b"x")
    source = folder_source(str(root), "zoo", None)
    train = source.splits["train"]
    assert (source.name, source.shape) == ("zoo", (8, 10, 3))
    assert [info.name for info in train.classes] == ["ant", "train_bird"]
    assert [(s.key, s.label) for s in train.samples] == [("ant_0", 0), ("ant_1", 0), ("ant_2", 0), ("a", 1)]


def test_equal_file_names_get_their_class_and_number(root: Path) -> None:
    save(root / "train" / "ant" / "a.png")
    save(root / "train" / "bee" / "a.png")
    save(root / "train" / "bee" / "a.bmp")
    keys = [s.key for s in folder_source(str(root), "x", None).splits["train"].samples]
    assert keys == ["a-ant", "a-bee", "a-bee-2", "a-train_bird"]


def test_a_png_that_needs_nothing_keeps_its_bytes(root: Path) -> None:
    given = save(root / "train" / "train_bird" / "a.png", compress_level=0).read_bytes()
    for size in (None, 8):
        source = folder_source(str(root), "x", size)
        same = source.splits["train"].samples[0].read() == given
        assert same == (size is None)  # 8x10 is resized to 8x8


def test_every_mode_becomes_rgb_beside_colour_images(root: Path) -> None:
    grey = PIXELS[..., 0]
    deep = (grey.astype(np.uint16) << 8) + 7
    rgba = np.dstack([PIXELS, grey])
    palette = Image.fromarray(PIXELS).quantize(16)
    cases = [
        (Image.fromarray(grey), "a.png", np.dstack([grey] * 3)),
        (Image.fromarray(deep), "a.tif", np.dstack([grey] * 3)),
        (Image.fromarray(deep), "b.png", np.dstack([grey] * 3)),
        (Image.fromarray(rgba), "a.webp", PIXELS),
        (Image.fromarray(grey > 127), "a.bmp", np.dstack([np.where(grey > 127, 255, 0)] * 3)),
        (palette, "a.gif", np.asarray(palette.convert("RGB"))),
    ]
    for image, name, expected in cases:
        for file in (root / "train" / "train_bird").iterdir():
            file.unlink()
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        image.save(root / "train" / "train_bird" / name, **options)
        assert np.array_equal(first_image(root), expected), name


@pytest.mark.parametrize(("orientation", "turns"), [(6, 1), (3, 2), (8, 3)])
def test_the_exif_orientation_is_applied(root: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: to be viewed turned by 90 degrees clockwise; 3: by 180; 8: by 270
    replace_first(root, Image.fromarray(np.rot90(PIXELS, turns)), "a.png", exif=exif)
    assert np.array_equal(first_image(root), PIXELS)


def test_images_are_resized_on_request(root: Path) -> None:
    replace_first(root, Image.fromarray(np.repeat(np.repeat(PIXELS, 4, 0), 3, 1)), "a.png")
    save(root / "val" / "val_bird" / "b.png", np.full((50, 7, 3), 9, np.uint8))
    source = folder_source(str(root), "x", 84)
    assert source.shape == (84, 84, 3)
    flat = np.asarray(Image.open(io.BytesIO(source.splits["val"].samples[1].read())))
    assert np.array_equal(flat, np.full((84, 84, 3), 9))
    small = first_image(root, 4).astype(float)  # 32x30 to 4x4: close to the mean of each 8x7.5 block
    blocks = np.repeat(PIXELS, 3, 1).astype(float).reshape(4, 2, 30, 3).mean(1)  # (4, 30, 3)
    blocks = np.repeat(blocks, 2, 1).reshape(4, 4, 15, 3).mean(2)  # (4, 4, 3)
    assert np.abs(small - blocks).max() < 60
    assert np.corrcoef(small.ravel(), blocks.ravel())[0, 1] > 0.9


def test_a_folder_becomes_shards_and_a_bank(root: Path, tmp_path: Path) -> None:
    for i in range(4):
        save(root / "train" / "ant" / f"{i}.png", RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8))
    manifest = write_shards(folder_source(str(root), "zoo", None), tmp_path / "out")
    bank = open_bank(manifest, "train", str(tmp_path / "cache"))
    assert bank.counts.tolist() == [4, 1]
    assert np.array_equal(bank.images[4], PIXELS)


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """Grey images in four modes, three classes of six images in each split."""
    for split in ("train", "val", "test"):
        for label in range(3):
            for i in range(6):
                pixels = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
                deep = (pixels.astype(np.uint16) << 8) + 7
                alpha = np.dstack([pixels, np.full_like(pixels, 9)])
                image = [pixels, pixels > 127, deep, alpha][i % 4]
                save(tmp_path / "grey" / split / f"{split}{label}" / f"{label}_{i}.png", image)
    return tmp_path / "grey"


def test_grey_images_stay_grey(grey: Path, tmp_path: Path) -> None:
    source = folder_source(str(grey), "x")
    assert source.shape == (16, 16, 1)
    bank = open_bank(write_shards(source, tmp_path / "out"), "train", str(tmp_path / "cache"))
    assert bank.channels == 1
    assert bank.images.shape == (18, 16, 16, 1)
    files = sorted((grey / "train").rglob("*.png"))
    for file, image in zip(files, bank.images[..., 0], strict=True):
        stored = np.asarray(Image.open(file))
        scale = {np.dtype(np.uint8): 1, np.dtype(bool): 255, np.dtype(np.uint16): 1 / 256}[stored.dtype]
        expected = (stored[..., 0] if stored.ndim == 3 else stored) * scale // 1
        np.testing.assert_array_equal(image, expected)
    png = next(s for s in source.splits["train"].samples if s.key == "0_0")
    assert png.read() == files[0].read_bytes(), "a grey PNG that needs no change keeps its bytes"
    small = folder_source(str(grey), "x", 8)
    assert small.shape == (8, 8, 1)
    assert Image.open(io.BytesIO(small.splits["val"].samples[0].read())).size == (8, 8)


def test_one_colour_image_makes_all_images_rgb(grey: Path) -> None:
    save(grey / "test" / "test0" / "colour.png", RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for size in (None, 8):
        source = folder_source(str(grey), "x", size)
        assert source.shape[2] == 3
        assert {Image.open(io.BytesIO(s.read())).mode for s in source.splits["train"].samples} == {"RGB"}


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_grey_images_train_without_a_flag(grey: Path, tmp_path: Path, small: Config, protocol: str) -> None:
    manifest = write_shards(folder_source(str(grey), "x"), tmp_path / "out")
    config = small.replace(data=str(manifest), storage=str(tmp_path), name="run", protocol=protocol)
    config = config.replace(**{"model.channels": 0}, steps_per_epoch=2, eval_every=2, shot=1)
    model, trained, _ = checkpoint.load_model(checkpoint.best(fit(config)))
    assert (model.config.channels, trained.model.channels) == (1, 1)
    assert next(p for p in model.parameters() if p.ndim == 4).shape[1] == 1


def read_all(root: Path, size: int | None) -> list[bytes]:
    return [s.read() for split in folder_source(str(root), "x", size).splits.values() for s in split.samples]


def fault(root: Path, size: int | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_all(root, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_of_unequal_size_name_the_first_odd_one(root: Path) -> None:
    odd = save(root / "val" / "val_bird" / "b.png", PIXELS[:, :9])
    text = fault(root)
    assert text.startswith(f"{odd} is 9x8, {root}/train/train_bird/a.png is 10x8; make them equal with --size")


def test_a_file_that_is_no_image_is_named(root: Path) -> None:
    (root / "test" / "test_bird" / "notes.txt").write_text("not an image")
    for size in (None, 4):
        assert f"{root}/test/test_bird/notes.txt is not an image that PIL reads" in fault(root, size)


def test_a_cut_image_is_named(root: Path) -> None:
    file = save(root / "test" / "test_bird" / "cut.jpg", np.asarray(RNG.integers(0, 256, (80, 80, 3), dtype=np.uint8)))
    file.write_bytes(file.read_bytes()[:2000])
    assert f"{file} is damaged" in fault(root, 4)


def test_an_unknown_range_is_named(root: Path) -> None:
    replace_first(root, Image.fromarray(np.ones((8, 10), np.float32)), "a.tif")
    assert "a.tif has pixels of mode F without a known range" in fault(root)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("limit", "named"), [(70, 70), (30, 60)])
def test_decompression_bombs_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch, limit: int, named: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # an image has 80 pixels; PIL raises from twice the limit on
    for size in (None, 4):
        text = fault(root, size)
        assert f"{root}/train/train_bird/a.png" in text
        assert str(named) in text
        assert "shrink or remove it" in text


def test_a_wrong_tree_is_explained(root: Path) -> None:
    assert f"the folder {root}/none/train does not exist" in fault(root / "none")
    assert "size (0) must be at least 1" in fault(root, 0)
    twice = save(root / "val" / "train_bird" / "a.png")
    assert "class train_bird is in train and in val" in fault(root)
    twice.unlink()
    assert f"class folder {twice.parent} is empty" in fault(root)
    twice.parent.rmdir()
    stray = save(root / "val" / "stray.png")
    assert f"{stray} lies beside the class folders" in fault(root)
    stray.unlink()
    (root / "val" / "val_bird" / "inner").mkdir()
    assert f"{root}/val/val_bird/inner is not a file" in fault(root)
