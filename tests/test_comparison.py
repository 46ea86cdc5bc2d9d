"""`lgm-dist evaluate --compare`: rows of settings over the same episodes, with paired differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lgm_dist.cli import evaluate as command
from lgm_dist.config import Config
from lgm_dist.data import ImageBank, open_bank
from lgm_dist.model import LGMNet, build_model
from lgm_dist.model.controls import with_other_context
from lgm_dist.runs import checkpoint
from lgm_dist.training.base_statistics import fit_head
from lgm_dist.training.comparison import HEADS, Row, compare, rows_of
from lgm_dist.training.evaluation import Evaluation, Score, evaluate
from lgm_dist.training.schedule import make_optimizer

WHITENED = "model.generator=none model.head=class_means model.pool=2 model.shrinkage=0.5"


@pytest.fixture
def banks(small: Config) -> tuple[ImageBank, ImageBank]:
    return open_bank(small.data.name, "val"), open_bank(small.data.name, "train")


def network(small: Config) -> LGMNet:
    return build_model(small.model, seed=3).eval()


def test_words_become_settings_of_their_types() -> None:
    rows = rows_of(
        ["model.pool=2 model.power=0.5 eval_flips=true model.centre=false", "model.head=ridge eval_copies=5"]
    )
    assert rows == [
        {"model.pool": 2, "model.power": 0.5, "eval_flips": True, "model.centre": False},
        {"model.head": "ridge", "eval_copies": 5},
    ]
    assert [type(value) for value in rows[0].values()] == [int, float, bool, bool]
    assert rows_of(["heads", "eval_copies=1"]) == [*HEADS, {"eval_copies": 1}]
    assert rows_of(["controls"]) == [{"model.generator": "none"}, {"context": "other"}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model.pol=2", r"model\.pol is no setting; did you mean model\.pool\?"),
        ("ways=5", r"compare cannot change ways, which takes training; it changes eval_copies, .*model\.shrinkage"),
        ("model.pool=two", r"compare: model\.pool \('two'\) must be of type int; write model\.pool=VALUE"),
        ("context=mine", r"compare: context \('mine'\) must be own or other"),
        ("eval_flips", r"compare: eval_flips \(''\) must be true or false; write eval_flips=VALUE"),
    ],
)
def test_words_that_cannot_be_read_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        rows_of([text])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model.pool": 7}, r"pool \(7\) must be one of 0, 1, 2, 3, 4"),
        ({"model.generator": "mine"}, r"model\.generator \('mine'\) must be one of "),
        (
            {"model.generator": "residual"},
            r"model\.generator \('residual'\) must be none, base_directions or .*own, lgm;",
        ),
        ({"model.head": "mine"}, r"model\.head \('mine'\) must be one of "),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    small: Config, banks: tuple[ImageBank, ImageBank], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        compare(network(small), *banks, [small], [settings], 4)


def test_protocol_paper_is_refused(small: Config, banks: tuple[ImageBank, ImageBank]) -> None:
    with pytest.raises(ValueError, match=r"^compare needs protocol standard.*; add --protocol standard$"):
        compare(network(small), *banks, [small.replace(protocol="paper")], [{}], 4)


def test_each_row_is_an_evaluation_of_its_own(small: Config, banks: tuple[ImageBank, ImageBank]) -> None:
    """The same as changing the network and the configuration by hand, one evaluation after the other."""
    cells = [small.replace(eval_ways=2, eval_shot=1), small]
    rows = rows_of([WHITENED, f"{WHITENED} eval_copies=2 eval_flips=true", "model.generator=none", "eval_flips=true"])
    model = network(small)
    found = compare(model, *banks, cells, rows, 12)
    assert [row.settings for row in found] == [{}, *rows]
    for row in found:
        config = small.replace(**row.settings)
        other = build_model(config.model, seed=3).eval()
        fit_head(other, banks[1], config)
        for cell, evaluation in zip(cells, row.evaluations, strict=True):
            by_hand = evaluate(other, banks[0], cell.replace(**row.settings), "val", 12)
            assert (evaluation.ways, evaluation.shot) == cell.episode("val")[:2]
            np.testing.assert_allclose(evaluation.accuracies["mean noise"], by_hand.accuracies["mean noise"], atol=0.12)
            assert evaluation.score.accuracy == pytest.approx(by_hand.score.accuracy, abs=0.02), (
                "rounding of close calls"
            )
    assert model.config == small.model


def of(accuracies: np.ndarray) -> Evaluation:
    return Evaluation("val", "standard", 5, 1, len(accuracies), 0, {"m": Score.of(accuracies)}, {"m": accuracies})


def test_differences_are_paired_by_episode() -> None:
    random = np.random.default_rng(0)
    a = random.uniform(size=50)
    b = a + random.normal(0.02, 0.01, 50)
    (found,) = Row({}, (of(b),)).differences(Row({}, (of(a),)))
    assert found.accuracy == pytest.approx(b.mean() - a.mean())
    assert found.ci95 == pytest.approx(1.96 * stats.sem(b - a))
    assert found.ci95 < Score.of(b).ci95 / 5


def test_the_command_prints_and_writes_a_table(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.replace(name="run", storage=str(tmp_path), wandb="disabled")
    model, run = network(small), tmp_path / "run"
    checkpoint.save(run, checkpoint.TrainState(4, 0.5, 0.1), model, make_optimizer(model, config), config)
    arguments = [str(run), "--episodes", "6", "--ways", "2", "5", "--shot", "1"]
    command.main([*arguments, "--compare", "model.generator=none", "model.generator=none model.head=ridge"])
    out, path = capsys.readouterr().out, run / "comparison-val.json"
    assert out.endswith(f"written to {path}\n")
    results = json.loads(path.read_text())["results"]
    assert [(r["settings"], r["ways"]) for r in results] == [
        (settings, ways)
        for settings in ("as trained", "model.generator=none", "model.generator=none model.head=ridge")
        for ways in (2, 5)
    ]
    assert all(r["split"] == "val" for r in results), "nothing is chosen on test"
    assert [(r["difference"], r["difference_ci95"]) for r in results[:2]] == [(0, 0)] * 2
    header, _, first, *others = [line for line in out.splitlines() if line.startswith("|")]
    assert [word.strip() for word in header.strip("|").split("|")] == [
        *("2-way 1-shot", "difference", "5-way 1-shot", "difference", "settings")
    ]
    assert [word.strip() for word in first.strip("|").split("|")][1::2] == ["—", "—"]
    for line, result in zip(others, results[2::2], strict=True):
        score = next(iter(result["scores"].values()))
        assert f"{100 * score['accuracy']:.2f} ± {100 * score['ci95']:.2f} %" in line
        assert f"{100 * result['difference']:+.2f} ± {100 * result['difference_ci95']:.2f}" in line


def test_controls_of_a_generator_are_the_network_without_it_and_with_the_weights_of_another_episode(
    small: Config, banks: tuple[ImageBank, ImageBank]
) -> None:
    bank, base = banks
    model = network(small)
    own, off, other = compare(model, bank, base, [small], rows_of(["controls"]), 6)
    expected = [
        evaluate(m, bank, small, "val", 6) for m in (model, model.without_generator(), with_other_context(model))
    ]
    for row, evaluation in zip((own, off, other), expected, strict=True):
        np.testing.assert_array_equal(row.evaluations[0].accuracies["mean noise"], evaluation.accuracies["mean noise"])
    assert str(other) == "context=other"
