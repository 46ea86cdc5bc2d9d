"""How a GPU rounds: the same bits each time, in full float32 unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def arithmetic(*, tf32: bool = False) -> Iterator[None]:
    """Make convolutions and matrix products deterministic, and compute them in full float32 unless `tf32`."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.fp32_precision, tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        matmul.fp32_precision = before
