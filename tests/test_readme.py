"""The README's commands: each parses with the script it names, and CI runs the one for the tests as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_scripts import script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in SHELL for line in block.splitlines() if line and not line.startswith("#")]
SCRIPTS = [line for line in COMMANDS if "scripts/" in line]


def test_the_first_two_commands_set_everything_up_themselves() -> None:
    start = "python3 -m pip install uv && python3 -m uv run --compile-bytecode "
    assert COMMANDS[0].startswith(start + "scripts/train.py")
    assert COMMANDS[1] == start + "pytest"
    assert COMMANDS[1] in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command.split("scripts/")[1])
    module = script(words[0].removesuffix(".py"))
    if words[0] == "train.py":
        assert module.parse(words[1:]).steps > 0
        return
    called: list[object] = []
    if words[0] == "prepare.py":
        monkeypatch.setattr(module, "_prepare", lambda *a: called.append(a))
        monkeypatch.setattr(f"lgm_dist.data.{words[1]}.{words[1]}_source", lambda *a: a)
        module.main(words[1:])
        assert called
    else:
        with pytest.raises(ValueError, match="has no checkpoint"):  # parsed, and then there is no such run here
            module.main([str(ROOT / "no-such-run"), *words[2:]])


def test_there_are_commands_for_every_script() -> None:
    named = {re.search(r"scripts/(\w+)\.py", line)[1] for line in SCRIPTS}  # type: ignore[index]
    assert named == {path.stem for path in (ROOT / "scripts").glob("*.py")}


def test_every_file_that_the_readme_points_to_is_there() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
