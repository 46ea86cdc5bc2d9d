"""The base classes straight from their shards, for a train split whose decoded images would not fit the cache.

Each epoch is a permutation of all images, which the seed and the manifest's numbers of samples decide: the shards come in a
random order, and each image then waits in a buffer for a random time. Any part of the stream can be read without its beginning.

Shapes: m images, H x W pixels, C channels; n images and S shards in an epoch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data.images import Pixels
from lgm_dist.data.philox import Purpose, RandomWords
from lgm_dist.data.shards import StoredSample, decode_sample, read_shard
from lgm_dist.data.streamed import StreamedSplit

Index = npt.NDArray[np.int64]

BUFFER = 8192
"""Longest time that an image waits in the buffer, in images. Part of the order: another value is another stream."""
AHEAD = 8
"""Batches that are read and decoded while the network trains."""


class Epoch(NamedTuple):
    """An order of all images. Place p is that of the p-th image that is read."""

    shards: Index
    """(S,): the shards in the order in which they are read."""
    starts: Index
    """(S + 1,): the first place of each of them."""
    places: Index
    """(n,): the place of each image of the epoch."""


class StreamOrder:
    """The order of the images of each epoch.

    Args:
        seed: Seed of the run.
        samples: Samples of each shard.
        buffer: Longest time in the buffer, in images.
    """

    def __init__(self, seed: int, samples: Sequence[int], buffer: int) -> None:
        self.images = sum(samples)
        self._samples, self._buffer = np.array(samples), buffer
        self._words = RandomWords(seed, "train", {Purpose.SHARDS: len(samples), Purpose.BUFFER: self.images})
        self.of_epoch = lru_cache(maxsize=2)(self._of_epoch)

    def _of_epoch(self, epoch: int) -> Epoch:
        words = {purpose: of[0].numpy() for purpose, of in self._words(torch.tensor([epoch])).items()}
        shards = np.argsort(words[Purpose.SHARDS], kind="stable")  # (S,)
        starts = np.cumsum([0, *self._samples[shards]])  # (S + 1,)
        # An image is read at its place and leaves up to `buffer` places later; the first ones wait until the buffer is full.
        filled = np.maximum(np.arange(self.images), self._buffer)  # (n,)
        leaves = (filled << 32) + words[Purpose.BUFFER] * self._buffer  # (n,), in 2**-32 of a place
        return Epoch(shards, starts, np.argsort(leaves, kind="stable"))


class ImageStream:
    """Images of the stream, read and decoded by a thread of its own: `ImageStream(split, config)(start, count)`.

    The thread expects calls for the same part of each batch, and works up to AHEAD batches ahead. Other calls are answered too,
    but start to read anew. With mixup, which mixes images of the whole batch, it decodes whole batches.

    A call raises ValueError, with the name of the shard, if a shard is missing or damaged.
    """

    def __init__(self, split: StreamedSplit, config: Config) -> None:
        self._manifest, self._split = split.manifest, split.split
        self._shards = split.manifest.splits[split.split].shards
        self._order = StreamOrder(config.run.seed, [shard.samples for shard in self._shards], BUFFER)
        self._batch, self._whole = config.pretraining.batch, config.pretraining.mixup > 0
        self._thread = ThreadPoolExecutor(1, "lgm_dist-stream")
        self._parts: Iterator[range] = iter(())
        self._decoded: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._ahead: deque[tuple[range, Future[tuple[Tensor, Tensor]]]] = deque()
        self._held = range(0)
        self._images = self._classes = torch.empty(0)

    def __call__(self, start: int, count: int) -> Pixels:
        """Images start to start + count - 1 of the stream."""
        if not (self._held.start <= start and start + count <= self._held.stop):
            self._take(self._part(start, count))
        place = slice(start - self._held.start, start - self._held.start + count)
        return Pixels(self._images[place], torch.arange(count), self._classes[place])

    def _part(self, start: int, count: int) -> range:
        first, last = start, start + count
        if self._whole:
            first, last = start // self._batch * self._batch, -(-last // self._batch) * self._batch
        return range(first, last)

    def _take(self, part: range) -> None:
        """Hold the images of `part`, and have the next ones read."""
        if not self._ahead or self._ahead[0][0] != part:
            self._start(part)
        self._held, future = self._ahead.popleft()
        self._images, self._classes = future.result()
        self._fill()

    def _start(self, part: range) -> None:
        """Begin to read at `part`."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
        stride = max(self._batch, len(part))
        self._parts = (range(first, first + len(part)) for first in itertools.count(part.start, stride))
        self._decoded = self._decode(part, stride)
        self._fill()

    def _fill(self) -> None:
        while len(self._ahead) < AHEAD:
            self._ahead.append((next(self._parts), self._thread.submit(next, self._decoded)))

    def _decode(self, part: range, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pixels (m, H, W, C) and classes (m,) of `part`, of the part `stride` images on, and so on."""
        waiting: dict[int, StoredSample] = {}
        read = self._read(part, stride)
        for first in itertools.count(part.start, stride):
            wanted = range(first, first + len(part))
            while not all(i in waiting for i in wanted):
                waiting |= next(read)
            samples = [waiting.pop(i) for i in wanted]
            pixels = np.stack([decode_sample(self._manifest, sample) for sample in samples])  # (m, H, W, C)
            yield torch.from_numpy(pixels), torch.tensor([sample.label for sample in samples])

    def _read(self, part: range, stride: int) -> Iterator[dict[int, StoredSample]]:
        """Yield the samples of each shard that are in `part` or in one of its repetitions, by their number in the stream."""
        n = self._order.images
        for epoch in itertools.count(part.start // n):
            shards, starts, places = self._order.of_epoch(epoch)
            numbers = np.empty_like(places)  # (n,): of the image at each place
            numbers[places] = np.arange(epoch * n, (epoch + 1) * n)
            wanted = (numbers >= part.start) & ((numbers - part.start) % stride < len(part))  # (n,)
            for shard, start, stop in zip(shards, starts, starts[1:], strict=False):
                if wanted[start:stop].any():  # the first shards of a resumed epoch may have been used up
                    samples = enumerate(read_shard(self._manifest, self._split, self._shards[shard]), start)
                    yield {int(numbers[p]): sample for p, sample in samples if p < stop and wanted[p]}
