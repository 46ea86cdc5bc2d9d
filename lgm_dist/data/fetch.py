"""Copies whole files from local paths and http(s) URLs, or raises OSError that says why not. Standard library only.

webdataset's own opener gives URLs that begin with `pipe:` to a shell and the others to curl, which asks a failing server for a
minute and waits for a silent one for ever.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

TIMEOUT = 30.0
"""Longest silence of a server, in seconds."""
SLOWEST = 1000
"""A server that sends fewer bytes a second on average is given up after `TIMEOUT`."""
TRIES = 3
"""How often a server is asked if it answers 5xx, is silent or drops the connection."""
PAUSE = 1.0
"""Seconds between two tries."""


def is_url(location: str) -> bool:
    """Return True if `location` is a URL rather than a local path."""
    return "://" in location


def fetch(location: str, into: IO[bytes], most: int | None = None) -> None:
    """Copy the file at a path or an http(s) URL into the seekable file `into`.

    A server that fails for a reason that may pass is asked again. Raises OSError, whose text is the reason alone, if the file
    is missing, cut off, arrives too slowly, or has more than `most` bytes.
    """
    if not is_url(location):
        with open(location, "rb") as source:
            into.writelines(_blocks(source, most))
    elif not location.startswith(("http://", "https://")):
        raise OSError("only local paths and URLs with http:// or https:// are read; copy or mount it")
    else:
        _fetch_url(location, into, most)


def _fetch_url(url: str, into: IO[bytes], most: int | None) -> None:
    for left in reversed(range(TRIES)):
        into.seek(0)
        into.truncate()
        try:
            return _download(url, into, most)
        except urllib.error.HTTPError as fault:
            fault.close()
            reason = _plain(f"the server answers {fault.code} {fault.reason}")
            if fault.code < 500:
                raise OSError(reason) from None
        except (http.client.InvalidURL, ValueError) as fault:
            raise OSError(f"this is not a URL: {fault}") from None
        except (TimeoutError, ConnectionError, urllib.error.URLError, http.client.HTTPException) as fault:
            reason = _reason(fault)
        if left:
            time.sleep(PAUSE)
    raise OSError(f"{reason}, {TRIES} times")


def _download(url: str, into: IO[bytes], most: int | None) -> None:
    start = time.monotonic()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
        size, copied = reply.length, 0
        for block in _blocks(reply, most):
            copied += into.write(block)
            seconds = time.monotonic() - start
            if seconds > TIMEOUT and copied < SLOWEST * seconds:
                raise ConnectionError(f"the server sends less than {SLOWEST:,} bytes a second")
    if size is not None and copied < size:
        raise ConnectionError(f"the connection broke off after {copied:,} of {size:,} bytes")


def _blocks(source: Any, most: int | None) -> Iterator[bytes]:
    """The bytes as they arrive: a whole block of a slow server may take for ever."""
    seen = 0
    while block := source.read1(2**20):
        seen += len(block)
        if most is not None and seen > most:
            raise OSError(f"it has more than {most:,} bytes")
        yield block


def _reason(fault: Exception) -> str:
    cause = fault.reason if isinstance(fault, urllib.error.URLError) else fault
    if isinstance(cause, TimeoutError):
        return f"the server is silent for {TIMEOUT:g} s"
    if isinstance(cause, http.client.IncompleteRead):
        return "the connection broke off"
    if isinstance(cause, http.client.BadStatusLine) and not isinstance(cause, ConnectionError):
        return _plain(f"the server does not speak HTTP: {cause}")
    return (isinstance(cause, OSError) and cause.strerror) or _plain(str(cause)) or type(cause).__name__


def _plain(text: str) -> str:
    """A server's text as one short line without control characters, which a terminal would obey."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]
