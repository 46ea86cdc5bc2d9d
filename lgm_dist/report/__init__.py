"""report.html: runs and sweeps in one HTML file that needs no account, no network and no JavaScript; plots; analysis."""

from lgm_dist.report.write import write_report

__all__ = ["write_report"]
