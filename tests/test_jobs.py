"""Ray jobs on a real head node on loopback: submitted, followed, failing, stopped, resumed; what `lgm-dist submit` refuses."""

from __future__ import annotations

import contextlib
import csv
import http.server
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from head_node import ROOT, Head, free_ports, head_node, listening_sockets, wait_for
from helpers.offline_runs import folders, history, inspect

import lgm_dist
from lgm_dist.cli.main import main
from lgm_dist.cluster.connection import prepare_for_ray
from lgm_dist.cluster.jobs import job_environment, upload_folder
from lgm_dist.cluster.processes import descendants
from lgm_dist.runs.facts import commit
from lgm_dist.runs.metrics import read_metrics

SECRET = "0123456789abcdef-not-a-key"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node() as started:
        yield started


def training(tiny: Path, storage: Path, name: str, **changes: Any) -> list[str]:
    """A command that trains a narrow network on `tiny` with two workers."""
    flags: dict[str, Any] = {
        "ways": 3,
        "query": 2,
        "epochs": 1,
        "steps-per-epoch": 12,
        "meta-batch": 4,
        "eval-every": 4,
        "workers": 2,
    }
    flags |= {"cpus-per-worker": 1, "eval-episodes": 6, "test-episodes": 6, "eval-query": 3, "model.filters": 8}
    flags |= {"data": tiny, "storage": storage, "name": name} | {k.replace("_", "-"): v for k, v in changes.items()}
    return ["python", "-m", "lgm_dist", "train", *(f"--{key}={value}" for key, value in flags.items())]


Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Ask]:
    """`lgm-dist submit` in this process, which is quicker: exit status and all that it prints."""
    prepare_for_ray()  # for the tests after this one: Ray reads some variables when it is imported

    def call(*arguments: str, address: str = "http://127.0.0.1:9") -> tuple[int, str]:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        try:
            monkeypatch.setattr(sys, "argv", ["lgm-dist", "submit", *arguments])
            status = main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, "".join(capsys.readouterr())

    yield call
    logging.disable(logging.NOTSET)


def logs(head: Head, job: str) -> str:
    with urllib.request.urlopen(f"{head.address}/api/jobs/{job}/logs", timeout=5) as reply:
        return str(json.load(reply)["logs"])


@pytest.fixture
def tidy(head: Head) -> Iterator[None]:
    """Ends the jobs that a failed test has left, so that it fails alone."""
    yield
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head.address)
    left = [job.submission_id or "" for job in client.list_jobs() if not job.status.is_terminal()]
    for job in left:
        client.stop_job(job)
    wait_for(lambda: all(client.get_job_status(job).is_terminal() for job in left), 90, "the jobs to stop")


