"""The command line of training: the seed's lines, presets, help; and what the scripts share."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from lgm_dist.cli import flags
from lgm_dist.config import PRESETS, Config, ModelConfig
from lgm_dist.console import leak_note, run_command, table
from lgm_dist.errors import RunFailed

DEMO_MODEL = replace(PRESETS["demo"].model, filters=16)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/train.py, which is no package."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["train_script"] = importlib.util.module_from_spec(spec)  # tyro looks a class's module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parse(script: ModuleType) -> Callable[[str], Config]:
    def parsed(line: str) -> Config:
        config: Config = flags.parse(script.TrainFlags, line.split())[0]
        return config

    return parsed


def refused(parse: Callable[[str], Config], line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command line that ends with status 2, in one line, without its frame."""
    with pytest.raises(SystemExit) as error:
        parse(line)
    assert error.value.code == 2
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


# Parsing


@pytest.mark.parametrize(
    ("line", "ways", "shot", "lr", "epochs"),
    [
        ("--ways 5 --shot 1 --lr 1e-3 --epochs 100", 5, 1, 0.001, 100),
        ("--ways 20 --shot 1 --lr 1e-3 --epochs 10", 20, 1, 0.001, 10),
        ("--ways 5 --shot 5 --lr 1e-3 -e 10", 5, 5, 0.001, 10),
        ("--ways 20 --shot 5 --lr 1e-2 -e 10", 20, 5, 0.01, 10),
    ],
)
def test_the_seeds_lines(
    parse: Callable[[str], Config], line: str, ways: int, shot: int, lr: float, epochs: int
) -> None:
    assert parse(line) == Config.of(ways=ways, shot=shot, lr=lr, epochs=epochs)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Config()),
        ("-w 7 -s 3 -e 2", Config.of(ways=7, shot=3, epochs=2)),
        ("--ways=7 --meta-batch=6 --workers=2", Config.of(ways=7, meta_batch=6, workers=2)),
        ("--protocol paper --no-augment --seed 9", Config.of(protocol="paper", augment=False, seed=9)),
        ("--model.norm-scope episode", Config.of(model=ModelConfig(norm_scope="episode"))),
        ("--model.norm group --model.no-weight-norm", Config.of(model=ModelConfig(norm="group", weight_norm=False))),
        ("--data glyphs --storage x/y --name n", Config.of(data="glyphs", storage="x/y", name="n")),
        ("--preset paper", Config()),
        ("--preset demo", PRESETS["demo"]),
        ("--preset=demo", PRESETS["demo"]),
        ("--preset demo -w 8 --epochs 3", PRESETS["demo"].replace(ways=8, epochs=3)),
        ("-w 8 --epochs 3 --preset demo", PRESETS["demo"].replace(ways=8, epochs=3)),
        ("--preset demo --model.filters 16", PRESETS["demo"].replace(model=DEMO_MODEL)),
    ],
)
def test_flags(parse: Callable[[str], Config], line: str, expected: Config) -> None:
    config = parse(line)
    assert type(config) is Config, "without the preset, which is no field of a run"
    assert config == expected


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--way 5", r"Unrecognized options: --way, 5 .*--ways INT"),
        ("--n-way 5", r"Unrecognized options: --n-way, 5"),
        ("extra", r"Unrecognized options: extra"),
        ("--ways five", r"Error parsing -w/--ways: .*'five'"),
        ("--ways", r"Missing value for argument '-w/--ways'"),
        ("--protocol theirs", r"'theirs' for argument '--protocol'.*'standard', 'paper'"),
    ],
)
def test_what_cannot_be_parsed_ends_with_status_2(
    parse: Callable[[str], Config], line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(sentence, refused(parse, line, capsys))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--preset fast", r"^preset \('fast'\) must be one of paper, demo$"),
        ("--preset demo -w 1", r"^ways \(1\) must be at least 2; an episode of one class has nothing to tell apart$"),
        ("--workers 4 --meta-batch 10", r"^meta_batch \(10\) must be divisible by workers \(4\); use 8 or 12$"),
        ("--lr nan", r"^lr \(nan\) must be positive; the paper's is 1e-3$"),
        ("--name a/b", r"^name \('a/b'\) must be a plain folder name; put folders into storage$"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(parse: Callable[[str], Config], line: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(line)


def test_a_value_of_the_model_out_of_range(parse: Callable[[str], Config], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        parse("--model.norm-decay 2")
    assert "norm_decay (2.0) must lie between 0 and 1" in f"{error.value} {capsys.readouterr().err}"


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of scripts/train.py in a process of its own; fails where that has loaded torch or Ray."""
    path = ROOT / "scripts" / "train.py"
    code = f"""
import runpy, sys
sys.argv = {[str(path), *arguments]}
try:
    runpy.run_path({str(path)!r}, run_name="__main__")
finally:
    assert not {{"torch", "ray", "wandb", "numpy"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_help_explains_every_option_with_its_default_and_needs_no_torch() -> None:
    status, out, errors = run("--help")
    assert (status, errors) == (0, "")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    text = text[text.index("options") :]  # behind the list of the most important ones
    for setting, value in Config().flat().items():
        name = f"--{setting}"
        place = re.search(rf"{name.replace('_', '-')}(?![\w-])", text)
        assert place is not None, name
        explained, default = text[place.end() :].split("(default: ", 1)
        shown = default.split(")", 1)[0]
        assert shown == (" ".join(value) if isinstance(value, tuple) else str(value) if value != "" else "''"), name
        words = re.sub(r"--model\.no-[\w-]+|--no-\w+|\{[\w,]+\}|\b(INT|FLOAT|STR)\b|,", "", explained).split()
        assert len(words) >= 3, f"{name} has no explanation"
        assert not any(word.startswith("--") for word in words), f"{name} has no default of its own"
    assert "--preset STR" in text
    for short, long in (("-w", "ways"), ("-s", "shot"), ("-e", "epochs")):
        assert f"{short} INT, --{long} INT" in text


def test_help_of_a_preset_shows_its_defaults() -> None:
    text = " ".join(run("--preset", "demo", "--help")[1].replace("│", " ").split())
    assert re.search(r"--data STR .*?\(default: glyphs\)", text)
    assert re.search(rf"--steps-per-epoch INT .*?\(default: {PRESETS['demo'].episodes.steps_per_epoch}\)", text)


def test_mistakes_are_told_before_torch_is_loaded() -> None:
    status, _, errors = run("--foo", "3")
    assert status == 2
    assert "Unrecognized options: --foo, 3" in errors
    assert run("--preset", "fast") == (1, "", "train.py: preset ('fast') must be one of paper, demo\n")
    assert run("--ways", "1")[::2] == (
        1,
        "train.py: ways (1) must be at least 2; an episode of one class has nothing to tell apart\n",
    )


# What the scripts share


def test_table() -> None:
    text = table(("data", "accuracy"), [("fc100", "40.10 ± 0.40 %"), ("a", "5")])
    assert text == (
        "| data  | accuracy       |\n"  # as Markdown has it
        "|-------|----------------|\n"
        "| fc100 | 40.10 ± 0.40 % |\n"
        "| a     | 5              |\n"
    )
    assert table(("n",), []) == "| n |\n|---|\n"


def test_leak_note() -> None:
    """The figures are those of a classifier that knows the angles alone: (1 - (4/5)^n) / (n/5) for n ways."""
    assert leak_note("standard") == ""
    note = leak_note("paper")
    assert "LEAKS THE LABEL" in note
    for ways in (5, 20):
        assert f"{100 * (1 - 0.8**ways) / (ways / 5):.1f} % at {ways} ways" in note
    assert note.endswith("\n")


@pytest.mark.parametrize("error", [ValueError("ways (1) is wrong"), OSError("disk full"), RunFailed("worker 1 died")])
def test_what_a_user_can_mend_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        assert argv == ["--flag"]
        raise error

    monkeypatch.setattr(sys, "argv", ["scripts/some.py", "--flag"])
    assert run_command(main) == 1
    assert capsys.readouterr() == ("", f"some.py: {error}\n")


def test_success_is_status_0_and_our_own_faults_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["some.py"])
    assert run_command(lambda _: None) == 0
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):
        run_command(lambda _: 1 // 0)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        run_command(lambda _: sys.exit(2))
