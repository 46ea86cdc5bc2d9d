"""What the scripts share: a user's mistake ends in one sentence and status 1, and results are printed as a table."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lgm_dist.config import Protocol


class RunFailed(Exception):
    """A run ended for a reason outside the configuration, such as workers that kept dying."""


def status_of(main: Callable[[list[str]], None]) -> int:
    """Runs `main` on the command line's arguments; 1 and one sentence on standard error for what a user can mend."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, RunFailed) as error:
        tell(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}")
        return 1
    return 0


class StandardError:
    """sys.stderr, where it ends no run that its reader, a pipe's other end or a terminal, has gone."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


STANDARD_ERROR = StandardError()


def tell(sentence: str) -> None:
    """A line on standard error, above a progress bar there, if anybody reads it."""
    bars = sys.modules.get("tqdm")  # where nobody has loaded it there is none
    if bars:
        bars.tqdm.write(sentence, file=STANDARD_ERROR)
    else:
        STANDARD_ERROR.write(sentence + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [header, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]) + "\n"


def leak_note(protocol: Protocol) -> str:
    """What has to stand beside every figure of protocol paper."""
    if protocol == "standard":
        return ""
    return (
        "Protocol paper LEAKS THE LABEL: the query is rotated with its class's support images, so the angles alone\n"
        "give 67.2 % at 5 ways and 24.7 % at 20 ways. Compare it with the authors' figures only.\n"
    )
