"""Speed of sampling episodes, against plain numpy and other libraries; and of evaluations, which sample most of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from lgm_dist.bench.measure import Section, Spread, in_turn, plain, ratio
from lgm_dist.config import Config
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.episodes import EpisodeSampler, load_images
from lgm_dist.extras import installed
from lgm_dist.model import LGMNet
from lgm_dist.training.evaluation import evaluate
from lgm_dist.training.memory import keep_freed_memory

EPISODES = 64
CONFIG = Config.of(ways=5, shot=1, query=15, augment=False)
HEADER = ("episodes ready for the model", "episodes/s", "to plain numpy")


def data(bank: ImageBank, rounds: int, threads: int = 2, against: Sequence[str] | None = None) -> Section:
    """Sample and gather 5-way 1-shot 15-query episodes in one process.

    `against` names peers of PEERS (see `check_peers`).
    """
    peers = {name: PEERS[name](bank) for name in check_peers(against)}
    torch.set_num_threads(threads)
    keep_freed_memory()
    position = iter(range(0, 1 << 30, EPISODES))
    sampler, augmented = (EpisodeSampler(bank, config) for config in (CONFIG, CONFIG.replace(augment=True)))
    contenders: dict[str, Callable[[], object]] = {
        "lgm_dist, uint8": lambda: gather(sampler, bank, next(position)),
        "plain numpy, uint8": lambda: plainly(bank, False),
        "lgm_dist, normalised float32": lambda: sampler(next(position), EPISODES),
        "plain numpy, normalised float32": lambda: plainly(bank, True),
        "lgm_dist, augmented, normalised": lambda: augmented(next(position), EPISODES),
    } | {f"{name}, normalised float32": work for name, work in peers.items()}
    found = in_turn({name: _timed(work) for name, work in contenders.items()}, rounds, warmup=3)
    rows = []
    for name, seconds in found.items():
        base = found["plain numpy, uint8" if "uint8" in name else "plain numpy, normalised float32"]
        rows.append((name, _rate(seconds).text(0), "" if "plain" in name else ratio(base, seconds).text(2)))
    note = (
        f"5-way 1-shot 15-query, {bank.name} ({len(bank.images):,} images of {bank.images.shape[1]} x {bank.images.shape[2]}), "
        f"{threads} threads; median [smallest, largest] of {rounds} rounds of {EPISODES} episodes in turn."
    )
    return Section("data", "lgm-dist bench data", HEADER, rows, note, {"seconds": plain(found)})


def check_peers(names: Sequence[str] | None) -> Sequence[str]:
    """The peers of these names; None: those that are installed. Raises ValueError for one that is unknown or not installed."""
    if names is None:
        return [name for name in PEERS if installed(name)]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"against ({name}) must be one of {', '.join(PEERS)}")
        if not installed(name):
            raise ValueError(f"against ({name}) is not installed; install {name}, or leave it out")
    return names


def _easyfsl(bank: ImageBank) -> Callable[[], object]:
    """EPISODES episodes of easyfsl in its fastest configuration: normalised float tensors in memory, no worker processes."""
    from easyfsl.datasets import FeaturesDataset  # of 1.5.0
    from easyfsl.samplers import TaskSampler

    labels = np.repeat(np.arange(len(bank.classes)), bank.counts)
    everything = load_images(bank, CONFIG, np.arange(len(bank.images))).contiguous()  # (n, C, H, W)
    dataset = FeaturesDataset(labels.tolist(), everything, list(bank.classes))
    with mock.patch.object(Sampler, "__init__", return_value=None):  # it passes an argument that torch has dropped
        sampler = TaskSampler(dataset, CONFIG.episodes.ways, CONFIG.episodes.shot, CONFIG.episodes.query, EPISODES)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    return lambda: list(loader)


PEERS: dict[str, Callable[[ImageBank], Callable[[], object]]] = {"easyfsl": _easyfsl}


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def gather(sampler: EpisodeSampler, bank: ImageBank, start: int) -> torch.Tensor:
    """The images of EPISODES episodes as they lie in the bank: (episodes * 80, H, W, C) uint8."""
    rows = sampler.draw_rows(torch.arange(start, start + EPISODES))[0]  # (episodes, 80)
    return bank.tensor.index_select(0, rows.flatten())


def _rate(seconds: Spread) -> Spread:
    return seconds.each(lambda s: EPISODES / s)


def plainly(bank: ImageBank, normalise: bool) -> np.ndarray:
    """EPISODES episodes in plain numpy: (episodes, 80, H, W, C), or (episodes, 80, C, H, W) normalised."""
    random, images = np.random.default_rng(0), np.asarray(bank.images)
    mean, std = np.array(bank.mean, np.float32), np.array(bank.std, np.float32)
    found = []
    for _ in range(EPISODES):
        classes = random.choice(len(bank.classes), CONFIG.episodes.ways, replace=False)
        rows = [
            bank.offsets[c]
            + random.choice(int(bank.counts[c]), CONFIG.episodes.shot + CONFIG.episodes.query, replace=False)
            for c in classes
        ]
        episode = images[np.concatenate(rows)]  # (80, H, W, C)
        found.append(((episode.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2) if normalise else episode)
    return np.stack(found)


def evaluation(bank: ImageBank, rounds: int, episodes: int = 2000, threads: int = 2) -> Section:
    """Compare an evaluation with ten noise draws with one with a single draw. Images are embedded once for all draws."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model, config = LGMNet().eval(), Config.of(ways=5, shot=1, eval_query=15)

    def with_draws(draws: int) -> Callable[[], float]:
        return _timed(lambda: evaluate(model, bank, config, bank.split, episodes, draws))

    found = in_turn({"1": with_draws(1), "10": with_draws(10)}, rounds, warmup=0)
    slower = ratio(found["10"], found["1"])
    rows = [
        ("1", found["1"].text(), ""),
        ("10", found["10"].text(), f"{slower.text(2)} (target: under 1.5)"),
    ]
    note = (
        f"{episodes:,} episodes, 5-way 1-shot 15-query, of {len(bank.images):,} images of {bank.name}, {threads} threads; "
        f"median [smallest, largest] of {rounds} rounds in turn."
    )
    header = ("noise draws", "seconds", "times as long")
    return Section("evaluation", "lgm-dist bench evaluation", header, rows, note, {"seconds": plain(found)})
