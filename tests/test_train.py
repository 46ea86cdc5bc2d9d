"""`fit` in this process and under Ray Train: it resumes, refuses, and gives equal bits for equal runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from head_node import listening_sockets
from test_scripts import run as run_script

from lgm_dist.cluster.connection import disconnect, start_local_ray
from lgm_dist.cluster.fit import fit
from lgm_dist.cluster.processes import descendants
from lgm_dist.config import Config
from lgm_dist.errors import RunFailed
from lgm_dist.runs.folder import read_result
from lgm_dist.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "speed/episodes_per_s", "memory/peak_bytes"}


def config(tiny: Path, storage: Path, **changes: Any) -> Config:
    """12 steps of 4 episodes of a narrow network, evaluated every 4 steps. It trains in a second."""
    small = {"ways": 3, "query": 2, "epochs": 1, "steps_per_epoch": 12, "meta_batch": 4, "eval_every": 4, "workers": 0}
    counts = {"eval_episodes": 10, "test_episodes": 20, "eval_query": 3}
    places = {"data": str(tiny), "storage": str(storage), "name": "run", "model": {"filters": 8}}
    return Config.from_dict(small | counts | places | changes)


def history(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times and memory."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(run)]


def digests(run: Path) -> dict[str, str]:
    """sha256 of the tensors of each checkpoint."""
    return {
        p.parent.name: json.loads(p.read_text())["files"]["state.pt"] for p in run.glob("checkpoints/step-*/state.json")
    }


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(config(tiny, tmp_path_factory.mktemp("finished")))


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    assert Config.from_dict(json.loads((finished / "config.json").read_text())).episodes.ways == 3
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "val/accuracy" in row] == [4, 8, 12]
    keys = {"train/loss", "train/accuracy", "optim/lr", "optim/grad_norm", "seconds", "step"} | TIMES
    assert all(keys <= row.keys() for row in rows)
    result = read_result(finished)
    assert result["train/episodes"] == 48
    assert result["test/episodes"] == 20
    best = max((row for row in rows if "val/accuracy" in row), key=lambda row: row["val/accuracy"])
    assert (result["step"], result["val/accuracy"]) == (best["step"], best["val/accuracy"])
    assert 100e6 < result["memory/peak_bytes"] < 8e9
    for name in ("curves.png", "episode.png", "confusion.png", "weights.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_two_runs_with_one_seed_give_equal_bits_and_another_seed_does_not(
    finished: Path, tiny: Path, tmp_path: Path
) -> None:
    again = fit(config(tiny, tmp_path))
    assert history(again) == history(finished)
    assert digests(again) == digests(finished)
    other = fit(config(tiny, tmp_path / "other", seed=1))
    assert history(other)[0]["train/loss"] != history(finished)[0]["train/loss"]


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(finished: Path, tiny: Path, tmp_path: Path) -> None:
    first = fit(config(tiny, tmp_path, steps_per_epoch=4, epochs=1))
    assert len(read_metrics(first)) == 4
    resumed = fit(config(tiny, tmp_path, steps_per_epoch=4, epochs=3))
    assert history(resumed) == history(finished)
    assert digests(resumed) == digests(finished)


def test_a_run_is_refused_while_it_is_trained_and_resumed_with_the_same_bits_when_killed(
    tiny: Path, tmp_path: Path
) -> None:
    whole = fit(config(tiny, tmp_path / "whole", steps_per_epoch=48, eval_every=12))
    flags: dict[str, Any] = {
        "ways": 3,
        "query": 2,
        "epochs": 1,
        "steps-per-epoch": 48,
        "meta-batch": 4,
        "eval-every": 12,
    }
    flags |= {"workers": 0, "eval-episodes": 10, "test-episodes": 20, "eval-query": 3, "data": tiny, "name": "run"}
    flags |= {"model.filters": 8}
    command = [sys.executable, str(ROOT / "scripts/train.py"), *(f"--{k}={v}" for k, v in flags.items())]
    command.append(f"--storage={tmp_path / 'killed'}")
    killed = tmp_path / "killed" / "run"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(read_metrics(killed)) < 15:
        time.sleep(0.01)
    owner = rf"run 'run' in storage .*/killed is being trained by process {process.pid} on {socket.gethostname()}; "
    before = (killed / "config.json").read_bytes()
    with pytest.raises(ValueError, match=owner + "wait for it, stop it, or give another --name"):
        fit(config(tiny, tmp_path / "killed", steps_per_epoch=48, eval_every=12, max_failures=7))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must not end before it is killed"
    assert (killed / "config.json").read_bytes() == before
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| run" in resumed.stdout
    assert str(killed / "curves.png") in resumed.stdout
    assert history(killed) == history(whole)
    assert digests(killed) == digests(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_of_its_last_step(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    """Resumed, it ends with the bits of an undisturbed run, although it stopped between two evaluations."""
    whole = fit(config(tiny, tmp_path / "whole", steps_per_epoch=60, eval_every=30))
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, str(tiny), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT / "tests",
    )
    run = tmp_path / "run"
    while process.poll() is None and len(read_metrics(run)) < 5:
        time.sleep(0.005)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    stopped = len(read_metrics(run))
    assert process.returncode == 1, error
    assert f"stopped with a checkpoint of step {stopped}; the same command goes on from it" in error
    assert 5 <= stopped < 30
    assert list(digests(run)) == [f"step-{stopped:08d}"]
    resumed = fit(config(tiny, tmp_path, steps_per_epoch=60, eval_every=30))
    assert history(resumed) == history(whole)
    assert digests(resumed).items() >= digests(whole).items()


STOPPABLE = """
import sys
from pathlib import Path
from test_train import config, fit
from lgm_dist.errors import RunFailed
import torch
torch.set_num_threads(1)
try:
    fit(config(Path(sys.argv[1]), Path(sys.argv[2]), steps_per_epoch=60, eval_every=30))
