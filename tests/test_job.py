"""A run's folder before and after its training: the commit, what cannot be written or read."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from test_shards import tiny_source

from lgm_dist.cluster.fit import fit
from lgm_dist.config import Config
from lgm_dist.data.manifest import read_manifest
from lgm_dist.data.shards import write_shards
from lgm_dist.runs.facts import commit, write_facts
from lgm_dist.runs.folder import make_folder, read_config, read_result
from lgm_dist.runs.job import make_job, threads_of
from lgm_dist.training.worker import Worker

ROOT = Path(__file__).parents[1]


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a checkout, git's; where there is no git, as in a Ray job's upload, what submit.py has passed on."""
    monkeypatch.setenv("LGM_DIST_COMMIT", "from-submit")
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert commit().removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "from-submit"
    monkeypatch.delenv("LGM_DIST_COMMIT")
    assert commit() == ""


def test_facts(small: Config, tiny: Path, tmp_path: Path) -> None:
    job = make_job(small.replace(storage=str(tmp_path), name="run", workers=2, cpus_per_worker=3))
    write_facts(job, Worker(rank=0, world_size=2))
    facts = json.loads((tmp_path / "run/facts.json").read_text())
    assert (facts["world_size"], facts["threads"], facts["device"]) == (2, 3, "cpu")
    assert facts["manifest"] == str(tiny)
    assert facts["manifest_digest"] == read_manifest(str(tiny)).digest


def test_another_number_of_workers_is_said_once(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(small.replace(storage=str(tmp_path), name="run"))
    for world_size, step in ((1, 0), (1, 4), (3, 8), (3, 12)):
        write_facts(job, Worker(rank=0, world_size=world_size), step)
    assert capsys.readouterr().err == "world size 1 -> 3 from step 9 on\n"


def test_elastic_workers_share_the_cores_as_if_all_were_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgm_dist.runs.job.os.cpu_count", lambda: 8)
    assert threads_of(Config.of(workers=1, max_workers=4)) == 2
    assert threads_of(Config.of(workers=2)) == 4
    assert threads_of(Config.of(workers=16)) == 1


def test_storage_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"storage \(.*/file\) cannot be written \(Not a directory\); name another folder"
    ):
        make_folder(tmp_path / "file" / "run")
    assert list(make_folder(tmp_path / "new" / "run").iterdir()) == []


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"does not hold a run \(config.json: .*\); name a folder that lgm-dist train has made"
    ):
        read_config(tmp_path)
    for text in ("{", "[1]", '{"lr": "fast"}', '{"nothing": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="does not hold a run"):
            read_config(tmp_path)
    (tmp_path / "result.json").write_text('{"test/acc')
    with pytest.raises(ValueError, match="has no result"):
        read_result(tmp_path)


def test_a_configuration_from_before_a_field_was_there_is_still_that_run(small: Config, tmp_path: Path) -> None:
    """Runs of earlier versions have no eval_ways in their config.json; its default then was no other."""
    config = small.replace(storage=str(tmp_path), name="run")
    job = make_job(config)
    values = json.loads((Path(job.run) / "config.json").read_text())
    del values["episodes"]["eval_ways"], values["episodes"]["eval_shot"], values["run"]["max_workers"]
    (Path(job.run) / "config.json").write_text(json.dumps(values))
    assert make_job(config) == job
    with pytest.raises(ValueError, match="was started with eval_ways 0, not 2"):
        make_job(config.replace(eval_ways=2))


def test_all_differing_fields_of_a_taken_name_are_named_and_nothing_is_changed(small: Config, tmp_path: Path) -> None:
    config = small.replace(storage=str(tmp_path), name="run")
    run = Path(make_job(config).run)
    before = (run / "config.json").read_bytes()
    model = dataclasses.replace(small.model, filters=4)
    with pytest.raises(
        ValueError,
        match=r"started with shot 2, not 1, model\.filters 8, not 4, lr 0\.01, not 0\.1; give another --name",
    ):
        make_job(config.replace(shot=1, lr=0.1, model=model, epochs=9))
    assert (run / "config.json").read_bytes() == before


def test_a_run_whose_data_set_was_made_anew_with_other_images_is_refused(small: Config, tmp_path: Path) -> None:
    images = 12
    data = write_shards(tiny_source(images=(images, images, images)), tmp_path / "data")
    config = small.replace(storage=str(tmp_path), name="run", data=str(data), eval_query=3)
    run = fit(config.replace(steps_per_epoch=2, eval_every=1, test_episodes=0))
    again = config.replace(steps_per_epoch=2, eval_every=1, test_episodes=0, epochs=2)
    make_job(again)
    write_shards(tiny_source(images=(images, images, images + 1)), data.parent)
    with pytest.raises(ValueError, match=r"2 is of another configuration: it has the data set's digest '\w{16}', not"):
        make_job(again)
    assert len(list(run.glob("checkpoints/step-*"))) == 2


@pytest.mark.parametrize("address", ["", "ray://there:1"])
def test_a_gpus_precision_is_refused_on_a_cpu(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """On a cluster too, whose workers get a GPU where the configuration of this process says so."""
    monkeypatch.setenv("RAY_ADDRESS", address or "local")
    config = small.replace(storage=str(tmp_path), precision="tf32", device="cpu", workers=1)
    with pytest.raises(ValueError, match=r"^precision \('tf32'\) needs a GPU, .* use --precision float32$"):
        make_job(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["backbone", "generator", "head"])
def test_an_unknown_part_is_refused_before_anything_is_made(small: Config, tmp_path: Path, part: str) -> None:
    model = dataclasses.replace(small.model, **{part: "resnet99"})
    with pytest.raises(ValueError, match=rf"model\.{part} \('resnet99'\) must be one of "):
        make_job(small.replace(storage=str(tmp_path), model=model))
    assert list(tmp_path.iterdir()) == []


def test_images_of_other_channels_than_the_networks_are_refused(small: Config, tmp_path: Path) -> None:
    model = dataclasses.replace(small.model, channels=1)
    with pytest.raises(
        ValueError, match=r"model\.channels \(1\) must be 3, as the images of 'tiny' have; leave --model"
    ):
        make_job(small.replace(storage=str(tmp_path / "runs"), model=model))
    assert not (tmp_path / "runs").exists()
