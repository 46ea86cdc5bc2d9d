"""The README's commands: each parses with the script it names, and CI runs the one for the tests as it stands."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from test_scripts import script

from lgm_dist.cli import bench, submit, train
from lgm_dist.cli.flags import parse
from lgm_dist.cluster import jobs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in SHELL for line in block.splitlines() if line and not line.startswith("#")]
SCRIPTS = [line for line in COMMANDS if re.search(r"(scripts|tune)/", line)]


def test_the_first_two_commands_set_everything_up_themselves() -> None:
    start = "python3 -m pip install uv && python3 -m uv run --compile-bytecode "
    assert COMMANDS[0].startswith(start + "scripts/train.py")
    assert COMMANDS[1] == start + "pytest -n 2"
    assert COMMANDS[1] in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(shlex.split(command), monkeypatch)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are a command that its script takes, the job's own command too where it submits one."""
    place = next(i for i, word in enumerate(words) if re.match(r"(scripts|tune)/", word))
    if "job" in words[:place]:
        assert words[place - 1] == "python"
    name, words = Path(words[place]).stem, words[place + 1 :]
    if name in ("train", "sweep", "grid"):
        parses(name, words)
    elif name == "submit":
        flags = submit.make_parser().parse_args(words)
        if flags.entrypoint:
            jobs.check_paths(flags.entrypoint)
            check(flags.entrypoint, monkeypatch)
    elif name == "bench":
        assert bench.make_parser().parse_args(words).part in (*bench.PARTS, "all")
    elif name == "fuzz":
        assert script(name)._parser().parse_args(words).seconds > 0
    elif name == "chaos":
        assert script(name)._parser().parse_args(words).parts
    elif name == "prepare":
        called: list[object] = []
        module = script(name)
        monkeypatch.setattr(module, "_prepare", lambda *a: called.append(a))
        monkeypatch.setattr(f"lgm_dist.data.sources.{words[0]}.{words[0]}_source", lambda *a: a)
        module.main(words)
        assert called
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
        with pytest.raises(ValueError, match="no-such-run"):  # parsed, and then there is no such run here
            script(name).main([str(ROOT / "no-such-run"), *words[1:]])


def parses(name: str, words: list[str]) -> None:
    if "--config" in words:  # a file that another command of the README writes
        place = words.index("--config")
        assert words[place + 1] == "runs/norms/best.json"
        words = words[:place] + words[place + 2 :]
    module = train if name == "train" else importlib.import_module(name)
    flags = {"train": "TrainFlags", "sweep": "SweepFlags", "grid": "GridFlags"}[name]
    assert parse(getattr(module, flags), words)[0].episodes.steps > 0


def test_there_are_commands_for_every_script() -> None:
    named = {re.search(r"(?:scripts|tune)/(\w+)\.py", line)[1] for line in SCRIPTS}  # type: ignore[index]
    assert named == {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"sweep", "grid"}


def test_every_file_that_the_readme_points_to_is_there() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
