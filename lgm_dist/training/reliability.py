"""How far probabilities and scores can be trusted: calibration error, reliability, AUROC, the interval of a share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
BINS = 15


class Reliability(NamedTuple):
    """Answers by their confidence, in bins of equal width from 0 to 1; an empty bin has count 0 and means of 0."""

    counts: npt.NDArray[np.int64]
    """(bins,)"""
    confidence: Floats
    """(bins,): mean probability of the answers."""
    accuracy: Floats
    """(bins,): share of the answers that are right."""

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over answers of |confidence - accuracy| of their bins."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float((self.counts * gaps).sum() / max(self.counts.sum(), 1))


def reliability(confidence: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS) -> Reliability:
    """The reliability of answers from the probability (n,) that each was given, and whether it is right (n,).

    Bin b holds probabilities above b / bins and up to (b + 1) / bins; the first one holds 0 too.
    """
    p, hit = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    place = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)  # (n,)
    counts, sums, hits = (np.bincount(place, weights, bins) for weights in (None, p, hit))  # (bins,) each
    share = np.maximum(counts, 1)
    return Reliability(counts.astype(np.int64), sums / share, hits / share)


def auroc(inside: npt.ArrayLike, outside: npt.ArrayLike) -> float:
    """The probability that a score of `inside` (n,) is above one of `outside` (m,); ties count half."""
    a, b = np.asarray(inside, np.float64), np.sort(np.asarray(outside, np.float64))
    below, up_to = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")  # (n,) each
    return float((below + up_to).sum() / (2 * len(a) * len(b)))


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of Wilson for a share of which `hits` of `count` trials were seen; (0, 1) without a trial."""
    if not count:
        return 0.0, 1.0
    share, scale = hits / count, 1 + z**2 / count
    middle = share + z**2 / (2 * count)
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)
