"""What a person sees while a run trains: three lines, the phases, the time left; a finished run says so; missing libraries."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lgm_dist import Config, fit
from lgm_dist.cluster import fit as fit_module
from lgm_dist.errors import RunFailed
from lgm_dist.runs.announce import describe
from lgm_dist.runs.job import make_job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.progress import Pace, duration, evaluations_after
from lgm_dist.training.tasks import Stage, make_stages
from lgm_dist.training.worker import Worker

ROOT = Path(__file__).parents[1]


def stages(steps: int, eval_every: int, count: int = 1) -> list[Stage]:
    one = make_stages(Config.of(epochs=1, steps_per_epoch=steps, eval_every=eval_every), {}, Worker())[0]
    return [Stage(one.name, one.task, i * steps) for i in range(count)]


# Before


def test_three_lines_say_what_is_trained_on_what_and_with_which_images(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.replace(storage=str(tmp_path), name="run", workers=2, cpus_per_worker=3)
    job = make_job(config)
    assert describe(job) == [
        "run: stage episodes, 12 steps of 4 episodes (3-way 2-shot 2-query)",
        "on the CPU, here: 2 Ray Train workers with 3 threads each",
        "data set tiny: 6 base classes with 144 images of 16 x 16 x 3; 6 classes for val, 6 for test",
    ]
    (Path(job.run) / "checkpoints/step-00000008").mkdir(parents=True)
    assert describe(job)[0].endswith("2-query), resumed after step 8")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    elastic = make_job(config.replace(name="elastic", workers=1, max_workers=4, cpus_per_worker=1))
    assert (
        describe(elastic)[1]
        == "on the CPU, on the cluster at 10.0.0.1:6379: 1 to 4 Ray Train workers with 1 thread each"
    )


def test_a_run_names_its_phases_and_a_finished_one_says_so_at_once(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.replace(storage=str(tmp_path), name="run")
    run = fit(config)
    said = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.strip() and "%|" not in line]
    phases = [
        "run: stage",
        "on the CPU, in this process",
        "data set tiny",
        "training",
        "testing the",
        "drawing pictures",
    ]
    told = [line for line in said if not line.startswith("decoding")]
    assert [told[i].startswith(phase) for i, phase in enumerate(phases)] == [True] * 6, told

    result, rows = (run / "result.json").read_bytes(), read_metrics(run)
    monkeypatch.setattr(fit_module, "train", None)  # it is not trained again
    assert fit(config) == run
    assert capsys.readouterr().err == "run 'run' is finished after 12 steps; a larger --epochs trains it further\n"
    assert ((run / "result.json").read_bytes(), read_metrics(run)) == (result, rows)

    (run / "weights.png").unlink()  # as if it had been killed while it drew
    fit(config)
    assert capsys.readouterr().err.splitlines()[1:] == ["drawing pictures"]
    assert (run / "weights.png").exists()

    with pytest.raises(TypeError):  # with more epochs it is not finished
        fit(config.replace(epochs=2))


def test_a_run_that_lost_its_result_is_finished_again(small: Config, tmp_path: Path) -> None:
    config = small.replace(storage=str(tmp_path), name="run")
    run = fit(config)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    fit(config)
    again = json.loads((run / "result.json").read_text())
    same = result.keys() - {"memory/peak_bytes"}
    assert {key: again[key] for key in same} == {key: result[key] for key in same}


# The time left


@pytest.mark.parametrize(
    ("steps", "eval_every", "count", "done", "left"),
    [
        (12, 4, 1, 0, 3),
        (12, 4, 1, 3, 3),
        (12, 4, 1, 4, 2),
        (12, 5, 1, 0, 3),  # after 5, 10 and at the end
        (12, 5, 1, 10, 1),
        (12, 5, 1, 12, 0),
        (12, 5, 2, 0, 6),
        (12, 5, 2, 11, 4),
        (12, 5, 2, 17, 2),
    ],
)
def test_evaluations_that_follow(steps: int, eval_every: int, count: int, done: int, left: int) -> None:
    every = [
        stage * steps + step
        for stage in range(count)
        for step in range(1, steps + 1)
        if step % eval_every == 0 or step == steps
    ]
    assert left == sum(step > done for step in every), "as the training loop evaluates"
    assert evaluations_after(stages(steps, eval_every, count), done) == left


def rows(first: int, last: int, start: float, each: float) -> list[dict[str, Any]]:
    return [{"step": step, "seconds": start + each * (step - first)} for step in range(first, last + 1)]


def test_the_time_left_is_told_after_the_first_steps_and_after_the_first_evaluation() -> None:
    """Steps of 2 s, the first of which take longer; an evaluation of 20 s every 50 of 100 steps."""
    pace, said = Pace(stages(100, 50)), []
    slow = [{"step": 1, "seconds": 30.0}, {"step": 2, "seconds": 40.0}, {"step": 3, "seconds": 45.0}]
    fast = rows(4, 49, 47.0, 2.0)
    evaluated = {"step": 50, "seconds": fast[-1]["seconds"] + 22.0, "val/accuracy": 0.5}
    for row in [*slow, *fast, evaluated, *rows(51, 99, evaluated["seconds"] + 2, 2.0)]:
        pace.add(row)
        if sentence := pace.estimate():
            said.append((row["step"], sentence))
    assert said == [
        (9, "about 3 min left for 91 steps, not counting evaluations"),  # 182 s
        (50, "about 2 min left: 50 steps and 1 evaluation on val"),  # 100 s + 22 s
    ]


def test_steps_that_come_again_tell_nothing_of_the_speed() -> None:
    """Workers that were replaced go back to a checkpoint."""
    pace = Pace(stages(1000, 1000))
    for row in [*rows(1, 5, 0.0, 1.0), *rows(3, 20, 500.0, 1.0)]:
        pace.add(row)
    assert pace.estimate() == "about 16 min left for 980 steps, not counting evaluations"
    assert pace.estimate() == "", "it is said once"


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.4, "3 s"), (89, "89 s"), (100, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Without the libraries of the extras


def python_without(modules: tuple[str, ...], config: Config, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "wanted.json").write_text(json.dumps(config.to_dict()))
    code = f"""
