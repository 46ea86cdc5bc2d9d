"""Any configuration, drawn by hypothesis: it trains a step, or is refused in one sentence with field, value and fix."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lgm_dist.config import SETTINGS, Config
from lgm_dist.data import fetch
from lgm_dist.runs import checkpoint
from lgm_dist.runs.job import device_of, make_job
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.runs.record import train_fn
from lgm_dist.runs.stop import STOP
from lgm_dist.training.worker import Worker

INTEGERS = {
    **dict.fromkeys(("ways", "eval_ways"), (2, 3, 6)),
    **dict.fromkeys(("shot", "query", "eval_shot", "eval_query"), (1, 2, 5)),
    **dict.fromkeys(("epochs", "steps_per_epoch", "eval_every", "lr_decay_steps"), (1, 2, 1000)),
    **dict.fromkeys(("meta_batch", "eval_episodes", "test_episodes"), (2, 3, 4)),
    **dict.fromkeys(("workers", "cpus_per_worker", "max_failures"), (0, 1, 2)),
    **dict.fromkeys(("seed", "eval_seed"), (0, 1, 2**63, 2**64 - 1)),
    "max_workers": (0, 2),
    "eval_copies": (0, 1),
}
FLOATS = {
    **dict.fromkeys(("lr", "weight_decay", "lr_min"), (1e-30, 1e-6, 1e-3, 0.5, 1)),
    "lr_decay": (0.5, 1.0),
}
WORDS = {
    "protocol": ("standard", "paper"),
    "noise": ("sample", "mean"),
    "precision": ("float32", "bf16"),
    "device": ("auto", "cpu", "cuda"),
    "wandb": ("auto", "online", "offline", "disabled"),
    "name": ("", "run", "with space", "λ"),
    "augment": (True, False),
    "eval_flips": (True, False),
}
MODEL = {
    **dict.fromkeys(("filters", "noise_size"), (1, 4, 8)),
    "norm_groups": (1, 2, 4),
    "channels": (0, 3),
    "norm": ("batch", "group", "instance", "layer"),
    "norm_scope": ("global", "worker", "episode"),
    "norm_decay": (0.0, 0.9, 1.0, 1),
    "norm_epsilon": (1e-12, 1e-3, 1.0),
    "weight_norm": (True, False),
    "head": ("cosine", "class_means", "cnaps", "logistic", "ridge"),
    "pool": (0, 1, 2),
    "power": (0.5, 1.0),
    "centre": (True, False),
    "shrinkage": (0.5, 1.0),
}
PATHS = ("data", "data_root", "source", "cache", "storage")
NO_PATHS = (
    "",
    "\0",
    "a\0b",
    "\ud800",
    "x" * 5000,
    "/dev/null",
    "/dev/null/x",
    "/proc/x",
    "no.json",
    ".json",
    "no",
    "..",
)
LOCATIONS = ("http://127.0.0.1:9/x.json", "http://[/x.json", "pipe:true://x.json", "ftp://x.json", "http:///x.json")
NUMBERS = (-(2**63), -1, 0, 1, 7, 2**16, 2**31, 2**63, 2**64, 10**30, 10**400)
REALS = (*NUMBERS, float("nan"), float("inf"), float("-inf"), -1e-9, 1e-320, 1e38, 1e39, 1e308)
ODD = (None, "", "1", True, 1.5, [], {}, [1], {"a": 1})
SMALL: dict[str, Any] = {
    **dict.fromkeys(("epochs", "steps_per_epoch"), 1),
    "ways": 3,
    "query": 2,
    "eval_query": 3,
    "meta_batch": 4,
    "eval_episodes": 3,
    "test_episodes": 3,
    "workers": 0,
}


def good() -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: st.sampled_from(values) for name, values in (INTEGERS | FLOATS | WORDS).items()}
    model = {name: st.sampled_from(values) for name, values in MODEL.items()}
    return st.tuples(st.fixed_dictionaries({}, optional=fields), st.fixed_dictionaries({}, optional=model)).map(
        lambda both: {**both[0], "model": {"filters": 4, **both[1]}}
    )


def bad() -> st.SearchStrategy[tuple[str, Any]]:
    """A field and a value that it may well not take."""
    kinds = [
        (tuple(INTEGERS), (*NUMBERS, *ODD)),
        (tuple(FLOATS), (*REALS, *ODD)),
        (tuple(WORDS), (*ODD, *NO_PATHS, "a/b", "x\ny", "-x")),
        (PATHS, (*NO_PATHS, *ODD)),
        (("data",), LOCATIONS),
        (tuple(f"model.{name}" for name in MODEL), (*REALS, *ODD)),
        (("model", "no_such_field", ""), ODD),
    ]
    return st.one_of([st.tuples(st.sampled_from(names), st.sampled_from(values)) for names, values in kinds])


NAMES = [name.removeprefix("model.") for name in SETTINGS]


def check_sentence(text: str, wrong: list[str]) -> None:
    """It names a field, and says what to do: in words of a wish, or after a semicolon."""
    assert "\n" not in text
    assert any(name in text for name in (*NAMES, *wrong, "manifest")), text
    assert any(word in text for word in ("must", "use ", "; ")), text
    for alien in ("Errno", "codec", "embedded null", "Traceback", "torch", "object is not"):
        assert alien not in text, text


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)


@pytest.fixture
def storages(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / f"runs-{number}" for number in itertools.count())


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(values=good(), mistakes=st.lists(bad(), max_size=2))
@example(values={"model": {"channels": 1}}, mistakes=[])
@example(values={"device": "cuda", "model": {"filters": 4}}, mistakes=[])
@example(values={"model": {"filters": 4}}, mistakes=[("meta_batch", 2**31)])
@example(values={"model": {"filters": 4}}, mistakes=[("model.filters", 2**31)])
@example(values={"model": {"filters": 4}}, mistakes=[("eval_episodes", 2**63)])
@example(values={"model": {"filters": 4}}, mistakes=[("epochs", 10**30)])
@example(values={"model": {"filters": 4}}, mistakes=[("lr", 10**400)])
@example(values={"model": {"filters": 4}}, mistakes=[("cache", "/dev/null/x")])
@example(values={"model": {"filters": 4}}, mistakes=[("name", "a\0b")])
@example(values={"model": {"filters": 4}}, mistakes=[("data", "http://[/x.json")])
def test_any_configuration_trains_a_step_or_is_refused_in_one_sentence(
    tiny: Path, storages: Iterator[Path], values: dict[str, Any], mistakes: list[tuple[str, Any]]
) -> None:
    storage = next(storages)
    wanted = SMALL | {"data": str(tiny), "storage": str(storage)} | values
    for name, value in mistakes:
        part = wanted["model"] if name.startswith("model.") and isinstance(wanted["model"], dict) else wanted
        part[name.removeprefix("model.")] = value
    try:
        config = Config.from_dict(wanted)
        job = make_job(config)
    except ValueError as refusal:
        check_sentence(str(refusal), [name for name, _ in mistakes])
        return
    run = Path(job.run)
    (run / STOP).touch()  # so that it ends after a step, with a checkpoint
    train_fn(job, Worker(device=device_of(config)))
    (row,) = read_metrics(run)
    assert row["step"] == 1
    assert Config.from_dict(json.loads((run / "config.json").read_text())) == config.replace(**{"model.channels": 3})
    assert checkpoint.load_model(checkpoint.newest(run))[2].step == 1
    shutil.rmtree(run)
