"""From what a user names to a manifest: prepared data sets are found, `glyphs` and `fc100` are prepared on demand."""

from __future__ import annotations

import os
from pathlib import Path

from lgm_dist.data.fetch import is_url
from lgm_dist.data.lock import exclusive
from lgm_dist.data.source import DataSource

BUILT_IN = ("fc100", "glyphs")
"""Data sets that can be prepared from their name alone."""


def ensure_manifest(data: str, data_root: str, source: str) -> str:
    """The path or URL of the manifest that `data` stands for.

    Args:
        data: Path or URL of a manifest (ends in .json), or the name of a data set, prepared in data_root/NAME.
        data_root: Folder of the prepared data sets; fc100 and glyphs are prepared into it where they are missing,
            once also where several processes start together.
        source: Where fc100 is prepared from (see `fc100_source`; "" downloads it).

    Raises ValueError for a name or path that leads nowhere, and where preparing fails.
    """
    if data.endswith(".json"):
        if not is_url(data) and not os.path.isfile(data):
            raise ValueError(f"data: there is no manifest {data}; prepare one with `python scripts/prepare.py --help`")
        return data
    manifest = Path(data_root) / data / f"{data}.json"
    if os.path.isfile(manifest):  # unlike Path's, False too where the name is too long
        return str(manifest)
    if data not in BUILT_IN:
        raise ValueError(
            f"data ({data!r}) is no data set: {manifest} does not exist; use {', '.join(BUILT_IN)}, the path or URL of a "
            f"manifest (.json), or prepare it with `python scripts/prepare.py folder --source PATH --name {data} "
            f"--out {manifest.parent}`"
        )
    try:
        Path(data_root).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ValueError(
            f"data_root ({data_root}) cannot be written ({fault.strerror}); name another folder"
        ) from fault
    with exclusive(Path(data_root) / f".{data}.lock"):
        if not manifest.is_file():  # else another process has just prepared it
            from lgm_dist.data.shards import write_shards

            write_shards(_built_in(data, source), manifest.parent)
    return str(manifest)


def _built_in(name: str, source: str) -> DataSource:
    if name == "glyphs":
        from lgm_dist.data.sources.glyphs import glyphs_source

        return glyphs_source()
    from lgm_dist.data.sources.fc100 import fc100_source

    return fc100_source(source)