import json, sys
for name in {modules}:
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from lgm_dist import Config, fit
from lgm_dist.console import run_command
config = Config.from_dict(json.load(open({str(tmp_path / "wanted.json")!r})))
sys.exit(run_command(lambda _: fit(config)))
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


EXTRAS = (
    "ray",
    "wandb",
    "wandb_workspaces",
    "matplotlib",
    "sklearn",
    "threadpoolctl",
    "optuna",
    "pyarrow",
    "torchvision",
)


def test_a_run_trains_without_any_of_them(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = python_without(EXTRAS, small.replace(storage=str(tmp_path), name="run"), tmp_path)
    assert done.returncode == 0, done.stderr
    for sentence in (
        "wandb is not installed, so nothing is sent to W&B; install lgm-dist[wandb], or give --wandb disabled",
        "matplotlib is needed to draw pictures; install lgm-dist[report]",
    ):
        assert done.stderr.count(sentence) == 1
    assert (tmp_path / "run/result.json").exists()
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "run/wandb-id").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workers": 1}, "ray is needed to train with workers (--workers 0 trains without it); install lgm-dist[ray]"),
        ({"wandb": "offline"}, "wandb is needed for wandb=offline; install lgm-dist[wandb]"),
    ],
)
def test_what_is_asked_for_and_not_installed_is_one_sentence(
    changes: dict[str, Any], sentence: str, small: Config, tmp_path: Path
) -> None:
    done = python_without(EXTRAS, small.replace(storage=str(tmp_path), **changes), tmp_path)
    assert (done.returncode, done.stderr) == (1, f"-c: {sentence}\n")


def test_a_run_that_is_stopped_at_once_is_not_finished(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.replace(storage=str(tmp_path), name="run")
    monkeypatch.setattr(fit_module, "train", lambda _: None)
    with pytest.raises(RunFailed, match="stopped before its first checkpoint; the same command begins again"):
        fit(config)
