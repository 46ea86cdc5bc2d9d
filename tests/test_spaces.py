"""Search spaces: what they refuse, what they draw, and the budget that makes trials comparable."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from lgm_dist.config import Config
from lgm_dist.sweeps.spaces import (
    NORMALIZATION,
    SPACES,
    Choice,
    LogUniform,
    Space,
    Uniform,
    all_samples,
    apply,
    budgeted,
    check_space,
    describe,
    evaluations_of,
    images_per_step,
    load_space,
    random_samples,
    read_space,
    without_worker_scope,
)

BASE = Config.of(meta_batch=8)


@pytest.mark.parametrize("name", SPACES)
def test_named_spaces_are_drawn_from_and_make_configurations(name: str) -> None:
    space = load_space(name)
    check_space(space, BASE)
    samples = random_samples(space, 60, seed=0)
    for sample in samples:
        config = apply(BASE, sample).flat()
        assert {path: config[path] for path in sample} == sample
    for path, param in space.items():
        drawn = {sample[path] for sample in samples if path in sample}
        if isinstance(param, Choice):
            assert drawn == set(param.values), f"all of {path}'s values are drawn"
        else:
            assert param.low <= min(drawn) < max(drawn) <= param.high


def test_the_full_space_is_the_others_together() -> None:
    assert SPACES["full"].keys() == {path for name in ("ways_shots", "optim", "normalization") for path in SPACES[name]}


def test_a_setting_is_drawn_only_if_its_condition_holds() -> None:
    for sample in random_samples(SPACES["full"], 100, seed=1):
        assert ("model.norm_scope" in sample) == ("model.norm_decay" in sample) == (sample["model.norm"] == "batch")
        assert ("lr_decay_steps" in sample) == (sample["lr_decay"] != 1.0)
    for sample in random_samples(SPACES["generator"], 50, seed=1):
        assert ("generator.variants" in sample) == (sample["classes"] == "held_out")


def test_the_generator_space_has_every_generator_that_can_be_trained_on_maps() -> None:
    files = (Path(__file__).parents[1] / "lgm_dist/model/generators").glob("*.py")
    others = {"__init__", "lgm", "base_directions"}
    assert set(SPACES["generator"]["model.generator"].values) == {f.stem for f in files} - others  # type: ignore[union-attr]


def test_random_samples_differ_and_are_a_function_of_the_seed_and_end_with_the_space() -> None:
    space: Space = {"noise": Choice(("sample", "mean")), "ways": Choice((5, 10))}
    samples = random_samples(space, 100, seed=3)
    assert len(samples) == 4
    assert len({json.dumps(sample) for sample in samples}) == 4
    assert random_samples(SPACES["optim"], 5, seed=3) == random_samples(SPACES["optim"], 5, seed=3)
    assert random_samples(SPACES["optim"], 5, seed=3) != random_samples(SPACES["optim"], 5, seed=4)


def test_a_log_uniform_parameter_is_uniform_in_its_logarithm() -> None:
    """Half of the draws from [1e-4, 1e-2] lie below 1e-3; of uniform draws, a eleventh would."""
    drawn = [sample["lr"] for sample in random_samples({"lr": LogUniform(1e-4, 1e-2)}, 400, seed=0)]
    assert 160 < sum(lr < 1e-3 for lr in drawn) < 240
    uniform = [sample["lr"] for sample in random_samples({"lr": Uniform(1e-4, 1e-2)}, 400, seed=0)]
    assert 15 < sum(lr < 1e-3 for lr in uniform) < 65


def test_grid_is_every_combination_that_means_something() -> None:
    """Batch norm: 3 scopes x 2 decays; three other norms; each x 2 weight norms x 2 noises: (6 + 3) * 4."""
    assert len(all_samples(NORMALIZATION)) == 36
    samples = all_samples(without_worker_scope(NORMALIZATION, workers=1))
    assert len(samples) == 28
    assert len({json.dumps(sample) for sample in samples}) == 28
    assert len(all_samples(without_worker_scope(NORMALIZATION, workers=2))) == 36
    with pytest.raises(ValueError, match="space key 'lr' has infinitely many values; use --search random or tpe"):
        all_samples(SPACES["optim"])


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"model.nrom": Choice((1,))}, "space key 'model.nrom' is not a setting; did you mean model.norm?"),
        (
            {"weight_norm": Choice((True,))},
            "space key 'weight_norm' is not a setting; did you mean model.weight_norm?",
        ),
        ({"model": Choice((1,))}, "space key 'model' is not a setting"),
        ({"lr": Choice((-1.0,))}, "space key 'lr': lr (-1.0) must be positive; the paper's is 1e-3"),
        ({"lr": Choice(("big",))}, "space key 'lr': lr ('big') must be of type float"),
        ({"ways": Uniform(2, 5)}, "space key 'ways': ways (2.0) must be of type int"),
        (
            {"model.norm": Choice(("batch", "bach"))},
            "space key 'model.norm': norm ('bach') must be one of batch, group",
        ),
        ({"lr": LogUniform(1e-2, 1e-4)}, "space key 'lr': low (0.01) must be below high (0.0001)"),
        (
            {"weight_decay": LogUniform(0, 1e-2)},
            "space key 'weight_decay': low (0) must be below high (0.01), and above 0 for LogUniform",
        ),
        ({"ways": Choice(())}, "space key 'ways': a Choice needs at least one value and none twice, not ()"),
        ({"ways": Choice((5, 5))}, "space key 'ways': a Choice needs at least one value and none twice, not (5, 5)"),
        ({"eval_ways": Choice((5,))}, "space key 'eval_ways' cannot be searched over: give --target-ways"),
        ({"name": Choice(("a",))}, "space key 'name' cannot be searched over: it belongs to the sweep"),
        (
            {"model.norm_decay": Choice((0.9,), when={"model.norm": ("batch",)})},
            "space key 'model.norm_decay': its condition on 'model.norm' must name values of a Choice that comes before",
        ),
        (
            {"noise": Choice(("mean",)), "lr": Choice((0.1,), when={"noise": ("sample",)})},
            "space key 'lr': its condition on 'noise' must name values of a Choice that comes before it",
        ),
    ],
)
def test_a_wrong_space_is_one_sentence(space: Space, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the sentence is compared below
        check_space(space, BASE)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["eval_ways", "data", "test_episodes", "workers", "epochs", "name", "model.channels", "stages"]
)
def test_what_belongs_to_the_sweep_cannot_be_searched(path: str) -> None:
    with pytest.raises(ValueError, match=f"^space key '{path}' cannot be searched over: "):
        check_space({path: Choice((1, 2))}, BASE)


def test_a_value_is_checked_under_its_condition() -> None:
    """norm_groups=7 divides nothing, but only norm=group looks at it."""
    group = {"model.norm": Choice(("batch", "group"))}
    with pytest.raises(
        ValueError, match=r"space key 'model.norm_groups': norm_groups \(7\) must divide filters \(64\)"
    ):
        check_space(group | {"model.norm_groups": Choice((4, 7), when={"model.norm": ("group",)})}, BASE)


def test_a_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from lgm_dist.sweeps.spaces import Choice\nSPACE = {'ways': Choice((5, 10))}\n")
    assert load_space(str(path)) == {"ways": Choice((5, 10))}
    for text, sentence in [
        ("", "has no attribute 'SPACE'"),
        ("SPACE = {", "was never closed"),
        ("import nothing_there", "No module named"),
        ("SPACE = {'ways': (5, 10)}", "SPACE has the wrong type; define a dictionary of setting to Choice, Uniform or"),
        ("SPACE = {}", "SPACE has the wrong type"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence) as error:
            load_space(str(path))
        assert str(error.value).startswith(f"space ({path})")
    with pytest.raises(
        ValueError, match=r"space \('norms'\) must be one of ways_shots, optim, normalization, full, generator, or a"
    ):
        load_space("norms")
    with pytest.raises(ValueError, match="No such file"):
        load_space(str(tmp_path / "missing.py"))


def test_a_trial_trains_on_as_many_images_as_the_base() -> None:
    """5-way 1-shot 1-query: 32 * 5 * 2 = 320 images a step; 20-way 5-shot 1-query: 32 * 20 * 6 = 3,840, twelve times that."""
    base = Config.of(epochs=2, steps_per_epoch=600, eval_every=300, lr_decay_steps=120, query=1)
    assert images_per_step(base) == 320
    big = budgeted(base, apply(base, {"ways": 20, "shot": 5}))
    assert images_per_step(big) == 3840
    assert (big.episodes.steps, big.episodes.eval_every, big.optim.lr_decay_steps) == (100, 25, 10)
    small = budgeted(base, apply(base, {"meta_batch": 8}))
    assert (small.episodes.steps, small.episodes.eval_every, small.optim.lr_decay_steps) == (4800, 1200, 480)
    assert evaluations_of(base) == evaluations_of(big) == evaluations_of(small) == 4
    assert budgeted(base, base).episodes.steps == 1200
    paper = apply(base, {"protocol": "paper"})
    assert images_per_step(paper) == 32 * (5 * 1 + 1), "one query an episode"


def test_a_budget_too_small_for_a_step_is_one_step_an_evaluation() -> None:
    base = Config.of(epochs=1, steps_per_epoch=4, eval_every=2)
    tiny = budgeted(base, apply(base, {"ways": 20, "shot": 5}))
    assert (tiny.episodes.steps, tiny.episodes.eval_every) == (2, 1)


@pytest.mark.parametrize("name", SPACES)
def test_a_space_survives_json(name: str) -> None:
    described: dict[str, Any] = json.loads(json.dumps(describe(SPACES[name])))
    assert read_space(described) == SPACES[name]


def test_the_spaces_of_the_editable_file_are_the_built_in_ones_and_the_command_takes_them() -> None:
    """tune/spaces.py as it is shipped; a space that is added there is known to tune/sweep.py."""
    folder = Path(__file__).parents[1] / "tune"
    edited = runpy.run_path(str(folder / "spaces.py"))["SPACES"]
    assert edited == SPACES
    assert edited is not SPACES, "editing it leaves the built-in ones alone"
    with pytest.raises(ValueError, match=r"must be one of mine, or a Python file"):
        load_space("optim", {"mine": {"ways": Choice((5, 10))}})
