"""The benchmark measures what it says: turns, ratios, FLOPs, and each part on something small."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from lgm_dist.bench import gpu, loading, measure, network, pictures, scaling, streaming
from lgm_dist.bench.measure import Spread, in_turn, ratio
from lgm_dist.bench.steps import ROOT, StepSetup, contender
from lgm_dist.data import open_bank
from lgm_dist.data.manifest import read_manifest
from lgm_dist.data.streamed import StreamedSplit

TINY = {"meta_batch": 2, "size": 8, "threads": 1}


def test_contenders_take_turns_and_the_first_rounds_do_not_count() -> None:
    calls: list[str] = []

    def contender(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = in_turn({"a": lambda: contender("a"), "b": lambda: contender("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "ababab"
    assert (found["a"].values, found["b"].values) == ((3.0, 5.0), (4.0, 6.0))


def test_ratios_pair_the_rounds() -> None:
    found = ratio(Spread((2.0, 9.0, 8.0)), Spread((1.0, 3.0, 4.0)))
    assert found.values == (2.0, 3.0, 2.0)
    assert found.text() == "2.0 [2.0, 3.0]"
    assert Spread((1000.0, 3000.0, 2000.0)).text(0) == "2,000 [1,000, 3,000]"


@pytest.mark.parametrize(
    ("ways", "shot", "size", "millions"),
    [(5, 1, 32, 552.3), (5, 5, 32, 2361.6), (20, 1, 32, 1909.3), (5, 1, 84, 3785.6), (5, 5, 84, 16479.3)],
)
def test_flops_are_those_of_the_specification(ways: int, shot: int, size: int, millions: float) -> None:
    """The table of lgmnet-spec.md section 9, whose figures leave the cosine out."""
    assert network.flops(StepSetup("ours", ways, shot, size=size)) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_ours_and_the_plain_network_take_the_same_steps() -> None:
    kinds = {
        kind: StepSetup(kind, 3, 2, queries=2, **TINY) for kind in ("ours", "ours-reference", "plain", "plain-kept")
    }
    found, losses = network.race(kinds, rounds=2)
    assert {len(spread.values) for spread in found.values()} == {2}
    assert losses["ours"] == pytest.approx(losses["plain"], abs=1e-5)
    assert losses["ours-reference"] == pytest.approx(losses["plain"], abs=1e-5)
    assert losses["plain"] == losses["plain-kept"]


def test_a_contender_says_how_much_memory_it_took() -> None:
    with contender(StepSetup("ours", 2, 1, **TINY)) as take:
        found = [take() for _ in range(2)]
    assert found[0]["loss"] != found[1]["loss"], "it trains"
    assert 50e6 < found[0]["peak_bytes"] <= found[1]["peak_bytes"] < 2e9


def test_a_contender_that_dies_is_named() -> None:
    with (
        pytest.raises(ValueError, match=r"ours at 0-way 1-shot ended with status 1"),
        contender(StepSetup("ours", ways=0)) as step,
    ):
        step()


@pytest.mark.slow
def test_the_network_is_measured_with_torch_and_numpy_alone() -> None:
    blocked = ("webdataset", "PIL", "torchvision", "pyarrow", "tqdm", "ray", "wandb", "tyro", "matplotlib", "sklearn")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    code += "import lgm_dist.cli.bench; from lgm_dist.bench import network, measure\n"
    code += "s = network.step(1, ((2, 1),)); print(s.markdown); print(measure.facts()['torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| 2-way 1-shot | " in done.stdout


def test_loading_covers_every_contender(tiny: Path) -> None:
    bank = open_bank(tiny, "train")
    section = loading.data(bank, 1, threads=1)
    assert [row[0] for row in section.rows if "plain" not in row[0]] == [
        "lgm_dist, uint8",
        "lgm_dist, normalised float32",
        "lgm_dist, augmented, normalised",
    ]
    assert all(float(row[2].split()[0]) > 0 for row in section.rows if "plain" not in row[0])


def test_the_stream_is_timed_against_the_bank(tiny: Path) -> None:
    split = StreamedSplit(read_manifest(str(tiny)))
    section = streaming.stream(open_bank(tiny, "train"), split, 1, threads=1, steps=1)
    assert [row[0] for row in section.rows] == ["batches alone", "in training"]
    assert all(value > 0 for spread in section.values["images/s"].values() for value in spread)


def test_evaluations_with_more_draws_take_longer(tiny: Path) -> None:
    section = loading.evaluation(open_bank(tiny, "test"), 1, episodes=20, threads=1)
    (one,), (ten,) = section.values["seconds"].values()
    assert ten > one > 0


@pytest.mark.slow
def test_two_workers_are_timed_and_what_they_tell_each_other_is_counted() -> None:
    """Batch norm six times a step, forwards and backwards, 1 + 2 F and 2 F numbers in float64."""
    for found in scaling._workers(2):
        assert (found["collectives"], found["bytes"]) == (12, 6 * 8 * (1 + 2 * 64 + 2 * 64))
        assert found["seconds"] > found[f"all_reduce {scaling.GRADIENTS}"] > found["all_reduce 4"] > 0
    (apart, _) = scaling._workers(2, "apart")
    assert apart["collectives"] == 0


def test_communication_on_paper_by_hand() -> None:
    """4 workers: 3/4 of the bytes twice, 6 hops of the ring, and 2 levels up and down for each of 3 small all-reduces."""
    seconds = scaling.communication(4, latency=1e-3, rate=scaling.GRADIENTS / 2.0, collectives=3)
    assert seconds == pytest.approx(2 * 3 / 4 * 2.0 + 6e-3 + 3 * 4e-3)


def test_growth_compares_what_differs_in_one_thing_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seconds of a step that costs 1 + 2 a way + 3 a shot beyond the first, and so on; the slopes come back."""

    def cost(steps: StepSetup) -> float:
        return 1 + 2 * steps.ways + 3 * steps.shot + 0.5 * steps.queries + 0.25 * steps.meta_batch

    @contextlib.contextmanager
    def fake(steps: StepSetup) -> Iterator[Callable[[], dict[str, float]]]:
        yield lambda: {"seconds": cost(steps), "peak_bytes": 2**20 * cost(steps), "loss": 0.0}

    monkeypatch.setattr(network, "contender", fake)
    section = network.growth(2)
    known = {"ways": 2, "shot": 3, "queries": 0.5, "meta_batch": 0.25}
    for axis, slope in section.values["slopes"].items():
        assert slope == pytest.approx({"seconds": known[axis], "bytes": 2**20 * known[axis]})
    assert "one more of ways: 2000.0 ms, 2.0 MiB" in section.note
    pictures.growth(section.values, tmp_path / "new/growth.png")
    assert plt.imread(tmp_path / "new/growth.png").shape[1] > 1000


