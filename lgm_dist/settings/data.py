"""The settings of the data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lgm_dist import checks
from lgm_dist.settings.mark import SWEEP, TARGET, setting


@dataclass(frozen=True)
class DataConfig:
    """The data set and where it lies."""

    name: str = setting("fc100", flag="data", basic=True, not_searched=TARGET)
    """Data set: a name (fc100, glyphs, or one that was prepared under data_root), or the path or URL of a manifest."""
    root: str = setting("data", flag="data_root", resumable=True, not_searched=SWEEP)
    """Folder of the prepared data sets. A built-in data set that is missing is prepared there."""
    source: str = setting("", resumable=True, not_searched=SWEEP)
    """Location of the CIFAR-100 archive, folder or parquet files, if fc100 has to be prepared (empty: download)."""
    cache: str = setting("", resumable=True, not_searched=SWEEP)
    """Folder of the decoded images (empty: LGM_DIST_CACHE, else lgm_dist in the user's cache folder)."""
    stream: Literal["auto", "always", "never"] = setting("auto", not_searched=SWEEP)
    """Whether pretraining reads the base classes from the shards, instead of from decoded images in the cache. auto: if these
    would take more than half of the free space of the cache's disk, or than LGM_DIST_LARGEST_BANK bytes."""

    def __post_init__(self) -> None:
        checks.paths(self)
        checks.choice(self, "stream", ("auto", "always", "never"))
        if not self.name:
            raise ValueError("data ('') must name a data set; use fc100, glyphs or the path of a manifest")