@pytest.mark.ray
@pytest.mark.usefixtures("tidy")
class TestOnAHeadNode:
    def test_a_job_of_two_workers_is_stopped_with_a_checkpoint_and_resumed_to_its_result(
        self, head: Head, tiny: Path, tmp_path: Path, ask: Ask
    ) -> None:
        """Started by Ray's own command, followed, stopped and resumed by `lgm-dist submit`."""
        command = training(tiny, tmp_path, "long", epochs=400, steps_per_epoch=10, eval_every=4000)
        folder, environment = tmp_path / "long", {"WANDB_MODE": "offline", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        plain = ["ray", "job", "submit", "--address", head.address, "--submission-id", "long", "--no-wait"]
        plain += ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": environment}), "--", *command]
        assert head.call(plain, ROOT).returncode == 0
        wait_for(lambda: len(read_metrics(folder)) >= 20, 150, "20 steps")

        follow = [sys.executable, str(ROOT / "scripts/submit.py"), "--address", head.address, "--follow", "long"]
        follower = subprocess.Popen(follow, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert follower.stdout
        follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        errors = follower.communicate(timeout=30)[1].decode()
        assert follower.returncode == 1
        assert errors == "submit.py: job long runs on; --follow long shows its logs again, --stop long ends it\n"
        status, text = ask("--", *command, address=head.address)
        assert status == 1
        assert "name (long): job long is RUNNING; end it with --stop long" in text

        assert ask("--stop", "long", address=head.address) == (0, "long STOPPED Job was intentionally stopped.\n")
        rows = read_metrics(folder)
        assert 20 <= len(rows) < 4000
        saved = [path.parent.name for path in folder.glob("checkpoints/step-*/state.json")]
        assert saved == [f"step-{len(rows):08d}"], "a checkpoint of the last step that was logged"
        assert not (folder / "result.json").exists()

        steps = len(rows) // 10 * 10 + 10
        more = [f"--epochs={steps // 10}" if word == "--epochs=400" else word for word in command]
        done = head.submit("--", *more, WANDB_API_KEY=SECRET, WANDB_MODE="offline")
        assert done.returncode == 0, done.stdout
        assert "job long-2 (" in done.stdout
        assert done.stdout.count("Running entrypoint for job long-2") == 1, "each line of the log comes once"
        assert "| long | standard | 3-way 1-shot |" in done.stdout, "the table that training prints"
        assert done.stdout.endswith("long-2 SUCCEEDED\n")
        again = read_metrics(folder)
        assert again[: len(rows)] == rows
        assert [row["step"] for row in again] == list(range(1, steps + 1))
        result = json.loads((folder / "result.json").read_text())
        assert (result["train/episodes"], result["test/episodes"]) == (4 * steps, 6)
        facts = json.loads((folder / "facts.json").read_text())
        assert (facts["world_size"], facts["commit"]) == (2, commit()), (
            "of this checkout, though the upload has no .git"
        )
        logged = [row["step"] for part in folders(folder) for row in history(inspect(part))]
        assert logged == list(range(1, steps + 1)), (
            f"on W&B every row once, though Ray ends its process too\n{done.stdout}"
        )

        assert SECRET not in done.stdout
        with urllib.request.urlopen(f"{head.address}/api/jobs/long-2", timeout=5) as reply:
            details = json.load(reply)
        assert details["runtime_env"]["env_vars"]["WANDB_MODE"] == "offline"
        assert SECRET not in json.dumps(details), "which whoever reaches the cluster can read"
        assert "WANDB_API_KEY is not passed to the job" in done.stdout

    def test_every_socket_of_the_head_node_is_on_loopback(self, head: Head) -> None:
        wait_for(
            lambda: head.ports <= {port for _, port in listening_sockets(descendants(head.pid))}, 30, "its servers"
        )
        assert {address for address, _ in listening_sockets(descendants(head.pid))} == {"127.0.0.1"}

    def test_upload_variables_logs_and_the_status_of_a_failing_job(self, head: Head, ask: Ask) -> None:
        """The job sees the code and nothing that was made here."""
        code = """if True:
            import os
            print(*sorted(os.path.join(d, f)[2:] for d, _, fs in os.walk(".") for f in fs), sep="\\n")
            print("ways", os.environ["WAYS"], os.environ["FROM_HERE"])
            raise SystemExit(7)"""
        made = [ROOT / "runs/rayignore-test", ROOT / "wandb/rayignore-test"]
        new = [path.parent for path in made if not path.parent.exists()]
        for path in made:
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        try:
            arguments = ["--name", "bad", "--env", "WAYS=5", "--env", "FROM_HERE", "--", "python", "-c", code]
            done = head.submit(*arguments, FROM_HERE="yes")
        finally:
            for path in made:
                path.unlink()
            for folder in new:
                with contextlib.suppress(OSError):  # another test's W&B wrote its log there meanwhile
                    folder.rmdir()
        assert done.returncode == 7, done.stdout
        assert "ways 5 yes\n" in done.stdout
        assert done.stdout.endswith("bad FAILED\n")
        files = {line for line in done.stdout.splitlines() if (ROOT / line.strip()).is_file()}
        assert {"scripts/train.py", "lgm_dist/data/sources/fc100_split.json", "tune/spaces.py"} <= files
        folders = {line.split("/")[0] for line in done.stdout.splitlines() if re.fullmatch(r"[\w.]+/[\w./-]+", line)}
        assert folders == {"lgm_dist", "scripts", "tune"}

        assert ask("--follow", "bad", address=head.address)[0] == 7
        status, text = ask("--no-wait", "--name", "bad", "--", "true", address=head.address)
        assert (status, text.split(" (")[0]) == (0, "job bad-2"), "the name of a job that has ended may be used again"
        assert ask("--follow", "bad-2", address=head.address)[0] == 0
        assert re.search(r"\| bad +\| FAILED +\|.*\n\| bad-2 +\| SUCCEEDED +\|", ask("--list", address=head.address)[1])
        assert ask("--status", "bad-2", address=head.address) == (0, "bad-2 SUCCEEDED Job finished successfully.\n")

    def test_an_unknown_job_is_named(self, head: Head, ask: Ask) -> None:
        for flag in ("--stop", "--status", "--follow"):
            sentence = f"lgm-dist submit: there is no job nobody on {head.address}; --list shows all\n"
            assert ask(flag, "nobody", address=head.address) == (1, sentence)

    def test_a_stopped_job_has_longer_than_rays_three_seconds(self, head: Head, ask: Ask) -> None:
        code = """if True:
            import signal, sys, time
            signal.signal(signal.SIGTERM, lambda *_: (time.sleep(4), print("saved"), sys.exit(0)))
            print("ready")
            time.sleep(100)"""
        assert ask("--no-wait", "--name", "slow", "--", "python", "-c", code, address=head.address)[0] == 0
        wait_for(lambda: "\nready\n" in logs(head, "slow"), 60, "the job to start")
        assert ask("--stop", "slow", address=head.address)[0] == 0
        assert "\nsaved\n" in logs(head, "slow")

    def test_a_sweep_of_two_trials_leaves_its_table(self, head: Head, tiny: Path, tmp_path: Path) -> None:
        flags = [word for word in training(tiny, tmp_path, "swept")[4:] if "workers" not in word]
        search = ["--space=normalization", "--samples=2", "--search=random", "--scheduler=none", "--target-ways=4"]
        done = head.submit("--", "python", "tune/sweep.py", *flags, *search)
        assert done.returncode == 0, done.stdout
        with (tmp_path / "swept/results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["trial"], row["status"], row["last_step"]) for row in rows] == [
            ("0", "finished", "12"),
            ("1", "finished", "12"),
        ]
        for row, trial in zip(rows, sorted((tmp_path / "swept/trials").iterdir()), strict=True):
            accuracies = [step["val/accuracy"] for step in read_metrics(trial) if "val/accuracy" in step]
            assert len(accuracies) == 3
            assert float(row["val_accuracy"]) == pytest.approx(100 * max(accuracies), abs=0.01)


class TestRefused:
    """One sentence and status 1, before anything is uploaded."""

    def test_a_cluster_that_is_not_there(self, ask: Ask) -> None:
        start = time.monotonic()
        address = f"http://127.0.0.1:{free_ports(1)[0]}"
        for arguments in (["--list"], ["--", "true"]):
            status, text = ask("--address", address, *arguments)
            assert status == 1
            assert text.startswith(f"lgm-dist submit: address ({address}): no Ray cluster answers there (")
            assert text.count("\n") == 1
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize(
        ("answer", "sentence"),
        [
            (404, "the server there is not the dashboard of a Ray cluster"),
            (401, "asks for a token; set RAY_AUTH_MODE=token"),
        ],
    )
    def test_a_server_that_does_not_take_jobs(self, answer: int, sentence: str, ask: Ask) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_error(answer)

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            status, text = ask("--list", address=f"http://127.0.0.1:{server.server_port}")
            server.shutdown()
        assert status == 1
        assert sentence in text.splitlines()[-1]

    @pytest.mark.parametrize(
        ("command", "sentence"),
        [
            (
                "lgm-dist train --data /d/a.json",
                "storage (runs) must be an absolute path that all machines of the cluster share",
            ),
            (
                "lgm-dist train --data /d/a.json --storage=mine",
                f"give --storage {Path('mine').absolute()}, for example",
            ),
            (
                "python -m lgm_dist train --data /d/a.json --storage s3://mine/runs",
                "storage (s3://mine/runs) must be an absolute path",
            ),
            ("python scripts/train.py --storage /s", "data-root (data) must be an absolute path"),
            (
                "/usr/bin/lgm-dist grid --storage /s --data birds --data_root sets",
                "data-root (sets) must be an absolute path",
            ),
            ("lgm-dist train --storage /s --data sets/birds.json", "data (sets/birds.json) must be an absolute path"),
            ("lgm-dist sweep --data /d/a.json", "storage (runs) must be an absolute path"),
            ("python tune/sweep.py --data /d/a.json", "storage (runs) must be an absolute path"),
        ],
    )
    def test_places_that_would_be_lost_with_the_upload(self, command: str, sentence: str, ask: Ask) -> None:
        status, text = ask("--", *command.split())
        assert status == 1
        assert sentence in text
        assert text.count("\n") == 1

    @pytest.mark.parametrize(
        "command",
        [
            "lgm-dist train --storage /s --data /d/a.json",
            "python scripts/train.py --storage=/s --data-root=/d",
            "lgm-dist train --storage /s --data https://host/a.json",
            "lgm-dist train --storage /s --config best.json",
            "lgm-dist evaluate /s/run",
            "lgm-dist report train",
        ],
    )
    def test_places_that_are_shared_are_not(self, command: str, ask: Ask) -> None:
        assert "no Ray cluster answers there" in ask("--", *command.split())[1]

    def test_a_checkout_is_uploaded_and_else_the_current_folder(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert upload_folder() == ROOT
        monkeypatch.setattr(lgm_dist, "__file__", str(tmp_path / "site-packages/lgm_dist/__init__.py"))
        assert upload_folder() == tmp_path

    @pytest.mark.parametrize("arguments", [[], ["--list", "--stop", "x"], ["--stop", "x", "--", "true"]])
    def test_none_or_two_things_at_once(self, arguments: list[str], ask: Ask) -> None:
        status, text = ask(*arguments)
        assert (status, text.count("\n")) == (1, 1)
        assert text.startswith("lgm-dist submit: give one of --stop, --status, --follow, --list, or `-- lgm-dist train")

    def test_the_key_of_an_account_is_passed_only_where_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        assert SECRET not in job_environment([]).values()
        assert job_environment([])["WANDB_PROJECT"] == "mine"
        assert job_environment(["WANDB_API_KEY"])["WANDB_API_KEY"] == SECRET

    def test_a_variable_that_is_not_set(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NOT_HERE", raising=False)
        assert ask("--env", "NOT_HERE", "--", "true") == (
            1,
            "lgm-dist submit: env (NOT_HERE) is not set here; give --env NOT_HERE=VALUE\n",
        )
