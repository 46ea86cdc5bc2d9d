"""The same as `lgm-dist sweep`, with the spaces of tune/spaces.py."""

import functools
import sys

from spaces import SPACES

from lgm_dist.cli.sweep import main
from lgm_dist.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(functools.partial(main, spaces=SPACES)))
