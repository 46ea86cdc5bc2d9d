"""`python -m lgm_dist COMMAND`: the same as `lgm-dist COMMAND`."""

import sys

from lgm_dist.cli.main import main

sys.exit(main())
