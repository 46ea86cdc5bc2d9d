"""`python tests/chaos PART...`"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # for `import chaos`; Python has put this folder there

from chaos.command import main  # noqa: E402
from lgm_dist.console import run_command  # noqa: E402

sys.exit(run_command(main))
