"""`lgm-dist` and its commands: dispatch, help, the flags of training; and what the commands share."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import lgm_dist
from lgm_dist.cli import flags, main
from lgm_dist.cli.train import TrainFlags
from lgm_dist.config import PRESETS, Config, ModelConfig
from lgm_dist.console import leak_note, run_command, table
from lgm_dist.errors import RunFailed
from lgm_dist.extras import EXTRAS, need

DEMO_MODEL = replace(PRESETS["demo"].model, filters=16)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def parse() -> Callable[[str], Config]:
    def parsed(line: str) -> Config:
        config: Config = flags.parse(TrainFlags, line.split())[0]
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
        ("--preset fast", r"^preset \('fast'\) must be one of paper, strong, quick, demo$"),
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


def run(*arguments: str, light: str = "numpy") -> tuple[int, str, str]:
    """Status, output and errors of lgm-dist in another process; fails if that has loaded torch, Ray, W&B or `light`."""
    code = f"""
import sys
sys.argv = {["bin/lgm-dist", *arguments]}
from lgm_dist.cli.main import main
try:
    sys.exit(main())
finally:
    assert not {{"torch", "ray", "wandb", {light!r}}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_help_explains_every_option_with_its_default_and_needs_no_torch() -> None:
    status, out, errors = run("train", "--help")
    assert (status, errors) == (0, "")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    text = text[text.index("options") :]  # behind the list of the most important ones
    for setting, value in Config().flat().items():
        name = f"--{setting}"
        place = re.search(rf"{name.replace('_', '-')}(?![\w-])", text)
        assert place is not None, name
        explained, default = text[place.end() :].split("(default: ", 1)
        shown = default.split(")", 1)[0]
        assert shown == (
            " ".join(map(str, value)) if isinstance(value, tuple) else str(value) if value != "" else "''"
        ), name
        words = re.sub(r"--model\.no-[\w-]+|--no-\w+|\{[\w,]+\}|\b(INT|FLOAT|STR)\b|,", "", explained).split()
        assert len(words) >= 3, f"{name} has no explanation"
        assert not any(word.startswith("--") for word in words), f"{name} has no default of its own"
    assert "--preset STR" in text
    for short, long in (("-w", "ways"), ("-s", "shot"), ("-e", "epochs")):
        assert f"{short} INT, --{long} INT" in text


def test_help_of_a_preset_shows_its_defaults() -> None:
    text = " ".join(run("train", "--preset", "demo", "--help")[1].replace("│", " ").split())
    assert re.search(r"--data STR .*?\(default: glyphs\)", text)
    assert re.search(rf"--pretraining.steps INT .*?\(default: {PRESETS['demo'].pretraining.steps}\)", text)


def test_mistakes_are_told_before_torch_is_loaded() -> None:
    status, _, errors = run("train", "--foo", "3")
    assert status == 2
    assert "Unrecognized options: --foo, 3" in errors
    assert run("train", "--preset", "fast") == (
        1,
        "",
        "lgm-dist train: preset ('fast') must be one of paper, strong, quick, demo\n",
    )
    assert run("train", "--ways", "1")[::2] == (
        1,
        "lgm-dist train: ways (1) must be at least 2; an episode of one class has nothing to tell apart\n",
    )


# The commands


def test_help_lists_the_commands_with_one_line_each() -> None:
    status, out, errors = run("--help")
    assert (status, errors) == (0, "")
    lines = re.findall(r"^  (\w+) +(\w.*)$", out, re.MULTILINE)
    assert [name for name, _ in lines] == (
        [
            "prepare",
            "train",
            "evaluate",
            "export",
            "adapt",
            "predict",
            "sweep",
            "grid",
            "report",
            "submit",
            "replay",
            "bench",
        ]
    )
    assert all(2 < len(what.split()) < 15 for _, what in lines)
    assert run("-h") == (0, out, "")


def test_every_command_has_a_file() -> None:
    files = {path.stem for path in Path(main.__file__).parent.glob("[a-z]*.py")}
    assert files >= main.COMMANDS.keys()


@pytest.mark.parametrize("name", [name for name in main.COMMANDS if find_spec(f"lgm_dist.cli.{name}")])
def test_help_of_a_command_needs_neither_torch_nor_ray(name: str) -> None:
    status, out, errors = run(
        name, "--help", light="matplotlib" if name == "prepare" else "numpy"
    )  # it shows the sources
    assert (status, errors) == (0, "")
    assert re.search(rf"usage: lgm-dist {name}\b", out)


def test_version() -> None:
    assert run("--version") == (0, f"lgm-dist {lgm_dist.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian", "--ways", "5"], "there is no command 'trian'; did you mean train?"),
        (["nonsense"], "there is no command 'nonsense'; the known ones are prepare, train, "),
        ([], "give a command"),
    ],
)
def test_an_unknown_command_is_one_sentence(arguments: list[str], sentence: str) -> None:
    status, out, errors = run(*arguments)
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"lgm-dist: {sentence}")


def test_python_m_lgm_dist_is_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lgm_dist", "train", "--ways", "1"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("lgm-dist train: ways (1) must be at least 2; ")


def test_the_scripts_are_fronts_of_the_commands() -> None:
    for name in ("train", "submit", "bench"):
        assert (ROOT / f"scripts/{name}.py").read_text().splitlines()[4:] == [
            f"from lgm_dist.cli.{name} import main",
            "from lgm_dist.console import run_command",
            "",
            'if __name__ == "__main__":',
            "    sys.exit(run_command(main))",
        ]


# What the commands share


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
def test_an_error_that_a_user_can_correct_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> None:
        assert argv == ["--flag"]
        raise error

    monkeypatch.setattr(sys, "argv", ["scripts/some.py", "--flag"])
    assert run_command(fail) == 1
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


# Libraries of the extras


def test_a_library_that_is_not_installed_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("pytest", "ray", "for this test")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"^scikit-learn is needed to draw pictures; install lgm-dist\[report\]$"):
        need("sklearn", "report", "to draw pictures")

    def use(module: str) -> None:
        __import__(module)

    monkeypatch.setattr(sys, "argv", ["lgm-dist report"])
    assert run_command(lambda _: use("sklearn.cluster")) == 1
    assert capsys.readouterr().err == "lgm-dist report: scikit-learn is needed for this; install lgm-dist[report]\n"
    with pytest.raises(ModuleNotFoundError):
        run_command(lambda _: use("a_module_that_nobody_has"))


def test_the_extras_install_what_they_are_said_to() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    names = {"sklearn": "scikit-learn", "wandb_workspaces": "wandb-workspaces"}
    for module, extra in EXTRAS.items():
        assert any(re.match(rf"{names.get(module, module)}\b", line) for line in extras[extra]), module
    assert extras["all"] == [f"lgm-dist[{','.join(sorted(extras.keys() - {'all'}))}]"]
    core = " ".join(project["dependencies"])
    assert not any(names.get(module, module) in core for module in EXTRAS)
