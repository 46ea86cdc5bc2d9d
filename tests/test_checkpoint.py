"""Checkpoints: bit-equal continuation, what is kept, and every way in which one can be damaged."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.steps import train_step
from torch import Tensor

from lgm_dist.config import Config
from lgm_dist.data import open_bank, sample_episodes
from lgm_dist.model import LGMNet
from lgm_dist.runs import checkpoint
from lgm_dist.runs.checkpoint import TrainState
from lgm_dist.training.evaluation import Evaluation, Score
from lgm_dist.training.schedule import make_optimizer

Run = tuple[LGMNet, torch.optim.Optimizer]


def restore(run: Path, model: LGMNet, optimizer: torch.optim.Optimizer) -> TrainState:
    """Loads the newest whole checkpoint into both; its state."""
    return checkpoint.restore(run, model, lambda _: optimizer)[0]


def build(config: Config, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = LGMNet(config.model)
    return model, make_optimizer(model, config)


def train(config: Config, run: Run, start: int, stop: int) -> list[Tensor]:
    """What train_step returns for each of the steps start .. stop - 1."""
    bank = open_bank(config.data.name, "train")
    batches = (
        sample_episodes(bank, config, "train", s * config.episodes.meta_batch, config.episodes.meta_batch)
        for s in range(start, stop)
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
        made[0].backbone.convs[0].bias.fill_(step)  # type: ignore[attr-defined]


def marked(made: Run) -> float:
    return float(made[0].backbone.convs[0].bias.detach()[0])  # type: ignore[attr-defined]


# Continuation


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_resumed_run_ends_with_the_same_bits(small: Config, tmp_path: Path, weight_decay: float) -> None:
    config = small.replace(weight_decay=weight_decay, lr_decay_steps=2)
    straight = build(config)
    losses = train(config, straight, 0, 7)

    first = build(config)
    before = train(config, first, 0, 4)
    checkpoint.save(tmp_path, TrainState(4, 0.5, 0.1), *first, config)
    second = build(config, seed=99)
    state = restore(tmp_path, *second)
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
        assert restore(tmp_path, *made) == TrainState(step=0, val_accuracy=-1.0)
    assert bits([made[0].state_dict(), made[1].state_dict()]) == before
    with pytest.raises(ValueError, match=r"has no checkpoint; train it with lgm-dist train first$"):
        checkpoint.best(tmp_path)


def test_files_of_a_checkpoint(small: Config, tmp_path: Path) -> None:
    (folder,) = save(tmp_path, small, build(small), (1000, 0.25))
    assert folder == tmp_path / "checkpoints" / "step-00001000"
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.pt"]
    meta = json.loads((folder / "state.json").read_text())
    assert meta["state"] == {"step": 1000, "val_accuracy": 0.25, "val_ci95": 0.01, "stage": 0}
    assert Config.from_dict(meta["config"]) == small
    assert meta["format"] == 2
    assert meta["files"] == {"state.pt": hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()}


def test_load_model(small: Config, tmp_path: Path) -> None:
    made = build(small)
    train(small, made, 0, 2)
    (folder,) = save(tmp_path, small, made, (2, 0.4))
    model, config, state = checkpoint.load_model(folder)
    assert (config, state) == (small, TrainState(2, 0.4, 0.01))
    assert not any(module.training for module in model.modules())
    assert bits(model.state_dict()) == bits(made[0].state_dict())
    batch = sample_episodes(open_bank(small.data.name, "val"), small, "val", 0, 2)
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
        assert restore(tmp_path, *other).step == step
        assert marked(other) == step


def test_saving_a_step_again_replaces_it(small: Config, tmp_path: Path) -> None:
    made = build(small)
    save(tmp_path, small, made, (4, 0.9))
    tell_apart(made, 4)
    save(tmp_path, small, made, (4, 0.3))
    other = build(small)
    assert restore(tmp_path, *other).val_accuracy == 0.3
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


def forge(folder: Path, **changes: Any) -> None:
    """state.json as one who can write into the folder would leave it: changed, with all digests right."""
    record = json.loads((folder / "state.json").read_text()) | changes
    del record["digest"]
    record["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in record["files"]}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(record | {"digest": digest}))


def put(folder: Path, content: Any) -> None:
    """Makes `content` the checkpoint's tensors."""
    torch.save(content, folder / "state.pt")
    forge(folder)