except RunFailed as error:
    sys.exit(str(error))
"""


def test_a_name_taken_by_another_configuration_is_refused(finished: Path, tiny: Path) -> None:
    before = (finished / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"run 'run' was started with lr 0\.001, not 0\.01; give another --name"):
        fit(config(tiny, finished.parent, lr=0.01))
    assert (finished / "config.json").read_bytes() == before


def test_too_many_ways_and_too_few_images_are_refused_before_anything_is_made(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"20 ways need 20 classes, split train of 'tiny' has 6"):
        fit(config(tiny, tmp_path, ways=20))
    with pytest.raises(ValueError, match=r"shot \(20\) \+ query \(5\) = 25 images a class.* has 24"):
        fit(config(tiny, tmp_path, shot=20, query=5))
    assert not list(tmp_path.iterdir())


def test_paper_protocol_trains_with_one_query_and_says_that_it_leaks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--protocol=paper", "--workers=0", f"--data={tiny}", f"--storage={tmp_path}", "--ways=3", "--epochs=1"]
    flags += ["--steps-per-epoch=2", "--meta-batch=4", "--eval-episodes=5", "--test-episodes=10", "--model.filters=8"]
    assert run_script("train", flags, monkeypatch) == 0
    assert "LEAKS THE LABEL" in capsys.readouterr().out
    assert read_result(tmp_path / "tiny-3w1s-paper-seed0")["test/episodes"] == 10


@pytest.fixture(scope="module")
def ray_head() -> Iterator[None]:
    """One local Ray for all tests of this file, because its start takes longer than the tests."""
    import torch

    assert not torch.distributed.is_initialized()
    start_local_ray(cpus=2)
    yield
    disconnect()


SLOW = {"lr": 1e-6, "lr_min": 0.0, "cpus_per_worker": 1}
"""With so small a learning rate the losses of one and of two workers stay equal but for rounding."""


@dataclass(frozen=True)
class TwoWorkers:
    """Four steps of two workers."""

    config: Config
    rows: list[dict[str, Any]]
    world_size: int
    sockets: set[tuple[str, int]]


@pytest.fixture(scope="module")
def two_workers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoWorkers:
    """An elastic run, trained as if Ray had none of the names in ray_internals: it would not call the overrides."""
    from lgm_dist.cluster import ray_internals  # here, because it loads Ray

    elastic = config(tiny, tmp_path_factory.mktemp("two"), workers=1, max_workers=2, steps_per_epoch=4, **SLOW)
    with pytest.MonkeyPatch.context() as patch, listening_workers() as sockets:
        overrides = [name for name in vars(ray_internals.LeanTrainer) if name.startswith("_") and name[1] != "_"]
        assert overrides
        for name in overrides:
            patch.delattr(ray_internals.LeanTrainer, name)
        patch.setattr(ray_internals, "FixedScalingPolicy", object)
        run = fit(elastic)
    return TwoWorkers(elastic, history(run), read_facts(run)["world_size"], sockets)


@pytest.fixture(scope="module")
def one_process(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of twelve steps in this process."""
    return history(fit(config(tiny, tmp_path_factory.mktemp("one"), **SLOW)))


def read_facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "facts.json").read_text())


