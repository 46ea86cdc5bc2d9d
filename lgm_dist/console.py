"""What commands print: sentences on standard error, tables, accuracies. Standard library only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lgm_dist.config import Protocol
from lgm_dist.errors import RunFailed
from lgm_dist.extras import explain


def run_command(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run `main` on the arguments (default: those of this process) and return the exit status.

    An error that a user can correct is printed as one sentence, after the name of the command, and the status is 1.
    """
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, RunFailed) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if sentence := explain(error):
            return _fail(sentence)
        raise
    return 0


def _fail(sentence: str) -> int:
    notify(f"{sys.argv[0].rsplit('/', 1)[-1]}: {sentence}")
    return 1


class StandardError:
    """sys.stderr, but writing to it never ends a run: its reader, a pipe or a terminal, may have gone."""

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


def notify(sentence: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    bars = sys.modules.get("tqdm")  # there is no bar if nobody has loaded it
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


def percent(accuracy: float, ci95: float | None = None) -> str:
    """An accuracy in 0 to 1 as "33.38 ± 0.41 %", without the interval if there is none."""
    return f"{100 * accuracy:.2f} %" if ci95 is None else f"{100 * accuracy:.2f} ± {100 * ci95:.2f} %"


def leak_note(protocol: Protocol) -> str:
    """The warning that stands beside every figure of protocol paper; empty for the others."""
    if protocol == "standard":
        return ""
    return (
        "Protocol paper LEAKS THE LABEL: the query is rotated with its class's support images, so the angles alone\n"
        "give 67.2 % at 5 ways and 24.7 % at 20 ways. Compare it with the authors' figures only.\n"
    )
