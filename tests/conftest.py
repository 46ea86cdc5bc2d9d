"""A tiny data set on disk that trains in seconds, for the tests of everything above the data."""

from __future__ import annotations

import io
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lgm_dist.config import SPLITS, Config, ModelConfig
from lgm_dist.data.shards import write_shards
from lgm_dist.data.source import ClassInfo, DataSource, Sample, SplitSource

CLASSES, IMAGES, SIDE = 6, 24, 16
WITH_RAY = ("TestOnAHeadNode", "TestRealSweeps", "TestUnderRay")
"""Classes of tests with the marker ray."""

# A suite started in the background of a shell script has Ctrl-C ignored, and so would have all that its tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray come first: they take longest. Those that need a GPU are skipped where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip("no CUDA device"))
        assert item.get_closest_marker("ray") is None or any(f"::{name}::" in item.nodeid for name in WITH_RAY), item


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 3`: those in one process, as there is never more than one Ray here; the others by file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if any(f"::{name}::" in nodeid for name in WITH_RAY) else nodeid.split("::")[0]

    return ByFile(config, log)


def _png(split: int, label: int, index: int) -> bytes:
    """A noisy coloured stripe pattern; its direction and period tell the class, so that a few steps learn something."""
    random = np.random.default_rng([split, label, index])
    y, x = np.mgrid[:SIDE, :SIDE]
    angle = np.pi * label / CLASSES
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (1.2 + 0.3 * split) + random.uniform(0, 6))
    pixels = 128 + 60 * wave[..., None] * random.uniform(0.5, 1, 3) + 20 * random.standard_normal((SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of the data set `tiny`: 6 classes of 24 images of 16 x 16 in each split."""
    splits = {
        split: SplitSource(
            tuple(ClassInfo(f"{split}{label}") for label in range(CLASSES)),
            [
                Sample(f"{split}_{label}_{i}", label, partial(_png, number, label, i))
                for label in range(CLASSES)
                for i in range(IMAGES)
            ],
        )
        for number, split in enumerate(SPLITS)
    }
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return write_shards(DataSource("tiny", (SIDE, SIDE, 3), splits), folder)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Banks of the tests go into a folder of their own; W&B stays off the network; one thread, here and in children, since
    two only wait for each other where the machine is busy."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LGM_DIST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "disabled"


@pytest.fixture(scope="session")
def small(tiny: Path) -> Config:
    """A run on `tiny` with a network so small that a step takes a few milliseconds; 3 ways, 2 shots."""
    length = Config.of(epochs=1, steps_per_epoch=12, eval_every=4, eval_episodes=6, test_episodes=6)
    episodes = length.replace(ways=3, shot=2, query=2, eval_query=3, meta_batch=4)
    return episodes.replace(data=str(tiny), lr=1e-2, workers=0, model=ModelConfig(channels=3, filters=8, noise_size=4))
