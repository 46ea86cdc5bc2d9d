"""Episodes: which images of a bank they hold, and the tensors that the model is given.

Episode i is a pure function of (seed, split, i) and the settings. Any worker can make any part of the stream, a resumed run
starts at any episode, and slices of a range give the same episodes as the whole range.

Shapes: B episodes, N ways, K shots, Q queries of each class, S = N * K support images, T = N * Q query images (protocol paper:
T = 1), C channels, H x W pixels, Z noise of one generated layer. Support image i * K + j is shot j of class i; under protocol
standard, query image i * Q + j is query j of class i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import Config, EpisodeShape, Split
from lgm_dist.data.augment import all_variants, augmentations_of
from lgm_dist.data.bank import ImageBank
from lgm_dist.data.holdout import episode_classes
from lgm_dist.data.images import Normalisation, load_images, statistics, to_pixels
from lgm_dist.data.philox import Purpose, RandomWords, bounded, choose, normals

__all__ = [
    "Drawn",
    "EpisodeBatch",
    "EpisodeRows",
    "EpisodeSampler",
    "check_episodes",
    "draw_noise",
    "draw_rows",
    "episode_seed",
    "load_images",
    "sample_episodes",
    "standard_rows",
    "statistics",
    "to_pixels",
]

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes, ready for the model."""

    images: Tensor
    """(B, S + T, C, H, W) float32, normalised, support images first; in memory channels come last."""
    labels: Tensor
    """(B, T) int64: which of the N classes each query image shows."""
    noise: Tensor
    """(B, 2, Z) float32 standard normals: the noise of the two generated layers, for a model that samples its weights."""
    ways: int
    """N"""
    shot: int
    """K"""

    @property
    def support(self) -> Tensor:
        """(B, S, C, H, W), a view of `images`."""
        return self.images[:, : self.ways * self.shot]

    @property
    def query(self) -> Tensor:
        """(B, T, C, H, W), a view of `images`."""
        return self.images[:, self.ways * self.shot :]

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The same batch on `device`."""
        images, labels, noise = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.noise))
        return replace(self, images=images, labels=labels, noise=noise)

    def __repr__(self) -> str:
        b, images, *shape = self.images.shape
        queries = images - self.ways * self.shot
        return (
            f"EpisodeBatch({b} episodes: {self.ways}-way {self.shot}-shot, {queries} queries, "
            f"images {tuple(shape)}, {self.images.device})"
        )


class Drawn(NamedTuple):
    """What was drawn for B episodes, on the sampler's device."""

    rows: Tensor
    """(B, S + T) int64: rows of the bank, support images first."""
    labels: Tensor
    """(B, T) int64"""
    classes: Tensor
    """(B, N) int64: the bank's numbers of the classes, in the order of the labels."""
    noise: Tensor
    """(B, 2, Z) float32"""
    parameters: tuple[Tensor, ...]
    """(B, S + T, P) for each augmentation."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Drawn:
        """`change` applied to every tensor."""
        rows, labels, classes, noise = (change(t) for t in self[:4])
        return Drawn(rows, labels, classes, noise, tuple(change(t) for t in self.parameters))


class EpisodeSampler:
    """Makes episodes of a bank's split on a device: `EpisodeSampler(bank, config)(start, count)`.

    On the CPU it reads the bank's mapped file. On another device it keeps all images there, as uint8; of an augmentation with a
    few variants (the rotation of protocol paper has five) it keeps all variants, as float32: 61 KB for an image of 32 x 32.
    There nothing waits for the host, so that a CUDA graph can hold both `draw` and `make`. All devices make the same episodes,
    except for the last bit of the noise.

    Args:
        resident: Keep the images on the device (default: if it is not the CPU).

    Raises ValueError as `check_episodes` does.
    """

    def __init__(
        self, bank: ImageBank, config: Config, device: torch.device | str = "cpu", *, resident: bool | None = None
    ) -> None:
        check_episodes(config, bank.split, bank.name, bank.counts.tolist(), bank.classes)
        self.config, self.split, self.device = config, bank.split, torch.device(device)
        self.shape = config.episode(bank.split)
        self.augmentations = tuple(make(bank.shape) for make in augmentations_of(config, bank.split))
        self._offsets = torch.from_numpy(bank.offsets).to(self.device)  # (classes + 1,)
        used = episode_classes(config, bank.split, len(bank.classes))
        self._used = torch.from_numpy(used).to(self.device)  # (classes of episodes,)
        self._words = RandomWords(episode_seed(config, bank.split), bank.split, self._word_counts(), self.device)
        self._normalise = Normalisation(bank, config, self.device)
        self._count, self._pixels, self._variants = len(bank.images), bank.tensor, False
        if self.device.type != "cpu" if resident is None else resident:
            self._variants = bool(self.augmentations) and self.augmentations[0].variants > 0
            pixels = all_variants(self.augmentations[0], bank.tensor) if self._variants else bank.tensor.clone()
            self._pixels = pixels.to(self.device)

    def __call__(self, start: int, count: int) -> EpisodeBatch:
        """Episodes start to start + count - 1 of the stream."""
        return self.make(self.draw(torch.arange(start, start + count, device=self.device)))

    def draw(self, episodes: Tensor) -> Drawn:
        """Draws the episodes of these numbers (B,), int64. On a GPU this takes as long for many as for few."""
        words = self._words(episodes)
        rows, labels, classes = self._rows(words)
        noise = normals(words[Purpose.NOISE]).unflatten(1, (2, -1))  # (B, 2, Z)
        return Drawn(rows, labels, classes, noise, self._parameters(words, labels))

    def draw_rows(self, episodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, S + T), labels (B, T) and classes (B, N) of the same episodes alone; see `Drawn`."""
        return self._rows(self._words(episodes))

    def make(self, drawn: Drawn) -> EpisodeBatch:
        """The episodes that were drawn, their images augmented and normalised."""
        rows, todo = (
            drawn.rows.flatten(),
            [
                (augmentation, parameters.flatten(0, 1))  # (B * (S + T), P)
                for augmentation, parameters in zip(self.augmentations, drawn.parameters, strict=True)
            ],
        )
        if self._variants:
            rows = rows + todo.pop(0)[1][:, 0] * self._count

        def augment(images: Tensor, place: slice) -> Tensor:
            for augmentation, parameters in todo:
                images = augmentation.apply(images, parameters[place])
            return images

        images = self._normalise(self._pixels, rows, augment).unflatten(0, drawn.rows.shape)  # (B, S + T, C, H, W)
        return EpisodeBatch(images, drawn.labels, drawn.noise, self.shape.ways, self.shape.shot)

    def _word_counts(self) -> dict[int, int]:
        """Random words of an episode by purpose."""
        n, k, q, queries = self.shape
        paper = self.config.episodes.protocol == "paper"
        counts: dict[int, int] = {Purpose.CLASSES: n, Purpose.IMAGES: k + 1 if paper else n * (k + q)}
        counts |= {Purpose.TARGET: 1} if paper else {}
        for a in self.augmentations:
            counts[a.purpose] = a.words * (n if a.per_class else n * k + queries)
        return counts | {Purpose.NOISE: 2 * self.config.model.noise_size}

    def _rows(self, words: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, S + T), labels (B, T), classes (B, N)."""
        return self._paper(words) if self.config.episodes.protocol == "paper" else self._standard(words)

    def _standard(self, words: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, S + T), labels (B, T), classes (B, N): K + Q images of each class, chosen in each class by itself."""
        classes = self._classes(words)  # (B, N)
        return *standard_rows(words[Purpose.IMAGES], classes, self._offsets, self.shape), classes

    def _paper(self, words: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, S + 1), labels (B, 1), classes (B, N): the same K + 1 places in each class, the last one for the query."""
        n, k = self.shape.ways, self.shape.shot
        classes = self._classes(words)  # (B, N)
        labels = bounded(words[Purpose.TARGET], n)  # (B, 1)
        index = choose(words[Purpose.IMAGES], self._offsets.diff()[classes].amin(1))  # (B, K + 1)
        first = self._offsets[classes]  # (B, N)
        support = (first[..., None] + index[:, None, :k]).flatten(1)  # (B, S)
        return torch.cat([support, first.gather(1, labels) + index[:, k:]], dim=1), labels, classes

    def _classes(self, words: dict[int, Tensor]) -> Tensor:
        """(B, N)"""
        return self._used[choose(words[Purpose.CLASSES], self._used.new_full((), len(self._used)))]

    def _parameters(self, words: dict[int, Tensor], labels: Tensor) -> tuple[Tensor, ...]:
        """Each augmentation's parameters of each image (B, S + T, P)."""
        found = []
        support = torch.arange(self.shape.ways, device=self.device).repeat_interleave(self.shape.shot)  # (S,)
        for augmentation in self.augmentations:
            own = words[augmentation.purpose].unflatten(1, (-1, augmentation.words))  # (B, S + T or N, words)
            if augmentation.per_class:
                label = torch.cat([support.expand(len(labels), -1), labels], dim=1)  # (B, S + T)
                own = own.gather(1, label[..., None].expand(-1, -1, augmentation.words))  # (B, S + T, words)
            found.append(augmentation.draw(own))
        return tuple(found)