def test_steps_on_a_device_are_timed_and_what_fails_says_why(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(gpu, "STEPS", 1)
    graph = "float32, CUDA graph"
    ways = ("float32", *([] if torch.cuda.is_available() else [graph]))
    section = gpu.gpu(open_bank(tiny, "train"), 1, device="cpu", ways=ways, meta_batch=2)
    assert [row[0] for row in section.rows] == [*ways]
    assert section.values["seconds"]["float32"][0] > 0
    assert (not torch.cuda.is_available() and section.rows[1][1] == "failed" and section.rows[1][3]) or len(ways) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["step", "--rounds", "0"], "rounds (0) must be at least 1"),
        (["step", "--model"], "model goes with scaling, not with step; give bench scaling --model"),
        pytest.param(
            ["gpu"],
            "gpu: this machine has no CUDA device that torch can use; run it where torch.cuda.is_available()",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["data", "--against", "rival"], "against (rival) must be one of easyfsl"),
        pytest.param(
            ["data", "--against", "easyfsl"],
            "against (easyfsl) is not installed; install easyfsl, or leave it out",
            marks=pytest.mark.skipif(importlib.util.find_spec("easyfsl") is not None, reason="it is"),
        ),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str) -> None:
    done = subprocess.run([sys.executable, "-m", "lgm_dist", "bench", *words], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, f"lgm-dist bench: {sentence}\n")


def test_figures_are_written_with_what_they_were_measured_on(tmp_path: Path) -> None:
    section = measure.Section("x", "lgm-dist bench x", ("a",), [("1",)], "n = 1", {"seconds": [1.0]})
    measure.write([section], tmp_path / "out/bench.json")
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert found["x"]["seconds"] == [1.0]
    assert found["facts"]["threads"] >= 1
    assert "| a |\n|---|\n| 1 |\n\nn = 1\n" in section.markdown
