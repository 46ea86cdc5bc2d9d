"""The same as `lgm-dist replay`, for a checkout."""

import sys

from lgm_dist.cli.replay import main
from lgm_dist.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
