"""Episodes: which images of a bank they hold, and the tensors that the model is given.

Episode i is a pure function of (seed, split, i) and the settings: any worker can make any part of the stream, a resumed
run starts the range elsewhere, and slices of a range give the same episodes as the whole range.

Shapes: B episodes, N ways, K shots, S = N*K support images, Q queries of each class, T = N*Q query images (protocol
paper: T = 1), C channels, H x W pixels, Z noise of one generated layer. Support image i*K + j is shot j of class i; so
are query images i*Q + j of class i under protocol standard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import Config, Split
from lgm_dist.data.augment import ANGLES, Index, Pixels, flip_shift, rotate
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.philox import Purpose, Words, below, choose, draws, normals

Augmentation = Callable[[Pixels, slice], npt.NDArray[np.uint8] | npt.NDArray[np.float32]]
"""Pixels of a slice of the images (m, H, W, C), and which slice it is -> the same, augmented, on the same scale."""

_PAPER_MEAN, _PAPER_STD = 113.77, 70.1899  # the authors' data.py: one scalar each, for all channels
_VALUES_AT_ONCE = 2**20
"""Pixel values made ready at a time: they stay in the cache from the bank's bytes to the last step of the normalisation."""


@dataclass(frozen=True)
class EpisodeRows:
    """What was drawn for B episodes; rows count from the start of the bank."""

    support: Index
    """(B, S)"""
    query: Index
    """(B, T)"""
    labels: Index
    """(B, T): which of the N classes each query shows."""
    classes: Index
    """(B, N): the bank's numbers of the classes, in the order of the labels."""
    angles: Index | None = None
    """(B, N): protocol paper; the place in ANGLES of each class's rotation."""
    flips: npt.NDArray[np.bool_] | None = None
    """(B, S + T): augmented training under protocol standard; which images are mirrored, support first."""
    shifts: Index | None = None
    """(B, S + T, 2): likewise; pixels down and to the right."""


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes, ready for the model."""

    images: Tensor
    """(B, S + T, C, H, W) float32, normalised, support first; in memory channels come last."""
    labels: Tensor
    """(B, T) int64"""
    noise: Tensor
    """(B, 2, Z) float32 standard normals: the noise of the two generated layers, should it be wanted."""
    shots: int
    """S"""
    rows: EpisodeRows | None = None
    """What was drawn; None where it was drawn on the device."""

    def __repr__(self) -> str:
        episodes, images, *size = self.images.shape
        counts = f"{self.shots} support and {images - self.shots} query images of {' x '.join(map(str, size))}"
        return f"EpisodeBatch({episodes:,} episodes of {counts}, {self.images.device})"

    @property
    def support(self) -> Tensor:
        """(B, S, C, H, W), a view of `images`."""
        return self.images[:, : self.shots]

    @property
    def query(self) -> Tensor:
        """(B, T, C, H, W), a view of `images`."""
        return self.images[:, self.shots :]

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The same batch with its tensors on `device`; `rows` stays where it is."""
        images, labels, noise = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.noise))
        return replace(self, images=images, labels=labels, noise=noise)


def check_episodes(
    config: Config, split: Split, name: str, counts: Sequence[int], class_names: Sequence[str] = ()
) -> None:
    """Raise ValueError where a split with `counts[c]` images of class c is too small for the episodes that config asks.

    `name` is the data set's. Needs no images, so a manifest will do.
    """
    shape, of = config.episode(split), f"split {split} of '{name}'"
    if shape.ways > len(counts):
        raise ValueError(
            f"{shape.ways} ways need {shape.ways} classes, {of} has {len(counts)}; set ways to {len(counts)} or less"
        )
    smallest = min(range(len(counts)), key=counts.__getitem__)
    if (needed := shape.shot + shape.query) > counts[smallest]:
        paper = config.episodes.protocol == "paper"
        field = "the query" if paper else "query" if split == "train" else "eval_query"
        called = f"'{class_names[smallest]}'" if class_names else str(smallest)
        raise ValueError(
            f"shot ({shape.shot}) + {field} ({shape.query}) = {needed} images a class, but class {called} "
            f"of {of} has {counts[smallest]}; lower shot{'' if paper else f' or {field}'}"
        )


