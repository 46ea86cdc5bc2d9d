"""Config: every mistake is one sentence with field, value and fix; a dictionary of it survives JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lgm_dist.config import GROUPS, PRESETS, SETTINGS, Config, ModelConfig, marked

INF, NAN = float("inf"), float("nan")
CONFIG_MISTAKES: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"{name} ({value}) must be a whole number of at least 1")
        for name in ("ways", "shot", "query", "epochs", "steps_per_epoch", "meta_batch", "eval_every", "eval_episodes")
        for value in (0, -3)
    ),
    *(({name: 0}, f"{name} (0) must be a whole number of at least 1") for name in ("eval_query", "lr_decay_steps")),
    ({"lr_decay_steps": 0}, "lr_decay_steps (0) must be a whole number of at least 1"),
    ({"epochs": 1.5}, "epochs (1.5) must be a whole number of at least 1"),
    ({"shot": "1"}, "shot (1) must be a whole number of at least 1"),
    *(
        ({name: -1}, f"{name} (-1) must be a whole number of at least 0")
        for name in ("workers", "cpus_per_worker", "seed", "eval_seed", "max_failures")
    ),
    ({"protocol": "theirs"}, "protocol ('theirs') must be one of standard, paper"),
    ({"noise": "none"}, "noise ('none') must be one of sample, mean"),
    ({"precision": "fp16"}, "precision ('fp16') must be one of float32, tf32, bf16"),
    ({"device": "tpu"}, "device ('tpu') must be one of auto, cpu, cuda"),
    ({"wandb": "dryrun"}, "wandb ('dryrun') must be one of auto, online, offline, disabled"),
    ({"ways": 1}, "ways (1) must be at least 2; an episode of one class has nothing to tell apart"),
    *(({name: 2**64}, f"{name} ({2**64}) must be below 2**64") for name in ("seed", "eval_seed")),
    *(({"lr": value}, f"lr ({value}) must be positive; the paper's is 1e-3") for value in (0, -1e-3, INF, NAN)),
    *(
        ({"lr_decay": v}, f"lr_decay ({v}) must be in (0, 1]; 1 keeps the learning rate constant")
        for v in (0, 1.1, NAN)
    ),
    *(({"lr_min": value}, f"lr_min ({value}) must lie between 0 and lr (0.001)") for value in (-1e-9, 0.01, NAN)),
    *(({"weight_decay": v}, f"weight_decay ({v}) must not be negative; 0 turns it off") for v in (-0.1, NAN)),
    ({"eval_episodes": 1}, "eval_episodes (1) and test_episodes (2000) must be at least 2; one episode has no"),
    ({"test_episodes": 1}, "eval_episodes (600) and test_episodes (1) must be at least 2; one episode has no"),
    ({"test_episodes": -1}, "test_episodes (-1) must be a whole number of at least 0"),
    ({"eval_ways": 1}, "eval_ways (1) must be at least 2, or 0 for the ways of training"),
    ({"eval_ways": -5}, "eval_ways (-5) must be a whole number of at least 0"),
    ({"eval_shot": -1}, "eval_shot (-1) must be a whole number of at least 0"),
    *(
        (values, f"max_workers ({most}) must lie between workers ({least}), which is at least 1, and meta_batch (8)")
        for least, most in ((2, 1), (0, 2), (4, 9))
        for values in ({"workers": least, "max_workers": most, "meta_batch": 8},)
    ),
    ({"data": ""}, "data ('') must name a data set; use fc100, glyphs or the path of a manifest"),
    ({"name": "a/b"}, "name ('a/b') must be a plain folder name; put folders into storage"),
    ({"stages": ()}, "stages () must name at least one task; use episodes"),
    ({"name": ".."}, "name ('..') must be a plain folder name; put folders into storage"),
]
MODEL_MISTAKES: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: 0}, f"{name} (0) must be a whole number of at least 1")
        for name in ("filters", "noise_size", "norm_groups")
    ),
    ({"channels": -1}, "channels (-1) must be a whole number of at least 0"),
    ({"norm": "none"}, "norm ('none') must be one of batch, group, instance, layer"),
    ({"norm_scope": "task"}, "norm_scope ('task') must be one of global, worker, episode"),
    *(({"norm_decay": v}, f"norm_decay ({v}) must lie between 0 and 1") for v in (-0.1, 1.01, NAN)),
    *(
        ({"norm_epsilon": v}, f"norm_epsilon ({v}) must be positive; the paper's is 1e-3")
        for v in (0.0, -1.0, NAN, INF)
    ),
    ({"norm": "group", "norm_groups": 7}, "norm_groups (7) must divide filters (64); use 4"),
    ({"norm": "group", "filters": 12}, "norm_groups (8) must divide filters (12); use 6"),
]


@pytest.mark.parametrize(("values", "sentence"), CONFIG_MISTAKES)
def test_a_mistake_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the sentence is compared below
        Config.of(**values)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_worker_that_waits_for_the_storage_is_not_hung() -> None:
    with pytest.raises(ValueError, match=r"hang_seconds \(60\) must be above storage_seconds \(60\), .*, or 0$"):
        Config.of(hang_seconds=60)


@pytest.mark.parametrize(("values", "sentence"), MODEL_MISTAKES)
def test_a_mistake_in_the_model_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the sentence is compared below
        ModelConfig(**values)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("meta_batch", "workers", "fix"), [(10, 4, "8 or 12"), (32, 3, "30 or 33"), (2, 4, "4"), (7, 2, "6 or 8")]
)
def test_meta_batch_is_divided_among_workers(meta_batch: int, workers: int, fix: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the sentence is compared below
        Config.of(meta_batch=meta_batch, workers=workers)
    assert str(error.value) == f"meta_batch ({meta_batch}) must be divisible by workers ({workers}); use {fix}"
    for works in map(int, fix.split(" or ")):
        assert Config.of(meta_batch=works, workers=workers).episodes.meta_batch == works


def test_what_lies_on_the_border_is_accepted() -> None:
    Config.of(meta_batch=7, workers=0, seed=2**64 - 1, eval_seed=2**64 - 1, max_failures=0, eval_episodes=2)
    Config.of(ways=2, lr_decay=1, lr_min=1e-3, lr=1e-3, test_episodes=2)
    Config.of(test_episodes=0, eval_ways=2, eval_shot=1)
    Config.of(hang_seconds=0, storage_seconds=60)
    Config.of(workers=1, max_workers=5, meta_batch=32)  # the slices of elastic workers may differ in size
    ModelConfig(norm_decay=0.0)
    ModelConfig(filters=12, norm_groups=8)  # groups are for norm=group alone


def test_the_defaults_are_the_papers() -> None:
    config = Config()
    assert config.episode("train") == (5, 1, 1, 5)
    assert (config.episodes.meta_batch, config.episodes.epochs) == (32, 120)
    assert (config.optim.lr, config.optim.lr_decay_steps, config.optim.lr_min) == (1e-3, 1500, 1e-6)
    assert config.optim.lr_decay == pytest.approx(1 / 1.11111)
    assert (config.episodes.protocol, config.episodes.noise, config.optim.weight_decay) == ("standard", "sample", 0)
    model = config.model
    assert (model.channels, model.filters, model.noise_size) == (0, 64, 32)
    assert (model.norm, model.norm_scope, model.norm_decay, model.norm_epsilon) == ("batch", "global", 0.99, 1e-3)
    assert model.weight_norm


def test_val_and_test_episodes_may_have_ways_and_shots_of_their_own() -> None:
    config = Config.of(ways=20, shot=5, eval_ways=5, eval_shot=1, query=2, eval_query=3)
    assert config.episode("train") == (20, 5, 2, 40)
    assert config.episode("val") == config.episode("test") == (5, 1, 3, 15)
    assert Config.of(ways=7, shot=3).episode("test")[:2] == (7, 3)


def test_protocol_paper_has_one_query_an_episode() -> None:
    config = Config.of(ways=20, shot=5, query=4, protocol="paper")
    assert config.episode("train") == config.episode("test") == (20, 5, 1, 1)


def test_steps() -> None:
    assert Config().episodes.steps == 120_000
    assert Config.of(epochs=3, steps_per_epoch=7).episodes.steps == 21


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "fc100-5w1s-standard-seed0"),
        ({"ways": 20, "shot": 5, "protocol": "paper", "seed": 3}, "fc100-20w5s-paper-seed3"),
        ({"data": "/some/folder/birds.json"}, "birds-5w1s-standard-seed0"),
        ({"data": "http://host/path/birds.json"}, "birds-5w1s-standard-seed0"),
        ({"name": "mine", "data": "glyphs"}, "mine"),
    ],
)
def test_run_name(values: dict[str, Any], name: str) -> None:
    assert Config.of(**values).run_name == name


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().episodes.ways = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().norm = "group"  # type: ignore[misc]


def test_replace_takes_flag_names_and_groups() -> None:
    config = Config().replace(ways=7, data="glyphs", **{"model.norm": "layer"})
    assert (config.episodes.ways, config.data.name, config.model.norm) == (7, "glyphs", "layer")
    assert config.replace(model=ModelConfig(filters=8), shot=2).model == ModelConfig(filters=8)
    assert config.replace(shot=2).episodes.ways == 7
    with pytest.raises(ValueError, match=r"^way is no setting; did you mean ways\?$"):
        config.replace(way=3)
    with pytest.raises(ValueError, match=r"^ways \(1\) must be at least 2"):
        config.replace(ways=1)


def test_every_setting_has_a_flag_of_its_own() -> None:
    fields = [(group, f.name) for group, cls in GROUPS.items() for f in dataclasses.fields(cls)]
    assert [(place.group, place.field.name) for place in SETTINGS.values()] == fields
    assert {"data", "data_root", "ways", "lr", "workers", "name", "model.norm"} < SETTINGS.keys()


def test_marks() -> None:
    """What a run may change when it is resumed, and what makes a step larger: the lists of the first version."""
    assert marked("resumable") == {
        *("epochs", "workers", "max_workers", "cpus_per_worker", "device", "max_failures", "hang_seconds"),
        *("data_root", "source", "cache", "name", "storage", "storage_seconds", "wandb", "plugins", "model.kernels"),
    }
    assert marked("costly") == {"ways", "shot", "query", "meta_batch", "pretraining.batch"}
    assert marked("perturbed") == {"model.norm_decay", "model.norm_epsilon"}
    assert 10 <= len(marked("basic")) <= 13


def other(value: Any, name: str) -> Any:
    """A valid value of the same type that is not the default."""
    chosen = {
        "protocol": "paper",
        "noise": "mean",
        "precision": "bf16",
        "device": "cpu",
        "wandb": "disabled",
        "stream": "always",
        "meta_batch": 33,
        "workers": 3,
        "max_workers": 4,
        "eval_ways": 7,
        "kernels": "reference",
        "stages": ("episodes", "more"),
        "plugins": ("my_parts",),
        "augmentations": ("flip_shift", "more"),
        "classes": "held_out",
        "variants": "rotations",
        "optimizer": "adam",
        "schedule": "step",
        "milestones": (0.5,),
    }
    chosen |= {"norm": "group", "norm_scope": "episode", "norm_groups": 5, "filters": 65, "lr_decay": 0.5, "lr": 0.01}
    if name == "rotations":
        return {1: 4, 4: 1}[value]
    if name in chosen:
        return chosen[name]
    if isinstance(value, bool):
        return not value
    return value / 2 + 1e-7 if isinstance(value, float) else value + 1 if isinstance(value, int) else f"{value}x"


def test_every_setting_survives_json() -> None:
    changed = {name: other(place.default, place.field.name) for name, place in SETTINGS.items()}
    config = Config.of(**changed)
    assert config.flat() == changed
    assert all(changed[name] != value for name, value in Config().flat().items())
    assert Config.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    assert Config.from_dict(json.loads(json.dumps(config.flat(), allow_nan=False))) == config


def test_from_dict_takes_part_of_the_settings_and_leaves_the_dictionary_alone() -> None:
    values = {"ways": 7, "model": {"filters": 16}}
    assert Config.from_dict(values) == Config.of(ways=7, model=ModelConfig(filters=16))
    assert values == {"ways": 7, "model": {"filters": 16}}
    assert Config.from_dict({}) == Config()


OLD_RUNS = Path(__file__).parent / "fixtures" / "runs-82eed57"


def test_a_configuration_without_groups_is_read() -> None:
    """config.json as the first version wrote it: flag names, and `model` as a dictionary."""
    config = Config.from_dict(json.loads((OLD_RUNS / "paper" / "config.json").read_text()))
    assert (config.data.name, config.data.root, config.run.name) == ("glyphs", "data", "paper")
    assert (config.episodes.protocol, config.episodes.steps, config.episodes.meta_batch) == ("paper", 4, 4)
    assert (config.model.norm, config.model.filters, config.model.noise_size) == ("group", 4, 2)
    assert (config.run.workers, config.run.wandb, config.optim.lr) == (0, "disabled", 1e-3)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr": "0.1"}, "lr ('0.1') must be of type float"),
        ({"optim": {"lr": "0.1"}}, "lr ('0.1') must be of type float"),
        ({"ways": 5.0}, "ways (5.0) must be of type int"),
        ({"ways": True}, "ways (True) must be of type int"),
        ({"data": None}, "data (None) must be of type str"),
        ({"model": [1]}, "model ([1]) must be a dictionary of settings"),
        ({"model": {"weight_norm": 1}}, "model.weight_norm (1) must be of type bool"),
        ({"stages": "episodes"}, "stages ('episodes') must be of type tuple"),
    ],
)
def test_a_value_of_another_type_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the sentence is compared below
        Config.from_dict(values)
    assert str(error.value) == sentence
    assert Config.from_dict({"lr": 1}).optim.lr == 1, "a whole number may stand for a float, as in JSON"


def test_an_unknown_key_is_named_with_the_most_similar_one() -> None:
    with pytest.raises(ValueError, match=r"^way is no setting; did you mean ways\?$"):
        Config.from_dict({"way": 5})
    with pytest.raises(ValueError, match=r"^model\.filter is no setting; did you mean model\.filters\?$"):
        Config.from_dict({"model": {"filter": 5}})
    with pytest.raises(ValueError, match=r"^xyz is no setting; the known ones are data, data_root, .*storage_seconds$"):
        Config.from_dict({"xyz": 5})
    with pytest.raises(ValueError, match=r"^ways \(1\) must be at least 2"):
        Config.from_dict({"ways": 1})


def test_presets() -> None:
    assert PRESETS.keys() == {"paper", "strong", "quick", "demo"}
    assert PRESETS["paper"] == Config()
    demo = PRESETS["demo"]
    assert (demo.data.name, demo.run_name) == ("glyphs", "demo")
    assert demo.pretraining.steps * demo.pretraining.batch * 4 <= 120_000, "the demo ends within minutes"
    assert demo.pretraining.steps % demo.pretraining.eval_every == 0
