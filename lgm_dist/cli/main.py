"""`lgm-dist COMMAND`: runs the command of that name. Imports nothing that another command needs."""

from __future__ import annotations

import sys
from importlib import import_module

import lgm_dist
from lgm_dist.checks import did_you_mean
from lgm_dist.console import run_command

COMMANDS = {
    "prepare": "prepare a data set: FC100, class folders or the built-in glyphs",
    "train": "train a learner and evaluate it on test classes",
    "evaluate": "evaluate a learner on other ways, shots or data",
    "export": "write a trained learner to one small file",
    "adapt": "make a classifier of your own labelled photos",
    "predict": "classify photos with it",
    "sweep": "search for better settings with Ray Tune",
    "grid": "train every combination of ways and shots and compare them",
    "report": "write report.html about runs and sweeps, and a dashboard on W&B",
    "submit": "run a command as a Ray job on a cluster",
    "replay": "send to W&B what it lacks of a run",
    "bench": "measure speed and memory on this machine",
}
"""The commands and what they do. Each is the function `main(argv)` of `lgm_dist.cli.NAME`."""


def main() -> int:
    """Run the command that this process's arguments name; return the exit status."""
    name, *argv = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if name == "--version":
        sys.stdout.write(f"lgm-dist {lgm_dist.__version__}\n")
        return 0
    if name not in COMMANDS:
        problem = f"there is no command {name!r}; {did_you_mean(name, COMMANDS)}" if name else "give a command"
        sys.stderr.write(f"lgm-dist: {problem} (lgm-dist --help lists all)\n")
        return 2
    sys.argv = [f"lgm-dist {name}", *argv]  # usage lines and error messages begin with it
    return run_command(lambda arguments: import_module(f"lgm_dist.cli.{name}").main(arguments))


def _help() -> str:
    lines = [f"  {name:9} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lgm-dist COMMAND ...",
            "",
            "Few-shot learners whose weights are generated from a handful of images.",
            "",
            "commands:",
            *lines,
            "",
            "lgm-dist COMMAND --help explains the options of a command; lgm-dist --version prints the version.",
            "",
        ]
    )