def put_code_into(folder: Path) -> None:
    trap = folder.parent.parent / "trapped"
    pickle.loads(pickle.dumps(Trap(trap)))  # it would work
    trap.rmdir()
    put(folder, {"model": Trap(trap), "optimizer": {}})


def put_a_plain_pickle_into(folder: Path) -> None:
    """Of before torch's zip files, which are read by other code."""
    (folder / "state.pt").write_bytes(pickle.dumps(Trap(folder.parent.parent / "trapped")))
    forge(folder)


def compress(folder: Path) -> None:
    """Sixteen megabytes of zeros in a few kilobytes: it might have been a terabyte."""
    with zipfile.ZipFile(folder / "state.pt") as old:
        contents = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(folder / "state.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in contents.items():
            new.writestr(name, content)
        new.writestr("archive/data/999", bytes(2**24))
    forge(folder)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(folder / "state.pt", weights_only=True)
    edit(content)
    put(folder, content)


def one(tensors: dict[str, Any]) -> str:
    return next(iter(tensors))


def momentum(content: dict[str, Any]) -> dict[str, Any]:
    slots = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(3))
    return {"state": {0: slots | {"step": torch.tensor(1.0)}}, "param_groups": content["optimizer"]["param_groups"]}


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated state.pt": (truncate, r"step-00000008/state\.pt is not the file that was written"),
    "flipped byte": (flip_a_byte, r"step-00000008/state\.pt is not the file that was written"),
    "empty state.pt": (lambda f: (f / "state.pt").write_bytes(b""), r"8/state\.pt is not the file that was"),
    "missing state.pt": (lambda f: (f / "state.pt").unlink(), r"step-00000008 cannot be read .*No such file"),
    "missing state.json": (lambda f: (f / "state.json").unlink(), r"step-00000008/state\.json cannot be read"),
    "half-written json": (halve_json, r"step-00000008/state\.json cannot be read"),
    "another json": (lambda f: (f / "state.json").write_text("[]"), r"8/state\.json cannot be read"),
    "deep json": (lambda f: (f / "state.json").write_text("[" * 200_000), r"8/state\.json cannot be read"),
    "no format": (
        lambda f: (f / "state.json").write_text('{"format": 0}'),
        r"8/state\.json is not the file that was written",
    ),
    "another state": (lambda f: forge(f, state={"steps": 8}), r"8/state\.json cannot be read"),
    "another step": (lambda f: forge(f, state={"step": 9}), r"8/state\.json cannot be read"),
    "no number": (lambda f: forge(f, state={"step": 8, "val_accuracy": "1"}), r"8/state\.json cannot be read"),
    "not finite": (lambda f: forge(f, state={"step": 8, "val_ci95": float("nan")}), r"8/state\.json cannot be read"),
    "no configuration": (lambda f: forge(f, config=[]), r"8/state\.json cannot be read"),
    "code": (put_code_into, r"step-00000008/state\.pt holds more than tensors"),
    "plain pickle": (put_a_plain_pickle_into, r"step-00000008/state\.pt holds more than tensors"),
    "compressed": (compress, r"step-00000008/state\.pt holds more than tensors"),
    "no dictionary": (lambda f: put(f, [1]), r"8/state\.pt does not hold a network's tensors"),
    "no network": (lambda f: put(f, {"optimizer": {}}), r"8/state\.pt does not hold a network's tensors"),
    "no tensors": (lambda f: put(f, {"model": {"a": 1}}), r"8/state\.pt does not hold a network's tensors"),
    "a tensor fewer": (
        lambda f: change(f, lambda c: c["model"].pop(one(c["model"]))),
        r"8/state\.pt does not hold the tensors",
    ),
    "a tensor of another shape": (
        lambda f: change(f, lambda c: c["model"].update({one(c["model"]): torch.zeros(2)})),
        r"8/state\.pt does not hold the tensors",
    ),
    "a tensor that claims memory": (
        lambda f: change(
            f, lambda c: c["model"].update({k: torch.zeros(1).expand(v.shape) for k, v in c["model"].items()})
        ),
        r"8/state\.pt does not hold the tensors",
    ),
}
OF_THE_OPTIMIZER: dict[str, tuple[Callable[[Path], object], str]] = {
    "no optimizer": (
        lambda f: change(f, lambda c: c.pop("optimizer")),
        r"8/state\.pt does not hold a network's tensors",
    ),
    "another optimizer": (
        lambda f: change(f, lambda c: c["optimizer"]["param_groups"][0]["params"].pop()),
        r"8/state\.pt does not hold the tensors",
    ),
    "momentum of another shape": (
        lambda f: change(f, lambda c: c.update(optimizer=momentum(c))),
        r"8/state\.pt does not hold the tensors",
    ),
}
"""What `load_model` does not look at."""


