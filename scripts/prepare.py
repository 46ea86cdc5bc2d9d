"""Runs `lgm-dist prepare`."""

import sys

from lgm_dist.cli.prepare import main
from lgm_dist.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
