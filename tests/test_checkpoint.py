"""Checkpoints: bit-equal continuation, what is kept, and every way in which one can be damaged."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lgm_dist import checkpoint
from lgm_dist.checkpoint import TrainState
from lgm_dist.config import Config
from lgm_dist.data import open_bank, sample_episodes
from lgm_dist.engine import make_optimizer, train_step
from lgm_dist.model import LGMNet

Run = tuple[LGMNet, torch.optim.Optimizer]


def build(config: Config, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = LGMNet(config.model)
    return model, make_optimizer(model, config)


def train(config: Config, run: Run, start: int, stop: int) -> list[Tensor]:
    """What train_step returns for each of the steps start .. stop - 1."""
    bank = open_bank(config.data, "train")
    batches = (
        sample_episodes(bank, config, "train", s * config.meta_batch, config.meta_batch) for s in range(start, stop)
    )
    model, optimizer = run
    return [train_step(model.train(), optimizer, b, config, step) for step, b in enumerate(batches, start)]


def bits(value: Any) -> Any:
    """A nested structure of tensors as one of bytes, which compare bit for bit."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def save(run: Path, config: Config, made: Run, *states: tuple[int, float]) -> list[Path]:
    return [checkpoint.save(run, TrainState(step, accuracy, 0.01), *made, config) for step, accuracy in states]


def tell_apart(made: Run, step: int) -> None:
    """Marks the weights with the step, so that what is restored says where it is from."""
    with torch.no_grad():
        made[0].extractor.convs[0].bias.fill_(step)  # type: ignore[operator]


def marked(made: Run) -> float:
    return float(made[0].extractor.convs[0].bias.detach()[0])  # type: ignore[operator]


# Continuation


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_resumed_run_ends_with_the_same_bits(small: Config, tmp_path: Path, weight_decay: float) -> None:
    config = replace(small, weight_decay=weight_decay, lr_decay_steps=2)
    straight = build(config)
    losses = train(config, straight, 0, 7)

    first = build(config)
    before = train(config, first, 0, 4)
    checkpoint.save(tmp_path, TrainState(4, 0.5, 0.1), *first, config)
    second = build(config, seed=99)
    state = checkpoint.restore(tmp_path, *second)
    assert state == TrainState(4, 0.5, 0.1)
    assert bits(second[0].state_dict()) == bits(first[0].state_dict())
    after = train(config, second, state.step, 7)

    assert bits(before + after) == bits(losses)
    assert bits(second[0].state_dict()) == bits(straight[0].state_dict())
    assert bits(second[1].state_dict()) == bits(straight[1].state_dict())


