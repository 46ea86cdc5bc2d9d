"""The file of a learner: what it keeps, what it leaves out, how small it is, and which files are refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.headers import rewritten
from safetensors import safe_open

from lgm_dist import Config, Learner, fit, learners, load, open_bank, sample_episodes
from lgm_dist.adapt import learner_file
from lgm_dist.adapt.learner_file import from_low_rank, low_rank
from lgm_dist.config import PRESETS, ModelConfig
from lgm_dist.model import LGMNet, build_model
from lgm_dist.runs.checkpoint import ImageFacts, TrainState

FACTS = ImageFacts((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 32, 32, 3, ("apple", "pear"))
WHITENED = ModelConfig(
    channels=3, filters=8, generator="base_directions", head="class_means", pool=2, centre=True, shrinkage=0.5
)


@pytest.fixture(scope="module")
def trained(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the stage pretraining whose generator has statistics of the base classes."""
    config = small.replace(stages=("pretraining",), model=WHITENED, storage=str(tmp_path_factory.mktemp("runs")))
    lengths: dict[str, Any] = {"pretraining.batch": 12, "pretraining.steps": 6, "pretraining.eval_every": 3}
    return fit(config.replace(name="run", start="", **lengths))


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lgm_dist"])
    return found


def answers(learner: Learner, manifest: Path) -> torch.Tensor:
    batch = sample_episodes(open_bank(manifest, "test"), learner.config, "test", 0, 8)
    with torch.no_grad():
        found: torch.Tensor = learner.model(batch.support, batch.query, 3)
    return found


def test_a_learner_answers_from_its_file_as_from_its_run(trained: Path, tiny: Path, tmp_path: Path) -> None:
    run = load(trained)
    assert run.model.generator.directions.any()  # type: ignore[attr-defined]
    differences = []
    for rank in (1000, 24, 4):  # of D = 32 values; answers are about -1
        learner = load(run.save(tmp_path / f"{rank}.safetensors", rank))
        assert not learner.model.training
        differences.append(float((answers(learner, tiny) - answers(run, tiny)).abs().max()))
    assert 0 < differences[0] < 0.05  # half precision of the backbone
    assert differences[1] < 0.05
    assert differences[2] > 0.2  # the rank matters


def test_the_file_knows_the_images_and_the_step_but_no_path(trained: Path, tmp_path: Path, tiny: Path) -> None:
    run = load(trained)
    path = run.save(tmp_path / "a.safetensors")
    learner = load(str(path))
    assert (learner.name, learner.state, learner.images) == (str(path), run.state, run.images)
    pixels = np.full((1, 16, 16, 3), 7, np.uint8)
    assert torch.equal(learner.prepare(pixels), run.prepare(pixels))
    assert learner.config.data.name == "tiny"
    assert (learner.config.run.stages, learner.config.pretraining.steps) == (("pretraining",), 6)
    assert learner.model.classifier is None
    defaults = Config()
    assert learner.config.run.storage == defaults.run.storage
    assert (learner.config.run.start, learner.config.pretraining.teacher) == ("", "")
    assert (learner.config.data.root, learner.config.data.cache, learner.config.data.source) == ("data", "", "")
    text = json.dumps(header(path))
    assert all(str(folder) not in text for folder in (tiny.parent, trained.parent, tmp_path))


def test_saving_again_changes_nothing(trained: Path, tmp_path: Path) -> None:
    """Half precision of half precision is the same; the kept components are found again."""
    first = load(load(trained).save(tmp_path / "a.safetensors", 8))
    second = load(first.save(tmp_path / "b.safetensors", 8))
    for name, tensor in first.model.state_dict().items():
        assert torch.allclose(second.model.state_dict()[name], tensor, atol=2e-3), name