def draw_rows(bank: ImageBank, config: Config, split: Split, start: int, count: int) -> EpisodeRows:
    """Draw episodes start .. start + count - 1 of the stream.

    Raises ValueError where the bank is another split's, has too few classes, or a class of it has too few images.
    """
    assert start >= 0, start
    if bank.split != split:
        raise ValueError(
            f"split ({split}) was asked of the bank of split {bank.split} of '{bank.name}'; open {split}'s"
        )
    sizes = np.diff(bank.offsets)  # (classes,)
    check_episodes(config, split, bank.name, sizes.tolist(), bank.classes)
    words = _words(config, split, Purpose.CLASSES, start, count, config.episode(split).ways)
    classes = choose(words, np.full(count, len(sizes)))  # (B, N)
    if config.episodes.protocol == "paper":
        return _paper_rows(bank, config, split, start, classes)
    rows = _standard_rows(bank, config, split, start, classes)
    return (
        _with_flips_and_shifts(bank, config, split, start, rows)
        if config.episodes.augment and split == "train"
        else rows
    )


def _words(config: Config, split: Split, purpose: Purpose, start: int, count: int, length: int) -> Words:
    """`length` words of each of the episodes start .. start + count - 1: (count, length)."""
    seed = config.run.seed if split == "train" else config.episodes.eval_seed
    return draws(seed, split, purpose, np.arange(start, start + count, dtype=np.int64), length)


def _standard_rows(bank: ImageBank, config: Config, split: Split, start: int, classes: Index) -> EpisodeRows:
    """K + Q images of each class, chosen in each class by itself."""
    (b, n), (_, k, q, _) = classes.shape, config.episode(split)
    # Draw by draw over all classes: with more queries the images before them stay as they are.
    words = _words(config, split, Purpose.IMAGES, start, b, (k + q) * n).reshape(b, k + q, n)  # (B, K+Q, N)
    sizes = np.diff(bank.offsets)[classes].reshape(b * n)  # (B*N,)
    index = choose(words.swapaxes(1, 2).reshape(b * n, k + q), sizes).reshape(b, n, k + q)  # (B, N, K+Q)
    row = bank.offsets[classes][..., None] + index  # (B, N, K+Q)
    labels = np.tile(np.arange(n).repeat(q), (b, 1))  # (B, T)
    return EpisodeRows(row[..., :k].reshape(b, n * k), row[..., k:].reshape(b, n * q), labels, classes)


def _paper_rows(bank: ImageBank, config: Config, split: Split, start: int, classes: Index) -> EpisodeRows:
    """K + 1 places, the same in every class of an episode, and one query, which is turned as its class is."""
    (b, n), k = classes.shape, config.episode(split).shot
    labels = below(_words(config, split, Purpose.TARGET, start, b, 1), n)  # (B, 1)
    sizes = np.diff(bank.offsets)[classes].min(axis=1)  # (B,)
    index = choose(_words(config, split, Purpose.IMAGES, start, b, k + 1), sizes)  # (B, K+1)
    angles = below(_words(config, split, Purpose.ROTATION, start, b, n), len(ANGLES))  # (B, N)
    first = bank.offsets[classes]  # (B, N)
    support = (first[..., None] + index[:, None, :k]).reshape(b, n * k)  # (B, S)
    query = np.take_along_axis(first, labels, axis=1) + index[:, k:]  # (B, 1)
    return EpisodeRows(support, query, labels, classes, angles=angles)


def _with_flips_and_shifts(bank: ImageBank, config: Config, split: Split, start: int, rows: EpisodeRows) -> EpisodeRows:
    """Each image by itself: mirrored or not, and moved by up to an eighth of its height and width."""
    b, images = len(rows.support), rows.support.shape[1] + rows.query.shape[1]
    words = _words(config, split, Purpose.FLIP_SHIFT, start, b, 3 * images).reshape(b, images, 3)  # (B, S+T, 3)
    reach = np.array(bank.images.shape[1:3]) // 8  # 4 of 32 pixels
    return replace(rows, flips=below(words[..., 0], 2) == 1, shifts=below(words[..., 1:], 2 * reach + 1) - reach)


def sample_episodes(bank: ImageBank, config: Config, split: Split, start: int, count: int) -> EpisodeBatch:
    """Episodes start .. start + count - 1 of the stream, augmented as the protocol says and normalised.

    Raises ValueError as draw_rows does.
    """
    rows = draw_rows(bank, config, split, start, count)
    every = np.concatenate([rows.support, rows.query], axis=1)  # (B, S+T)
    images = _ready(bank, config, every.ravel(), _augmentation(rows))  # (B*(S+T), C, H, W)
    return EpisodeBatch(
        images=images.unflatten(0, every.shape),  # (B, S+T, C, H, W)
        labels=torch.from_numpy(rows.labels),
        noise=draw_noise(config, split, start, count, 1)[0],
        shots=rows.support.shape[1],
        rows=rows,
    )