def two_checkpoints(small: Config, run: Path) -> Path:
    """Of the steps 4 and 8, the newer one better; its folder."""
    made = build(small)
    for step in (4, 8):
        tell_apart(made, step)
        save(run, small, made, (step, step / 10))
    return run / "checkpoints" / "step-00000008"


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, small: Config, tmp_path: Path) -> tuple[Path, str]:
    """A run whose newer, better checkpoint of two is damaged; and what has to be said of it."""
    damage, sentence = DAMAGES[request.param]
    damage(two_checkpoints(small, tmp_path))
    return tmp_path, sentence


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(small: Config, damaged: tuple[Path, str]) -> None:
    run, sentence = damaged
    made = build(small, seed=1)
    with pytest.warns(UserWarning, match=sentence + r".*; going back to the checkpoint before it$") as told:
        state = restore(run, *made)
    assert len(told) == 1
    assert state == TrainState(4, 0.4, 0.01)
    assert marked(made) == 4
    assert not (run / "trapped").exists()


@pytest.mark.parametrize("name", OF_THE_OPTIMIZER)
def test_a_damaged_optimizer_is_named_and_the_checkpoint_before_used(small: Config, tmp_path: Path, name: str) -> None:
    damage, sentence = OF_THE_OPTIMIZER[name]
    damage(two_checkpoints(small, tmp_path))
    made = build(small, seed=1)
    with pytest.warns(UserWarning, match=sentence):
        assert restore(tmp_path, *made).step == 4
    assert marked(made) == 4


def test_no_byte_of_a_checkpoint_can_be_cut_off_or_flipped_unseen(small: Config, tmp_path: Path) -> None:
    made = build(small, seed=1)
    folder = two_checkpoints(small, tmp_path)
    for name, every in (("state.json", 7), ("state.pt", 1999)):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole) - 1, every):  # the last byte of state.json is a line feed
            flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            for content in (whole[:place], flipped):
                (folder / name).write_bytes(content)
                with pytest.warns(UserWarning, match=f"step-00000008/{name}.*; going back"):
                    assert restore(tmp_path, *made).step == 4
        (folder / name).write_bytes(whole)
    assert restore(tmp_path, *made).step == 8


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
        assert restore(tmp_path, *build(small)) == TrainState()
    assert ["step-00000008" in str(w.message) for w in told] == [True, False]


def test_a_checkpoint_that_was_being_written_is_none(small: Config, tmp_path: Path) -> None:
    """A process killed while saving leaves its hidden folder, whole or not; it is not used, and goes with the next save."""
    made = build(small)
    (folder,) = save(tmp_path, small, made, (4, 0.4))
    shutil.copytree(folder, folder.with_name(".step-00000008.12345"))
    folder.with_name(".step-00000009.12345").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(tmp_path, *made).step == 4
        assert checkpoint.best(tmp_path) == folder
        save(tmp_path, small, made, (8, 0.4))
    assert steps(tmp_path) == [4, 8]