def assert_equal_losses(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert abs(our["train/loss"] - their["train/loss"]) <= 1e-5
        assert (our["step"], our.keys()) == (their["step"], their.keys())


@contextmanager
def listening_workers() -> Iterator[set[tuple[str, int]]]:
    """Collect the sockets on which Ray Train workers listen meanwhile. Ray's other processes listen before they train."""
    sockets, over = set[tuple[str, int]](), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            workers = [pid for pid, name in descendants(os.getpid()).items() if name.startswith("ray::RayTrainWorker")]
            sockets.update(listening_sockets(workers))

    thread = threading.Thread(target=watch)
    thread.start()
    yield sockets
    over.set()
    thread.join()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_head")
class TestUnderRay:
    def test_every_socket_of_a_local_ray_is_on_loopback(self) -> None:
        """No other machine reaches the GCS, the raylet, the dashboard and their agents."""
        sockets = listening_sockets(descendants(os.getpid()))
        assert len(sockets) >= 5
        assert {address for address, _ in sockets} <= {"127.0.0.1", "::1"}

    def test_two_workers_take_the_steps_of_one_without_private_names_of_ray(
        self, two_workers: TwoWorkers, one_process: list[dict[str, Any]]
    ) -> None:
        assert two_workers.world_size == 2, "as many workers as there is room for"
        assert_equal_losses(two_workers.rows, one_process[:4])

    def test_workers_listen_on_loopback_only(self, two_workers: TwoWorkers) -> None:
        assert len(two_workers.sockets) >= 3, "the store of rank 0, and gloo in both"
        assert {address for address, _ in two_workers.sockets} == {"127.0.0.1"}

    def test_ctrl_c_ends_a_run_of_workers_with_a_checkpoint_of_its_last_step(self, tiny: Path, tmp_path: Path) -> None:
        """Ray sets handlers of its own for SIGINT."""

        def interrupt() -> None:
            while len(read_metrics(tmp_path / "run")) < 10:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(
            RunFailed, match=r"^stopped with a checkpoint of step \d+; the same command goes on from it$"
        ):
            fit(config(tiny, tmp_path, workers=1, cpus_per_worker=1, steps_per_epoch=4000, eval_every=4000))
        rows = read_metrics(tmp_path / "run")
        assert 10 <= len(rows) < 4000
        assert list(digests(tmp_path / "run")) == [f"step-{len(rows):08d}"]

    @pytest.mark.slow
    def test_workers_are_replaced_if_one_dies_in_the_rendezvous(
        self, two_workers: TwoWorkers, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other worker waits for it in the rendezvous. Private names of Ray, used here, change no bit."""
        from lgm_dist.cluster import trainer, worker  # here, because they load Ray

        died = tmp_path / "died"

        def run_worker(job_values: dict[str, Any]) -> str | None:
            import ray.train

            if ray.train.get_context().get_world_rank() == 1 and not died.exists():
                died.touch()
                time.sleep(1)  # rank 0 waits in its broadcast
                os._exit(1)
            return worker.run_worker(job_values)

        monkeypatch.setattr(trainer, "run_worker", run_worker)
        run = fit(config(tiny, tmp_path, workers=2, steps_per_epoch=4, **SLOW))
        assert died.exists()
        assert history(run) == two_workers.rows

    def test_one_worker_goes_on_where_two_stopped(
        self, two_workers: TwoWorkers, one_process: list[dict[str, Any]]
    ) -> None:
        run = fit(two_workers.config.replace(max_workers=0, epochs=3))
        assert_equal_losses(history(run), one_process)
        assert read_result(run)["test/episodes"] == 20
        assert sorted(p.name for p in (run / "checkpoints").glob("step-*"))[-1] == "step-00000012"

    def test_killed_and_hung_workers_are_replaced_and_no_row_is_lost(self, tiny: Path, tmp_path: Path) -> None:
        long = config(tiny, tmp_path, workers=1, cpus_per_worker=1, steps_per_epoch=60, eval_every=10)
        run = tmp_path / "run"
        hit: list[float] = []
        thread = threading.Thread(target=_kill_and_stop_workers, args=(run, 25, 45, hit))
        thread.start()
        fit(long.replace(hang_seconds=10, storage_seconds=1))
        thread.join()
        assert len(hit) == 2
        assert [row["step"] for row in read_metrics(run)] == list(range(1, 61))
        alone = fit(long.replace(storage=str(tmp_path / "alone"), workers=0))
        assert history(run) == history(alone)
        assert digests(run) == digests(alone)


def _kill_and_stop_workers(run: Path, kill: int, stop: int, hit: list[float]) -> None:
    """Kill the Ray Train worker once the run has logged `kill` steps, and SIGSTOP its successor after `stop` steps."""
    for steps, number in ((kill, signal.SIGKILL), (stop, signal.SIGSTOP)):
        while len(read_metrics(run)) < steps:
            time.sleep(0.02)
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            name = entry.read_bytes().split(b"\0")[0]
            if name.startswith(b"ray::") and b"TrainWorker" in name:
                os.kill(int(entry.parent.name), number)
                hit.append(time.monotonic())
        time.sleep(0.5)  # until the killed worker writes no more rows