def standard_rows(words: Tensor, classes: Tensor, offsets: Tensor, shape: EpisodeShape) -> tuple[Tensor, Tensor]:
    """Rows (B, S + T) and labels (B, T) of episodes of these classes (B, N), of a bank with these offsets (classes + 1,).

    words (B, N * (K + Q)) choose the images of each class by itself, without replacement.
    """
    n, k, q, _ = shape
    # Draw by draw over all classes: with more queries the images before them stay as they are.
    of_class = words.unflatten(1, (k + q, n)).transpose(1, 2)  # (B, N, K + Q)
    index = choose(of_class, offsets.diff()[classes])  # (B, N, K + Q)
    rows = offsets[classes][..., None] + index  # (B, N, K + Q)
    labels = torch.arange(n, device=rows.device).repeat_interleave(q).repeat(len(rows), 1)  # (B, T)
    return torch.cat([rows[..., :k].flatten(1), rows[..., k:].flatten(1)], dim=1), labels


def episode_seed(config: Config, split: Split) -> int:
    """The seed of the episodes of a split."""
    return config.run.seed if split == "train" else config.episodes.eval_seed


def check_episodes(
    config: Config, split: Split, name: str, counts: Sequence[int], class_names: Sequence[str] = ()
) -> None:
    """Check that a split with `counts[c]` images of class c is large enough for the episodes of `config`.

    `name` is the data set's. Needs no images, so that a manifest is enough. Raises ValueError if the split is too small, or for
    a wrong augmentation.
    """
    augmentations_of(config, split)
    e = config.episodes
    if e.protocol == "paper" and (e.eval_copies or e.eval_flips):
        raise ValueError(
            f"eval_copies ({e.eval_copies}) and eval_flips ({e.eval_flips}) need protocol standard; protocol paper is the "
            "authors' pipeline, which has neither: leave them out"
        )
    used = episode_classes(config, split, len(counts))
    counts, class_names = [counts[c] for c in used], [class_names[c] for c in used] if class_names else ()
    shape, of = config.episode(split), f"split {split} of '{name}'"
    if shape.ways > len(counts):
        raise ValueError(
            f"{shape.ways} ways need {shape.ways} classes, {of} has {len(counts)}; set ways to {len(counts)} or less"
        )
    smallest = min(range(len(counts)), key=counts.__getitem__)
    if (needed := shape.shot + shape.query) > counts[smallest]:
        paper = e.protocol == "paper"
        field = "the query" if paper else "query" if split == "train" else "eval_query"
        called = f"'{class_names[smallest]}'" if class_names else str(smallest)
        raise ValueError(
            f"shot ({shape.shot}) + {field} ({shape.query}) = {needed} images a class, but class {called} "
            f"of {of} has {counts[smallest]}; lower shot{'' if paper else f' or {field}'}"
        )