KILLED = """
import sys
from pathlib import Path
from test_checkpoint import build, save, tell_apart, Config
config, run = Config.from_dict(eval(sys.argv[1])), Path(sys.argv[2])
made = build(config)
print("ready", flush=True)
for step in range(1, 100_000):
    tell_apart(made, step)
    save(run, config, made, (step, 0.1))
"""


def test_a_process_that_is_killed_while_it_saves_leaves_whole_checkpoints(small: Config, tmp_path: Path) -> None:
    """At whatever moment: nothing damaged, at most the newest missing, and the weights are those of their step."""
    command = [sys.executable, "-c", KILLED, repr(small.to_dict()), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    assert process.stdout
    process.stdout.readline()
    made, last, hidden = build(small), 0, 0
    for _ in range(25):
        time.sleep(0.031)
        os.kill(process.pid, signal.SIGSTOP)  # what is on the disk now is what a kill would leave
        os.waitpid(process.pid, os.WUNTRACED)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state = restore(tmp_path, *made)
        assert state.step >= max(last, 1) - 1
        assert marked(made) == state.step
        last, hidden = state.step, hidden + bool(list((tmp_path / "checkpoints").glob(".step-*")))
        os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.wait()
    assert last > 5
    assert hidden, "it was never caught while it was writing"


# Of another configuration, and of other versions


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"channels": 1}, r"it has model\.channels 3, not 1;"),
        ({"filters": 4, "weight_norm": False}, r"it has model\.filters 8, not 4, model\.weight_norm True, not False;"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    small: Config, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    save(tmp_path, small, build(small), (4, 0.4))
    other = small.replace(model=replace(small.model, **changes))
    made = build(other)
    before = bits([made[0].state_dict(), made[1].state_dict()])
    for refuse in (lambda: restore(tmp_path, *made), lambda: checkpoint.check(tmp_path, other, "")):
        with pytest.raises(
            ValueError, match=rf"step-00000004 is of another configuration: {sentence} give another --name"
        ):
            refuse()
    assert bits([made[0].state_dict(), made[1].state_dict()]) == before
    assert steps(tmp_path) == [4]


def test_a_checkpoint_of_another_data_set_is_refused(small: Config, tmp_path: Path) -> None:
    digests = ["a1" * 32, "b2" * 32]
    checkpoint.save(tmp_path, TrainState(4), *build(small), small, data=digests[0])
    checkpoint.check(tmp_path, small, digests[0])
    with pytest.raises(ValueError, match=r"it has the data set's digest 'a1a1a1a1a1a1a1a1', not 'b2b2b2b2b2b2b2b2'"):
        checkpoint.check(tmp_path, small, digests[1])


def test_a_checkpoint_of_a_later_format_is_refused_and_stays(small: Config, tmp_path: Path) -> None:
    forge(two_checkpoints(small, tmp_path), format=3)
    with pytest.raises(ValueError, match=r"step-00000008 has format 3, newer than 2; update lgm_dist$"):
        restore(tmp_path, *build(small))
    assert steps(tmp_path) == [4, 8]


def test_accuracies_that_are_damaged_are_left_out(small: Config, tmp_path: Path) -> None:
    scores = {"mean noise": Score(0.5, 0.1)}
    val = Evaluation("val", "standard", 3, 2, 2, 0, scores, {"mean noise": np.array([0.25, 0.75])})
    folder = checkpoint.save(tmp_path, TrainState.after(4, val), *build(small), small, val)
    assert checkpoint.val_accuracies(folder).tolist() == [0.25, 0.75]  # type: ignore[union-attr]
    np.save(folder / "val.npy", np.array([0.25, 0.5]))
    with pytest.warns(UserWarning, match=r"val\.npy holds no accuracies .*sha256 differs"):
        assert checkpoint.val_accuracies(folder) is None
    np.save(folder / "val.npy", np.array([Trap(tmp_path / "trapped")]), allow_pickle=True)
    forge(folder)
    with pytest.warns(UserWarning, match=r"val\.npy holds no accuracies .*allow_pickle"):
        assert checkpoint.val_accuracies(folder) is None
    assert not (tmp_path / "trapped").exists()