def test_the_strong_network_takes_less_than_a_megabyte(tmp_path: Path) -> None:
    config = PRESETS["strong"]
    contents = learner_file.Contents(build_model(config.model), config, TrainState(), FACTS)
    path = learner_file.write(tmp_path / "a", learner_file.pack(contents))
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("parts", [(), (3,)])
def test_low_rank_keeps_a_whitening_whose_other_eigenvalues_are_equal(parts: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    w = np.empty((*parts, 12, 12))
    for place in np.ndindex(*parts):
        r = np.linalg.qr(random.standard_normal((12, 12)))[0]
        w[place] = r @ np.diag([0.1, 0.2, 0.3] + [1.5] * 9) @ r.T
    found = from_low_rank(*low_rank(torch.from_numpy(w), 3)).numpy()
    assert np.abs(found - w).max() < 2e-3  # half precision of the components


@pytest.mark.parametrize("generator", ["none", "lgm", "base_attention", "base_directions", "residual"])
def test_every_generator_comes_back(generator: str, tmp_path: Path) -> None:
    config = Config.of(
        model=ModelConfig(channels=3, filters=4, generator=generator, pool=2, base_outputs=8, noise_size=3)
    )
    model = build_model(config.model, seed=2)
    learner = Learner("made", model.eval(), config, TrainState(), FACTS)
    found = load(learner.save(tmp_path / "a")).model.state_dict()
    wanted = {name: x for name, x in model.state_dict().items() if not name.startswith("classifier.")}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_values_that_half_precision_cannot_hold_are_kept(tmp_path: Path) -> None:
    config = Config.of(model=ModelConfig(channels=3, filters=4))
    model = build_model(config.model)
    weight = next(p for name, p in model.named_parameters() if name.startswith("backbone.") and p.dim() > 1)
    weight.data.mul_(1e6)
    found = load(Learner("made", model.eval(), config, TrainState(), FACTS).save(tmp_path / "a")).model
    assert any(torch.equal(p, weight) for p in found.parameters() if p.shape == weight.shape)


def test_no_byte_of_a_file_can_be_changed_unseen(trained: Path, tmp_path: Path) -> None:
    path = load(trained).save(tmp_path / "a")
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    for place in np.random.default_rng(0).integers(8 + size, len(whole), 20).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"\(its tensors are not those that were written, sha256 differs\)"):
            load(path)


def test_a_small_file_cannot_ask_for_much_memory(trained: Path, tmp_path: Path) -> None:
    packed = learner_file.pack(load(trained).contents(), 4)
    name = next(name for name in packed.tensors if name.endswith(".components"))
    packed.tensors[name] = torch.zeros(0, 100_000, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"whitening of the shape \(0, 100000\)"):
        load(learner_file.write(tmp_path / "a", packed))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(format=2), r"a has format 2, newer than 1; update lgm_dist$"),
        (lambda r: r["config"]["model"].update(filters=16), r"a is not the file of a learner \(.*tensors"),
        (lambda r: r["config"]["model"].update(filters=4096), r"a is not the file of a learner \(.*tensors"),
        (lambda r: r["config"]["model"].update(banana=1), r"not the file of a learner \(model\.banana is no setting"),
        (lambda r: r.pop("images"), r"a is not the file of a learner \('images'\); write it with Learner\.save$"),
        (lambda r: r.update(state=[1]), r"a is not the file of a learner"),
        (lambda r: r["state"].update(step="x"), r"a is not the file of a learner \(a value of the wrong type"),
        (lambda r: r["images"].update(mean=[1.0]), r"a is not the file of a learner \(a value of the wrong type"),
    ],
)
def test_a_file_of_another_network_is_refused(change: Any, sentence: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(rewritten(load(trained).save(tmp_path / "a"), change))


def test_another_file_is_refused(trained: Path, tmp_path: Path) -> None:
    path = load(trained).save(tmp_path / "a")
    for content in (b"", b"PK\3\4 no", path.read_bytes()[:-100], bytes(range(256)) * 40):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a is not the file of a learner \(.+\); write it with Learner\.save"):
            load(path)


def test_a_name_that_nobody_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no run, no file and no learner 'fc100-conv5'; .*fc100-conv4"):
        load("fc100-conv5")


def test_a_rank_below_zero_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank \(-1\) must be at least 0"):
        load(trained).save(tmp_path / "a", -1)
    assert not list(tmp_path.iterdir())


def command(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lgm_dist", *words], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_export_and_evaluate_of_the_file(trained: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    text = command("export", str(trained), "--out", str(out), "--rank", "24")
    assert f"written to {out} (0.0" in text
    calibration = load(out).calibration
    assert calibration is not None
    assert [(cell.ways, cell.shot) for cell in calibration.cells] == [(3, 1), (3, 5)]
    assert load(trained).calibration == calibration  # calibration.json in the run's folder
    assert "| 3-way 1-shot | " in text
    shown = command("evaluate", str(out), "--data", str(tiny), "--episodes", "20", "--out", str(tmp_path / "out.json"))
    assert shown.startswith(f"{out}, step 6\n")
    of_file = json.loads((tmp_path / "out.json").read_text())["results"]
    command("evaluate", str(trained), "--episodes", "20")
    of_run = json.loads((trained / "evaluation-test.json").read_text())["results"]
    (ours,), (theirs,) = (found[0]["scores"].values() for found in (of_file, of_run))
    assert abs(ours["accuracy"] - theirs["accuracy"]) < 0.02
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "small.safetensors"]


@pytest.mark.parametrize("name", learners())
def test_the_learners_of_the_package_have_cards_and_load_at_once(name: str) -> None:
    learner = load(name)
    assert (learner.name, learner.model.training) == (name, False)
    assert isinstance(learner.model, LGMNet)
    card = learner.card()
    for word in ("Data", "Command", "Accuracy", "Licence", "Limits"):
        assert f"## {word}" in card
