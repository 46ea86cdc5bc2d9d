"""report.html: runs and sweeps in one file that opens anywhere, without an account, a network or JavaScript."""

from lgm_dist.report.write import write_report

__all__ = ["write_report"]
