"""From the name of a data set to its manifest. Data sets that need nothing but their name are prepared on demand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lgm_dist.data.fetch import is_url
from lgm_dist.data.lock import exclusive
from lgm_dist.data.sources import SOURCES, needs_nothing, options_of, prepare_command


def prepare(source: str, out: str | Path, **options: Any) -> Path:
    """Write the shards and the manifest of a data set into the folder `out`; return the manifest's path.

    Args:
        source: Name of a registered source, such as fc100 or folder.
        out: Folder of the shards. A data set in data/NAME is found by its name.
        options: Options of the source, as in `lgm-dist prepare SOURCE --help`.

    Raises ValueError for an unknown source, a wrong option, and a source that cannot be read.
    """
    read = SOURCES.get(source)
    known = options_of(read)
    for option in options:
        if option not in known:
            raise ValueError(f"{option} is no option of source {source}; it takes {', '.join(known) or 'none'}")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"source {source} needs the option {option}; give it a value")
    from lgm_dist.data.shards import write_shards

    return write_shards(read(**options), Path(out))


def ensure_manifest(data: str, data_root: str, source: str) -> str:
    """The path or URL of the manifest of `data`.

    Args:
        data: Path or URL of a manifest (ends in .json), or the name of a data set, prepared in data_root/NAME.
        data_root: Folder of the prepared data sets. A missing data set is prepared there if it needs nothing but its name, and
            only once if several processes start together.
        source: Option `source` of a data set that is prepared now ("": none).

    Raises ValueError if there is no such data set, and if it cannot be prepared.
    """
    if data.endswith(".json"):
        if not is_url(data) and not os.path.isfile(data):
            raise ValueError(f"data: there is no manifest {data}; prepare one with `lgm-dist prepare --help`")
        return data
    manifest = Path(data_root) / data / f"{data}.json"
    if os.path.isfile(manifest):  # unlike Path's, also False if the name is too long
        return str(manifest)
    read = SOURCES.find(data)
    if read is None or not needs_nothing(read):
        names = [name for name in SOURCES.names() if needs_nothing(SOURCES.get(name))]
        raise ValueError(
            f"data ({data!r}) is no data set: {manifest} does not exist; use {', '.join(names)}, the path or URL of a "
            f"manifest (.json), or prepare it with `{prepare_command(data, str(manifest.parent))}`"
        )
    try:
        Path(data_root).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ValueError(
            f"data_root ({data_root}) cannot be written ({fault.strerror}); name another folder"
        ) from fault
    with exclusive(Path(data_root) / f".{data}.lock"):
        if not manifest.is_file():  # else another process has just prepared it
            prepare(data, manifest.parent, **({"source": source} if source and "source" in options_of(read) else {}))
    return str(manifest)