def gather_episodes(
    bank: ImageBank, config: Config, split: Split, start: int, count: int
) -> tuple[npt.NDArray[np.uint8], EpisodeRows]:
    """The same episodes' images as they lie in the bank, (B, S + T, H, W, C), support first, and what was drawn."""
    rows = draw_rows(bank, config, split, start, count)
    every = np.concatenate([rows.support, rows.query], axis=1)  # (B, S+T)
    return _gather(bank, every.ravel()).reshape(*every.shape, *bank.images.shape[1:]), rows


def load_images(bank: ImageBank, config: Config, rows: Index) -> Tensor:
    """The images of the given rows (n,), normalised, never augmented: (n, C, H, W) float32, channels_last in memory."""
    return _ready(bank, config, rows, lambda pixels, _: pixels)


def draw_noise(config: Config, split: Split, start: int, count: int, draws: int) -> Tensor:
    """`draws` draws of the noise of each episode: (draws, B, 2, Z) float32; draw 0 is the noise of sample_episodes."""
    z = config.model.noise_size
    words = _words(config, split, Purpose.NOISE, start, count, draws * 2 * z)  # (B, draws*2*Z)
    noise = normals(words).reshape(count, draws, 2, z)  # (B, draws, 2, Z)
    return torch.from_numpy(noise.swapaxes(0, 1).copy())  # (draws, B, 2, Z)


def to_pixels(images: Tensor, bank: ImageBank, config: Config) -> npt.NDArray[np.float32]:
    """Normalised images (n, C, H, W) as a person sees them: (n, H, W, C), 0 to 1."""
    mean, std = statistics(bank, config)
    pixels = images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)  # (n, H, W, C)
    shown: npt.NDArray[np.float32] = (pixels / 255).clamp(0, 1).numpy()
    return shown


def _gather(bank: ImageBank, rows: Index) -> Pixels:
    return bank.tensor.index_select(0, torch.from_numpy(rows)).numpy()  # (n, H, W, C)


def _augmentation(rows: EpisodeRows) -> Augmentation:
    """What `rows` holds besides rows, to be done to any slice of the images (B*(S+T), H, W, C)."""
    if rows.angles is not None:
        query = np.take_along_axis(rows.angles, rows.labels, axis=1)  # (B, T)
        support = rows.angles.repeat(rows.support.shape[1] // rows.angles.shape[1], axis=1)  # (B, S)
        angle = np.concatenate([support, query], axis=1).ravel()  # (B*(S+T),)
        return lambda pixels, piece: rotate(pixels, angle[piece])
    if rows.flips is not None and rows.shifts is not None:
        flip, (dy, dx) = rows.flips.ravel(), rows.shifts.reshape(-1, 2).T  # (B*(S+T),) each
        return lambda pixels, piece: flip_shift(pixels, flip[piece], dy[piece], dx[piece])
    return lambda pixels, _: pixels


def _ready(bank: ImageBank, config: Config, rows: Index, augment: Augmentation) -> Tensor:
    """The images of the given rows (n,), augmented and normalised: (n, C, H, W) float32, channels_last in memory."""
    height, width, channels = bank.images.shape[1:]
    mean, std = (torch.tensor(s).repeat(height * width) for s in statistics(bank, config))  # (H*W*C,)
    out = torch.empty(len(rows), len(mean))
    size = max(_VALUES_AT_ONCE // len(mean), 1)
    for first in range(0, len(rows), size):
        piece = slice(first, first + size)
        pixels = augment(_gather(bank, rows[piece]), piece)  # (m, H, W, C)
        out[piece].copy_(torch.from_numpy(pixels).flatten(1)).sub_(mean).div_(std)
    return out.view(-1, height, width, channels).permute(0, 3, 1, 2)  # (n, C, H, W)


def statistics(bank: ImageBank, config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the normalisation, per channel on the 0 to 255 scale."""
    if config.episodes.protocol == "paper":
        return (_PAPER_MEAN,) * len(bank.mean), (_PAPER_STD,) * len(bank.std)
    return bank.mean, bank.std