def sample_episodes(bank: ImageBank, config: Config, split: Split, start: int, count: int) -> EpisodeBatch:
    """Episodes start to start + count - 1 of the stream, on the CPU, augmented as the protocol says and normalised.

    Raises ValueError as `draw_rows` does.
    """
    return _sampler(bank, config, split, start)(start, count)


class EpisodeRows(NamedTuple):
    """The images of B episodes, in numpy; rows count from the start of the bank."""

    support: Index
    """(B, S)"""
    query: Index
    """(B, T)"""
    labels: Index
    """(B, T)"""
    classes: Index
    """(B, N): the bank's numbers of the classes, in the order of the labels."""


def draw_rows(bank: ImageBank, config: Config, split: Split, start: int, count: int) -> EpisodeRows:
    """Which images are in episodes start to start + count - 1 of the stream.

    Raises ValueError if the bank is another split's, has too few classes, or too few images of a class.
    """
    sampler = _sampler(bank, config, split, start)
    rows, labels, classes = (t.numpy() for t in sampler.draw_rows(torch.arange(start, start + count)))
    support = sampler.shape.ways * sampler.shape.shot
    return EpisodeRows(rows[:, :support], rows[:, support:], labels, classes)


def draw_noise(config: Config, split: Split, start: int, count: int, draws: int) -> Tensor:
    """`draws` draws of the noise of each episode: (draws, B, 2, Z) float32; draw 0 is the noise of sample_episodes."""
    words = RandomWords(episode_seed(config, split), split, {Purpose.NOISE: draws * 2 * config.model.noise_size})
    noise = normals(words(torch.arange(start, start + count))[Purpose.NOISE])  # (B, draws * 2 * Z)
    by_draw: Tensor = noise.unflatten(1, (draws, 2, -1)).transpose(0, 1)  # (draws, B, 2, Z)
    return by_draw.contiguous()


def _sampler(bank: ImageBank, config: Config, split: Split, start: int) -> EpisodeSampler:
    assert start >= 0, start
    if bank.split != split:
        raise ValueError(
            f"split ({split}) was asked of the bank of split {bank.split} of '{bank.name}'; open {split}'s"
        )
    return EpisodeSampler(bank, config)