def test_without_a_checkpoint_nothing_changes(small: Config, tmp_path: Path) -> None:
    made = build(small)
    before = bits([made[0].state_dict(), made[1].state_dict()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.restore(tmp_path, *made) == TrainState(step=0, val_accuracy=-1.0)
    assert bits([made[0].state_dict(), made[1].state_dict()]) == before
    with pytest.raises(ValueError, match=r"has no checkpoint; train it with scripts/train\.py first$"):
        checkpoint.best(tmp_path)


def test_files_of_a_checkpoint(small: Config, tmp_path: Path) -> None:
    (folder,) = save(tmp_path, small, build(small), (1000, 0.25))
    assert folder == tmp_path / "checkpoints" / "step-00001000"
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.pt"]
    meta = json.loads((folder / "state.json").read_text())
    assert meta["state"] == {"step": 1000, "val_accuracy": 0.25, "val_ci95": 0.01}
    assert Config.from_dict(meta["config"]) == small
    assert meta["sha256"] == hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()


def test_load_model(small: Config, tmp_path: Path) -> None:
    made = build(small)
    train(small, made, 0, 2)
    (folder,) = save(tmp_path, small, made, (2, 0.4))
    model, config, state = checkpoint.load_model(folder)
    assert (config, state) == (small, TrainState(2, 0.4, 0.01))
    assert not any(module.training for module in model.modules())
    assert bits(model.state_dict()) == bits(made[0].state_dict())
    batch = sample_episodes(open_bank(small.data, "val"), small, "val", 0, 2)
    with torch.no_grad():
        assert torch.equal(model(batch.support, batch.query, 3), made[0].eval()(batch.support, batch.query, 3))


# What is kept


@pytest.mark.parametrize(
    ("accuracies", "kept", "best"),
    [
        ([0.1], [1], 1),
        ([0.1, 0.2, 0.3, 0.4], [3, 4], 4),
        ([0.4, 0.3, 0.2, 0.1], [1, 3, 4], 1),
        ([0.1, 0.4, 0.2, 0.3, 0.3], [2, 4, 5], 2),
        ([0.1, 0.4, 0.4, 0.4, 0.4], [2, 4, 5], 2),  # of equals the earliest
        ([0.4, 0.3, 0.2, 0.5, 0.1], [4, 5], 4),
    ],
)
def test_the_newest_two_and_the_best_are_kept(
    small: Config, tmp_path: Path, accuracies: list[float], kept: list[int], best: int
) -> None:
    save(tmp_path, small, build(small), *enumerate(accuracies, 1))
    assert steps(tmp_path) == kept
    assert checkpoint.best(tmp_path).name == f"step-{best:08d}"


def test_steps_are_in_the_order_of_numbers(small: Config, tmp_path: Path) -> None:
    made = build(small)
    for step in (999, 1000, 9_999_999):
        tell_apart(made, step)
        save(tmp_path, small, made, (step, 0.1))
        other = build(small, seed=1)
        assert checkpoint.restore(tmp_path, *other).step == step
        assert marked(other) == step


def test_saving_a_step_again_replaces_it(small: Config, tmp_path: Path) -> None:
    made = build(small)
    save(tmp_path, small, made, (4, 0.9))
    tell_apart(made, 4)
    save(tmp_path, small, made, (4, 0.3))
    other = build(small)
    assert checkpoint.restore(tmp_path, *other).val_accuracy == 0.3
    assert marked(other) == 4


# Damage


class Trap:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def truncate(folder: Path) -> None:
    data = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(data[: len(data) // 2])


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "state.pt").read_bytes())
    data[len(data) // 3] ^= 1
    (folder / "state.pt").write_bytes(data)


def halve_json(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text[: len(text) // 2])


def put_code_into(folder: Path) -> None:
    """A pickle that runs code, with a digest that fits: as one who can write into the folder would leave it."""
    trap = folder.parent.parent / "trapped"
    pickle.loads(pickle.dumps(Trap(trap)))  # it would work
    trap.rmdir()
    meta = json.loads((folder / "state.json").read_text())
    torch.save({"model": Trap(trap), "optimizer": {}}, folder / "state.pt")
    meta["sha256"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(meta))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated state.pt": (truncate, r"step-00000008/state\.pt is not the file that was written"),
    "flipped byte": (flip_a_byte, r"step-00000008/state\.pt is not the file that was written"),
    "empty state.pt": (lambda f: (f / "state.pt").write_bytes(b""), r"8/state\.pt is not the file that was"),
    "missing state.pt": (lambda f: (f / "state.pt").unlink(), r"step-00000008 cannot be read .*No such file"),
    "missing state.json": (lambda f: (f / "state.json").unlink(), r"step-00000008/state\.json cannot be read"),
    "half-written json": (halve_json, r"step-00000008/state\.json cannot be read"),
    "another json": (lambda f: (f / "state.json").write_text("[]"), r"8/state\.json cannot be read"),
    "another format": (
        lambda f: (f / "state.json").write_text('{"format": 9}'),
        r"8/state\.json is not of format",
    ),
    "code": (put_code_into, r"step-00000008/state\.pt holds more than tensors"),
}


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, small: Config, tmp_path: Path) -> tuple[Path, str]:
    """A run with checkpoints of the steps 4 and 8, the newer, better one damaged; and what has to be said of it."""
    made = build(small)
    for step in (4, 8):
        tell_apart(made, step)
        save(tmp_path, small, made, (step, step / 10))
    damage, sentence = DAMAGES[request.param]
    damage(tmp_path / "checkpoints" / "step-00000008")
    return tmp_path, sentence


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(small: Config, damaged: tuple[Path, str]) -> None:
    run, sentence = damaged
    made = build(small, seed=1)
    with pytest.warns(UserWarning, match=sentence + r".*; going back to the checkpoint before it$") as told:
        state = checkpoint.restore(run, *made)
    assert len(told) == 1
    assert state == TrainState(4, 0.4, 0.01)
    assert marked(made) == 4
    assert not (run / "trapped").exists()


def test_a_run_goes_on_after_a_damaged_checkpoint(small: Config, damaged: tuple[Path, str]) -> None:
    """Its next checkpoints may be of other steps than the damaged one, where --epochs was changed."""
    run, _ = damaged
    made = build(small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (10, 12, 14):
            save(run, small, made, (step, 0.9))
            assert step in steps(run)
        assert steps(run) == [10, 12, 14]
        assert checkpoint.best(run).name == "step-00000010"


def test_loading_a_damaged_model_is_one_sentence(damaged: tuple[Path, str]) -> None:
    run, sentence = damaged
    with pytest.raises(ValueError, match=sentence + r".*; name another run or train it anew$"):
        checkpoint.load_model(run / "checkpoints" / "step-00000008")
    assert not (run / "trapped").exists()


def test_all_damaged_starts_from_the_beginning(small: Config, tmp_path: Path) -> None:
    for folder in save(tmp_path, small, build(small), (4, 0.4), (8, 0.8)):
        truncate(folder)
    with pytest.warns(UserWarning, match="is not the file") as told:
        assert checkpoint.restore(tmp_path, *build(small)) == TrainState()
    assert ["step-00000008" in str(w.message) for w in told] == [True, False]


def test_a_checkpoint_that_was_being_written_is_none(small: Config, tmp_path: Path) -> None:
    """A process killed while saving leaves its hidden folder, whole or not; it is not used, and goes with the next save."""
    made = build(small)
    (folder,) = save(tmp_path, small, made, (4, 0.4))
    shutil.copytree(folder, folder.with_name(".step-00000008.12345"))
    folder.with_name(".step-00000009.12345").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.restore(tmp_path, *made).step == 4
        assert checkpoint.best(tmp_path) == folder
        save(tmp_path, small, made, (8, 0.4))
    assert steps(tmp_path) == [4, 8]
