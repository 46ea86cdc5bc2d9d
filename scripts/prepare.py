"""Runs `lgm-dist prepare`."""

import sys

from lgm_dist.cli.prepare import main
from lgm_dist.console import status_of

if __name__ == "__main__":
    sys.exit(status_of(main))
