"""README.md and docs/: commands parse, links lead somewhere, pages are short, each figure stands once."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lgm_dist
from lgm_dist.cli.flags import parse
from lgm_dist.cli.main import COMMANDS as SUBCOMMANDS
from lgm_dist.cluster.jobs import check_paths

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [*sorted(ROOT.glob("[A-Z]*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

FLAGS = {"train": "TrainFlags", "sweep": "SweepFlags", "grid": "GridFlags"}
"""Commands whose flags are settings of Config."""
TOOLS = {"tests/chaos": "chaos.command", "tests/fuzz.py": "fuzz"}
"""Programs of the tests that the pages name, and the module with their `make_parser`."""
PRIVATE = (
    "mend",
    "is no run",
    "is no data set",
    "of its own",
    "throw-away",
    "as theirs",
    "which is wanted",
    "of metal",
)
"""Phrases that a reader would have to read twice."""


def without_code(text: str) -> str:
    """The prose of a page: no fenced blocks, no indented blocks, no comments."""
    text = re.sub(r"^```.*?^```\n", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "\n", text)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a page: lines of its shell blocks, and `lgm-dist …` with arguments in its prose."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines() if line and not line.startswith("#")]
    lines += re.findall(r"`(lgm-dist \w+ [^`]*--[^`]*|lgm-dist bench \w[^`]*)`", without_code(text))
    for line in lines:
        for part in line.split(" && "):
            words = shlex.split(part)
            if "--help" not in words:
                yield words


COMMANDS = {f"{page}: {shlex.join(words)}": words for page, text in TEXTS.items() for words in commands(text)}
"""Each command of the pages, by its page and text."""
OURS = {name: words for name, words in COMMANDS.items() if any(word == "lgm-dist" or word in TOOLS for word in words)}


@pytest.mark.parametrize("name", OURS)
def test_a_command_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(OURS[name], monkeypatch)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes if the program that the words name accepts the rest of them."""
    start = next(i for i, word in enumerate(words) if word == "lgm-dist" or word in TOOLS)
    if words[start] in TOOLS:
        assert words[start - 1] == "python"
        assert importlib.import_module(TOOLS[words[start]]).make_parser().parse_args(words[start + 1 :])
        return
    name, arguments = words[start + 1], words[start + 2 :]
    if name in FLAGS:
        config = parse(getattr(module_of(name), FLAGS[name]), without_config(arguments))[0]
        assert config.episodes.steps > 0
    elif name == "submit":
        check_submit(arguments, monkeypatch)
    elif name == "bench":
        assert module_of(name).make_parser().parse_args(arguments).part in (*module_of(name).PARTS, "all")
    elif name == "prepare":
        check_prepare(arguments, monkeypatch)
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
        with pytest.raises(ValueError, match="no-such-run"):  # the flags are accepted, and the run does not exist here
            module_of(name).main([str(ROOT / "no-such-run"), *arguments[1:]])


def module_of(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"lgm_dist.cli.{name}")


def without_config(arguments: list[str]) -> list[str]:
    """The arguments without --config, whose file another command of the pages writes."""
    if "--config" not in arguments:
        return arguments
    place = arguments.index("--config")
    named = {words[words.index("--name") + 1] for words in OURS.values() if "--name" in words}
    assert arguments[place + 1] in {f"runs/{name}/best.json" for name in named}
    return arguments[:place] + arguments[place + 2 :]


def check_submit(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags, and the command of the job."""
    flags = module_of("submit").make_parser().parse_args(arguments)
    if flags.entrypoint:
        check_job(flags.entrypoint, monkeypatch)


def check_job(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of a job, which runs the uploaded code."""
    check_paths(words)
    assert words[:3] == ["python", "-m", "lgm_dist"]
    check(["lgm-dist", *words[3:]], monkeypatch)


def check_prepare(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(module_of("prepare"), "write", lambda *a: called.append(a))
    module_of("prepare").main(arguments)
    assert called


def test_a_job_of_rays_own_client_parses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [words for words in COMMANDS.values() if words[:3] == ["ray", "job", "submit"]]
    assert jobs
    for words in jobs:
        check_job(words[words.index("--") + 1 :], monkeypatch)


def test_the_pages_show_every_subcommand() -> None:
    shown = {words[words.index("lgm-dist") + 1] for words in OURS.values() if "lgm-dist" in words}
    assert shown == set(SUBCOMMANDS)


def test_the_readme_begins_with_two_commands_that_set_everything_up() -> None:
    first, second, *_ = commands(README.read_text())
    assert first == ["python3", "-m", "pip", "install", "uv"]
    assert second == ["uv", "run", "lgm-dist", "train", "--preset", "demo"]


def test_ci_runs_the_test_command_of_contributing() -> None:
    command = blocks(CONTRIBUTING.read_text(), "sh")[0].splitlines()[0]
    assert command.endswith(" pytest -n 3")
    assert command in (ROOT / ".ci/run").read_text().splitlines()


def test_the_readme_lists_the_extras_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r'"\.\[(\w+)\]"', README.read_text())) == set(project["optional-dependencies"])


PYTHON = {f"{page} {i}": block for page, text in TEXTS.items() for i, block in enumerate(blocks(text, "python"))}


@pytest.mark.parametrize("name", PYTHON)
def test_python_compiles_and_uses_names_that_exist(name: str) -> None:
    block = PYTHON[name]
    compile(block, "page", "exec")
    for attribute in re.findall(r"\blgm_dist\.(\w+)", re.sub(r"^(from|import) .*", "", block, flags=re.MULTILINE)):
        assert hasattr(lgm_dist, attribute), attribute
    for module, names in re.findall(r"^from (lgm_dist[\w.]*) import (.+)", block, re.MULTILINE):
        for attribute in names.split(", "):
            assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_short(page: str) -> None:
    limit = {"README.md": 10_000, "CONTRIBUTING.md": 1_300}.get(page, 12_000)
    assert len((ROOT / page).read_bytes()) <= limit


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[page])):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_picture_is_shown_on_one_page() -> None:
    shown = Counter(
        ((ROOT / page).parent / path).resolve()
        for page, text in TEXTS.items()
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    )
    assert shown == Counter((ROOT / "docs").glob("*.png"))


@pytest.mark.parametrize("page", TEXTS)
def test_paragraphs_are_not_hard_wrapped(page: str) -> None:
    lines = without_code(TEXTS[page]).splitlines()
    for before, line in pairwise(lines):
        ends = not line.strip() or re.match(r"\s*([#|>]|[-*] |\d+\. )", line)
        assert ends or not before.strip() or before.startswith(("#", "|")), f"{before}\n{line}"


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_in_plain_english(page: str) -> None:
    prose = without_code(TEXTS[page]).lower()
    assert [phrase for phrase in PRIVATE if re.search(rf"\b{phrase}", prose)] == []


def test_each_accuracy_stands_once() -> None:
    found = Counter(figure for text in TEXTS.values() for figure in re.findall(r"\d+\.\d+ ± \d+\.\d+ %", text))
    assert [figure for figure, times in found.items() if times > 1] == []


def test_the_citation_file_has_the_required_fields_and_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"].startswith("lgm_dist")
    assert citation["authors"]
    assert (citation["version"], citation["license"]) == (lgm_dist.__version__, project["license"])
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Dong", "Mei", "Ma", "Huang", "Hu"]
