"""deploy/: the manifests against the published schemas, their commands against our own parsers, and their versions."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import lgm_dist
from lgm_dist.cli.flags import Flags, parse
from lgm_dist.cluster.connection import prepare_for_ray
from lgm_dist.cluster.jobs import check_paths

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
JOBS = ["rayjob-cpu.yaml", "rayjob-gpu.yaml"]


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def pods(job: Any) -> Iterator[Any]:
    """The pod specs of the head and of the groups of workers."""
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]["spec"]


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    """The published CRD of RayJob, as far as the manifests touch it; the file says where it is from."""
    return jsonschema.Draft202012Validator(json.loads((ROOT / "tests/rayjob-schema.json").read_text()))


@pytest.mark.parametrize("name", JOBS)
def test_a_rayjob_meets_the_published_schema(name: str, schema: jsonschema.Draft202012Validator) -> None:
    schema.validate(load(name))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["spec", "shutdownAfterJobFinish"], True, "'shutdownAfterJobFinish' was unexpected"),
        (["spec", "ttlSecondsAfterFinished"], "600", "'600' is not of type 'integer'"),
        (["spec", "rayClusterSpec", "rayVersion"], 2.6, "2.6 is not of type 'string'"),
        (["spec", "rayClusterSpec", "autoscalerOptions", "upscalingMode"], "Fast", "'Fast' is not one of"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0, "0 is not of type 'string'"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"], None, "None is not of type 'integer'"),
        (
            ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec"],
            {},
            "'containers' is a required property",
        ),
    ],
)
def test_the_schema_finds_what_the_api_server_would_refuse_or_drop(
    path: list[str | int], value: Any, message: str, schema: jsonschema.Draft202012Validator
) -> None:
    job = place = copy.deepcopy(load(JOBS[0]))
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert message in "\n".join(error.message for error in schema.iter_errors(job))


@pytest.mark.parametrize("name", JOBS)
def test_a_rayjob_trains_elastically_as_far_as_its_cluster_grows(name: str) -> None:
    job = load(name)
    python, path, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / Path(path).relative_to("/opt/lgm_dist")).is_file(), "the Dockerfile copies the repository there"
    config = parse(Flags, arguments)[0]
    check_paths(shlex.split(job["spec"]["entrypoint"]))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert (config.run.workers, config.run.max_workers) == (group["minReplicas"], group["maxReplicas"]) == (1, 4)
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    assert str(config.run.cpus_per_worker) == limits["cpu"], "a worker fills its pod"
    assert (config.run.device == "cuda") == (limits.get("nvidia.com/gpu") == "1")
    assert config.run.device != "auto", "the driver, on the head, cannot see what the workers have"
    assert config.run.name == job["metadata"]["name"], "a run made from its settings' names would be shared with others"


@pytest.mark.parametrize("name", JOBS)
def test_runs_and_data_are_on_the_shared_volume_in_every_pod(name: str) -> None:
    job = load(name)
    config = parse(Flags, shlex.split(job["spec"]["entrypoint"])[2:])[0]
    claim = load("storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(job):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert Path(config.run.storage).is_relative_to("/shared")
        assert Path(config.data.root).is_relative_to("/shared")
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert "emptyDir" in mounts[environment["LGM_DIST_CACHE"]], "each pod decodes once, on its own disk"


def test_the_wandb_key_comes_from_a_secret_and_is_written_nowhere() -> None:
    for name in JOBS:
        job = load(name)
        head, *_ = pods(job)
        (key,) = [e for e in head["containers"][0]["env"] if e["name"] == "WANDB_API_KEY"]
        assert key["valueFrom"]["secretKeyRef"] == {"name": "wandb", "key": "api-key", "optional": True}
        assert "WANDB" not in job["spec"]["entrypoint"]
    assert "WANDB_API_KEY" not in (DEPLOY / "Dockerfile").read_text() + (DEPLOY / "ray-cluster.yaml").read_text()


def test_versions_are_the_pinned_ones() -> None:
    day = tomllib.loads((ROOT / "uv.toml").read_text())["exclude-newer"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:00:00Z", day), "so that these are the same next year"
    images = {container["image"] for name in JOBS for pod in pods(load(name)) for container in pod["containers"]}
    images.add(load("ray-cluster.yaml")["docker"]["image"])
    assert images == {f"REGISTRY/lgm-dist:{lgm_dist.__version__}"}
    assert {load(name)["spec"]["rayClusterSpec"]["rayVersion"] for name in JOBS} == {version("ray")}


def test_the_image_holds_what_the_manifests_run() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert any(re.fullmatch(r"FROM python:3\.11-slim\S*", line) for line in lines)
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "uv.toml", "README.md", "LICENSE", "lgm_dist", "scripts", "tune"}
    assert all((ROOT / name).exists() for name in copied)


class TestCluster:
    @pytest.fixture
    def cluster(self) -> Any:
        return load("ray-cluster.yaml")

    def check(self, cluster: Any) -> None:
        """What `ray up` does first, with the schema that ships inside Ray."""
        prepare_for_ray()  # for the tests after this one: Ray reads some variables when it is imported
        from ray.autoscaler._private.util import prepare_config, validate_config

        validate_config(prepare_config(cluster))

    def test_it_meets_the_schema_of_ray_up(self, cluster: Any) -> None:
        self.check(cluster)

    def test_ray_finds_mistakes(self, cluster: Any) -> None:
        cluster["available_node_types"]["gpu"]["max_worker"] = 4
        with pytest.raises(jsonschema.ValidationError, match=r"max_worker.* unexpected"):
            self.check(cluster)

    def test_nodes_of_both_kinds_come_and_go_and_the_head_trains_nothing(self, cluster: Any) -> None:
        nodes = cluster["available_node_types"]
        assert nodes[cluster["head_node_type"]]["resources"] == {"CPU": 0}
        for name, resources in [("cpu", {"CPU": 4}), ("gpu", {"CPU": 4, "GPU": 1})]:
            assert nodes[name]["resources"] == resources
            assert (nodes[name]["min_workers"], nodes[name]["max_workers"]) == (0, 4)
        assert cluster["max_workers"] == 8
        assert cluster["idle_timeout_minutes"] > 0

    def test_its_container_sees_the_shared_volume(self, cluster: Any) -> None:
        assert "-v /mnt/shared:/shared" in cluster["docker"]["run_options"]
        assert any(
            "mount -t nfs4" in line and line.endswith("/mnt/shared") for line in cluster["initialization_commands"]
        )

    def test_the_command_in_its_head_comment_is_one_that_submit_takes(self) -> None:
        text = (DEPLOY / "ray-cluster.yaml").read_text()
        match = re.search(r"#   lgm-dist submit -- (.*)\n# +(--workers.*)\n", text)
        assert match
        entrypoint = shlex.split(" ".join(match.groups()))
        check_paths(entrypoint)
        config = parse(Flags, entrypoint[2:])[0]
        assert (config.run.cpus_per_worker, config.run.device, config.run.max_workers) == (4, "cuda", 4)
