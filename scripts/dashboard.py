"""The same as `lgm-dist report`, for a checkout."""

import sys

from lgm_dist.cli.report import main
from lgm_dist.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
