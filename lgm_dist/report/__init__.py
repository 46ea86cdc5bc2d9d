"""report.html: runs and sweeps in one HTML file that needs no account, no network and no JavaScript; plots; analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lgm_dist.report.write import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """Import `write_report` at its first use: it needs matplotlib, which training does not."""
    if name != "write_report":
        raise AttributeError(f"module 'lgm_dist.report' has no attribute {name!r}")
    from lgm_dist.extras import need

    need("matplotlib", "report", "to write a report")
    from lgm_dist.report.write import write_report

    return write_report
