"""Data: sources, prepared shards, the bank of decoded images, and the stream of episodes.

The names below are imported when they are first used, so that preparing a data set needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lgm_dist.data.bank import ImageBank, open_bank
    from lgm_dist.data.episodes import EpisodeBatch, EpisodeSampler, check_episodes, sample_episodes

__all__ = ["EpisodeBatch", "EpisodeSampler", "ImageBank", "check_episodes", "open_bank", "sample_episodes"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "bank" if name in ("ImageBank", "open_bank") else "episodes"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
