"""`cluster.yaml`, `docs/rayjob.yaml` and `docs/Dockerfile`, checked with their readers: Ray, EC2, KubeRay, bash.

Nothing here reaches AWS or Kubernetes: Ray's own code runs on the files, EC2 is replaced by botocore's description and
moto's imitation, and a stand-in for `ray` records its arguments.
"""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from patience import HUNG_S

ROOT = Path(__file__).parents[2]
PACKAGES = {"store", "workers", "jobs", "analysis"}
CLUSTER_TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
CLUSTER = yaml.safe_load(CLUSTER_TEXT)
RAYJOB_TEXT = (ROOT / "docs" / "rayjob.yaml").read_text(encoding="utf-8")
RAYJOB = yaml.safe_load(RAYJOB_TEXT)
DOCKERFILE = (ROOT / "docs" / "Dockerfile").read_text(encoding="utf-8")
GROUPS = ("gpu_on_demand", "gpu_spot")
NODE_CONFIGS = {name: kind["node_config"] for name, kind in CLUSTER["available_node_types"].items()}
(TOKEN,) = (path for path in CLUSTER["file_mounts"] if "token" in path)

Place = tuple[str | int, ...]
"""A path in a tree of dicts and lists."""


def paths(tree: Any, above: Place = ()) -> Iterator[Place]:
    """The path of each key and item in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from paths(value, (*above, key))


def at(tree: Any, path: Place) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: Any, path: Place, key: str | None = None, value: Any = None) -> Any:
    """A copy with another key, or another value, at a path."""
    tree = copy.deepcopy(tree)
    parent = at(tree, path[:-1])
    if key is None:
        parent[path[-1]] = value
    else:
        parent[key] = parent.pop(path[-1])
    return tree


def prepared() -> dict[str, Any]:
    """The file after Ray has completed and checked it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(config)
    return config


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


# --- cluster.yaml: Ray's side ---------------------------------------------------------------------------------------


def test_ray_accepts_the_file_and_scales_each_gpu_group_from_zero() -> None:
    types = prepared()["available_node_types"]
    assert set(types) == {"head", *GROUPS}
    for group in GROUPS:
        assert (types[group]["min_workers"], types[group]["max_workers"]) == (0, CLUSTER["max_workers"])
    assert types["head"]["max_workers"] == 0
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"].get("priority", 0), "the cheap ones first"


@pytest.mark.parametrize("path", [path for path in paths(CLUSTER) if len(path) == 1], ids=str)
def test_ray_refuses_a_key_with_a_typo(path: Place) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises((jsonschema.ValidationError, KeyError)):
        validate_config(prepare_config(changed(CLUSTER, path, key=f"{path[-1]}x")))


def test_three_places_are_marked_and_hold_what_a_user_chooses() -> None:
    lines = CLUSTER_TEXT.splitlines()
    marked = [number for number, line in enumerate(lines) if "EDIT" in line and "of" in line]
    assert [re.findall(r"# EDIT (\d) of 3: ", lines[number]) for number in marked] == [["1"], ["2"], ["3"]]
    for number, chosen in zip(marked, (("region:",), ("s3://",), ("max_workers:", "InstanceType:")), strict=True):
        assert all(word in " ".join(lines[number + 1 : number + 8]) for word in chosen)
    assert CLUSTER_TEXT.count(f"{CLUSTER['provider']['region']}") == CLUSTER_TEXT.count("YOUR-BUCKET") == 1
    assert CLUSTER_TEXT.count(NODE_CONFIGS["gpu_spot"]["InstanceType"]) == 1


def test_the_head_is_bootstrapped_and_the_workers_get_its_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own preparations for AWS, against moto's."""
    moto = pytest.importorskip("moto")
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray stores its new SSH key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setattr(aws.time, "sleep", lambda seconds: None)
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        config = AWSNodeProvider.fillout_available_node_types_resources(aws.bootstrap_aws(prepared()))
    types = config["available_node_types"]
    role = config["head_node"]["IamInstanceProfile"]["Arn"].rpartition("/")[2]
    assert [types[group]["node_config"]["IamInstanceProfile"] for group in GROUPS] == [{"Name": role}] * 2
    assert [types[group]["resources"].get("GPU") for group in GROUPS] == [1, 1]
    assert types["head"]["resources"] == {"CPU": 16}
    assert {kind["node_config"]["ImageId"] for kind in types.values()} == {
        CLUSTER["available_node_types"]["head"]["node_config"]["ImageId"]
    }, "Ray's own choice of an image must not come in"
    (policy,) = re.findall(r"--policy-document '(.*?)'", CLUSTER_TEXT.replace("\n#", "\n"), re.DOTALL)
    allowed = {statement["Action"]: statement["Resource"] for statement in json.loads(policy)["Statement"]}
    assert allowed["iam:PassRole"].endswith(f"role/{role}")
    assert "ssm:GetParameters" in allowed
    assert f"--role-name {role} " in CLUSTER_TEXT


# --- cluster.yaml: EC2's side ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_instances() -> Any:
    """The shape of the input of EC2's RunInstances."""
    loaders = pytest.importorskip("botocore.loaders")
    from botocore.model import ServiceModel

    model = ServiceModel(loaders.Loader().load_service_model("ec2", "service-2"))
    return model.operation_model("RunInstances").input_shape


def faults(node_config: dict[str, Any], shape: Any) -> list[str]:
    """Parts that EC2 would reject: unknown names, wrong types, values that are not in an enumeration."""
    from botocore.validate import ParamValidator

    found = [ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape).generate_report()]
    return [fault for fault in [*found, *not_enumerated(node_config, shape)] if fault]


def not_enumerated(value: Any, shape: Any) -> Iterator[str]:
    if shape.type_name == "structure" and isinstance(value, dict):
        for name in value.keys() & shape.members.keys():
            yield from not_enumerated(value[name], shape.members[name])
    elif shape.type_name == "list" and isinstance(value, list):
        for item in value:
            yield from not_enumerated(item, shape.member)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{value!r} is no {shape.name}"


KEYS = [(name, path) for name in NODE_CONFIGS for path in paths(NODE_CONFIGS[name]) if isinstance(path[-1], str)]
VALUES = [(name, path) for name, path in KEYS if not isinstance(at(NODE_CONFIGS[name], path), dict | list)]
FREE = ("ImageId", "DeviceName", "Name")
"""Strings of the user, which EC2's descriptions do not contain."""


@pytest.mark.parametrize("name", NODE_CONFIGS)
def test_ec2_takes_each_node_config(name: str, run_instances: Any) -> None:
    assert faults(NODE_CONFIGS[name], run_instances) == []


@pytest.mark.parametrize(("name", "path"), KEYS, ids=str)
def test_a_typo_in_a_node_config_is_found_at_any_depth(name: str, path: Place, run_instances: Any) -> None:
    assert faults(changed(NODE_CONFIGS[name], path, key=f"{path[-1]}x"), run_instances)


@pytest.mark.parametrize(("name", "path"), VALUES, ids=str)
def test_a_wrong_value_in_a_node_config_is_found(name: str, path: Place, run_instances: Any) -> None:
    value = at(NODE_CONFIGS[name], path)
    wrong = 1 if path[-1] in FREE else f"{value}x"
    assert faults(changed(NODE_CONFIGS[name], path, value=wrong), run_instances)


def test_the_image_is_the_regions_own_and_the_disk_holds_the_checkpoint() -> None:
    for node_config in NODE_CONFIGS.values():
        assert node_config["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")
        (disk,) = node_config["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 2 * 93


# --- cluster.yaml: the machines' side -------------------------------------------------------------------------------


def test_what_is_mounted_is_what_a_job_needs() -> None:
    mounts = {remote: local for remote, local in CLUSTER["file_mounts"].items() if remote != TOKEN}
    assert CLUSTER["file_mounts"][TOKEN] == TOKEN
    assert mounts == {f"~/expert-atlas/{path}": path for path in mounts.values()}
    assert set(mounts.values()) == {*PACKAGES, "Makefile", "requirements.lock", ".env"}
    assert all((ROOT / path).exists() for path in mounts.values() if path != ".env")


def test_the_mounted_token_is_the_one_that_ray_reads(tmp_path: Path) -> None:
    token = tmp_path / TOKEN.removeprefix("~/")
    token.parent.mkdir()
    token.write_text("f" * 32)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token"]
    done = subprocess.run(ray, env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout == "f" * 32, done.stderr


@pytest.mark.parametrize("command", commands(CLUSTER))
def test_each_command_is_bash(command: str) -> None:
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_environment_is_the_locked_one_and_has_ray_and_the_clouds_library() -> None:
    targets = [command.split("make ")[1] for command in CLUSTER["setup_commands"] if "&& make " in command]
    assert len(targets) == 1
    assert subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True).returncode == 0
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"\nray=={version('ray')} " in locked
    assert "\nboto3==" in locked, "the head starts machines with it"


class Machine:
    """A machine's home with a repository, and stand-ins for `ray`, which records its arguments, and `cloud-init`."""

    def __init__(self, home: Path) -> None:
        self.home, self.repository = home, home / "expert-atlas"
        for folder in (home / ".ray", home / "bin", self.repository / ".venv" / "bin"):
            folder.mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text("token")
        (self.repository / ".env").write_text("HF_TOKEN=secret\n")
        note = f'echo "$PWD" > {home}/started; printf "%s\\0" "$@" > {home}/arguments; env -0 > {home}/environment'
        note += f"; command -v python > {home}/python || true"
        script(self.repository / ".venv" / "bin" / "ray", note)
        script(self.repository / ".venv" / "bin" / "python", f'exec {sys.executable} "$@"')
        script(home / "bin" / "cloud-init", 'test "$*" = "query region" && echo eu-west-1')

    def run(self, command: str) -> None:
        """Run a command like Ray's updater, with the variables that it adds."""
        from ray.autoscaler._private.util import with_envs

        (command,) = with_envs([command], {"RAY_HEAD_IP": "10.0.0.1"})
        environment = {"HOME": str(self.home), "PATH": f"{self.home}/bin:/usr/bin:/bin"}
        subprocess.run(["bash", "-c", command], env=environment, cwd=self.home, check=True, timeout=HUNG_S)

    @property
    def arguments(self) -> list[str]:
        return (self.home / "arguments").read_text().split("\0")[:-1]

    @property
    def environment(self) -> dict[str, str]:
        variables = (self.home / "environment").read_text().split("\0")[:-1]
        return dict(variable.split("=", 1) for variable in variables)


def script(path: Path, code: str) -> None:
    path.write_text(f"#!/bin/bash\n{code}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home")


def started(machine: Machine, kind: str) -> dict[str, Any]:
    """The arguments of `ray start` on a head or a worker, read by Ray's own parser."""
    from ray.scripts.scripts import start

    for command in CLUSTER["head_setup_commands"] if kind == "head" else ():
        machine.run(command)
    for command in CLUSTER[f"{kind}_start_ray_commands"]:
        machine.run(command)
    assert machine.arguments[0] == "start"
    parameters = start.make_context("start", machine.arguments[1:]).params
    assert parameters["disable_usage_stats"]
    return dict(parameters)


def test_the_head_starts_in_the_repository_with_token_store_and_loopback_dashboard(machine: Machine) -> None:
    config = prepared()
    for group in GROUPS:  # as filled in by Ray for a type with four GPUs
        config["available_node_types"][group]["resources"] = {"CPU": 48, "GPU": 4}
    (machine.home / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    parameters = started(machine, "head")
    assert parameters["head"]
    assert parameters["dashboard_host"] == "127.0.0.1"
    assert parameters["autoscaling_config"] == "~/ray_bootstrap_config.yaml", "where Ray puts it"
    environment = machine.environment
    assert environment["EXPERT_ATLAS_STORE"].startswith("s3://YOUR-BUCKET/")
    assert environment["EXPERT_ATLAS_DEVICE"] == "cuda", "a head without a GPU plans for workers that have one"
    assert environment["EXPERT_ATLAS_WORKERS"] == str(4 * CLUSTER["max_workers"]), "else it never asks for a second"
    assert_a_node_of_the_cluster(machine)


def test_a_worker_joins_the_head_with_the_same_token(machine: Machine) -> None:
    parameters = started(machine, "worker")
    assert not parameters["head"]
    (port,) = re.findall(r"--port=(\d+)", CLUSTER["head_start_ray_commands"][-1])
    assert parameters["address"] == f"10.0.0.1:{port}"
    assert_a_node_of_the_cluster(machine)


def assert_a_node_of_the_cluster(machine: Machine) -> None:
    environment = machine.environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert (machine.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert (machine.repository / ".env").stat().st_mode & 0o777 == 0o600
    assert (environment["HF_TOKEN"], environment["AWS_REGION"]) == ("secret", "eu-west-1")
    assert (machine.home / "started").read_text().strip() == str(machine.repository)
    assert (machine.home / "python").read_text().strip() == str(machine.repository / ".venv/bin/python")


@pytest.mark.parametrize("missing", [".ray/auth_token", "bin/cloud-init", "expert-atlas/.env"])
def test_a_machine_that_lacks_something_starts_nothing(machine: Machine, missing: str) -> None:
    (machine.home / missing).unlink()
    with pytest.raises(subprocess.CalledProcessError):
        machine.run(CLUSTER["worker_start_ray_commands"][-1])
    assert not (machine.home / "arguments").exists()


# --- The comments ---------------------------------------------------------------------------------------------------

SAID = [line.removeprefix("#").split(" # ")[0] for line in CLUSTER_TEXT.splitlines() if line.startswith("#   ")]
SAID = [part.strip() for line in SAID for part in line.split("&&")]


@pytest.mark.parametrize("said", [said for said in SAID if said.startswith("ray ")])
def test_rays_commands_in_the_comments_exist(said: str) -> None:
    from ray.scripts.scripts import cli

    command: click.Command = cli
    arguments = shlex.split(said.split("  ")[0])[1:]
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(click.Context(command), arguments)
        assert command is not None, name
    parameters = command.make_context(command.name, arguments).params
    assert parameters.get("cluster_config_file", "cluster.yaml") == "cluster.yaml"
    if "entrypoint" in parameters:
        assert_captures(list(parameters["entrypoint"]))


def assert_captures(command: list[str]) -> None:
    from jobs.capturing.options import parse_capture

    assert command[:2] == ["python", "jobs/capture.py"]
    config = parse_capture(command[2:])
    assert config.dataset == ("wikitext-103",)
    assert not config.local


def test_the_comments_show_how_to_start_submit_and_end() -> None:
    verbs = [said.split()[1] for said in SAID if said.startswith("ray ")]
    assert verbs == ["get-auth-token", "up", "dashboard", "job", "attach", "down"]
    (resubmit,) = [said for said in SAID if said.startswith("python jobs/resubmit.py")]
    assert_captures(shlex.split(resubmit.split(" -- ")[1].split("  ")[0]))


@pytest.mark.parametrize("text", [CLUSTER_TEXT, RAYJOB_TEXT], ids=["cluster", "rayjob"])
def test_our_variables_are_read_by_the_jobs(text: str) -> None:
    names = set(re.findall(r"EXPERT_ATLAS_\w+", text))
    assert names == {f"EXPERT_ATLAS_{name}" for name in ("STORE", "DEVICE", "WORKERS")}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "jobs").rglob("*.py"))
    assert {name for name in names if f'"{name}"' not in code} == set()


# --- docs/rayjob.yaml -----------------------------------------------------------------------------------------------

# The names that it may use, from KubeRay 1.6 (ray-operator/apis/ray/v1: rayjob_types.go, raycluster_types.go) and
# Kubernetes' core/v1. A dict holds an object's names; [dict] a list of objects; None a value.
CONTAINER = {
    "name": None,
    "image": None,
    "envFrom": [{"secretRef": {"name": None}}],
    "env": [{"name": None, "value": None}],
    "resources": {kind: {"cpu": None, "memory": None, "nvidia.com/gpu": None} for kind in ("limits", "requests")},
    "volumeMounts": [{"name": None, "mountPath": None}],
}
POD = {"spec": {"containers": [CONTAINER], "volumes": [{"name": None, "emptyDir": {"sizeLimit": None}}]}}
GROUP = {"rayStartParams": {}, "template": POD}
NAMES = {
    "apiVersion": None,
    "kind": None,
    "metadata": {"name": None},
    "spec": {
        "entrypoint": None,
        "backoffLimit": None,
        "shutdownAfterJobFinishes": None,
        "rayClusterSpec": {
            "rayVersion": None,
            "authOptions": {"mode": None},
            "enableInTreeAutoscaling": None,
            "autoscalerOptions": {"idleTimeoutSeconds": None},
            "headGroupSpec": GROUP,
            "workerGroupSpecs": [{"groupName": None, "minReplicas": None, "maxReplicas": None, **GROUP}],
        },
    },
}


def unknown(tree: Any, names: Any) -> list[str]:
    """Names in a tree that its kind does not have."""
    if isinstance(tree, list):
        return [name for item in tree for name in unknown(item, names[0])]
    if not isinstance(tree, dict):
        return [] if names is None else [f"{tree!r} in place of {names}"]
    wrong = [name for name in tree if name not in names]
    return wrong + [name for key in tree.keys() & names.keys() for name in unknown(tree[key], names[key])]


def test_kuberay_knows_every_name_of_the_job() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert unknown(RAYJOB, NAMES) == []


@pytest.mark.parametrize("path", [path for path in paths(RAYJOB) if isinstance(path[-1], str)], ids=str)
def test_a_typo_in_the_job_is_found_at_any_depth(path: Place) -> None:
    assert unknown(changed(RAYJOB, path, key=f"{path[-1]}x"), NAMES)


def test_rays_autoscaler_reads_a_head_that_plans_and_gpu_workers_from_zero() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = copy.deepcopy(RAYJOB["spec"]["rayClusterSpec"])
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "a", "namespace": "b"}, "spec": spec})
    head, gpu = (config["available_node_types"][name] for name in ("headgroup", "gpu"))
    assert (head["resources"]["CPU"], head["resources"].get("GPU")) == (16, None)
    assert (gpu["resources"]["GPU"], gpu["min_workers"], gpu["max_workers"]) == (1, 0, 8)
    assert config["idle_timeout_minutes"] == CLUSTER["idle_timeout_minutes"]


def test_the_job_is_our_command_resubmitted_with_a_token_and_the_same_image_everywhere() -> None:
    spec = RAYJOB["spec"]
    assert_captures(shlex.split(spec["entrypoint"]))
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["rayVersion"] == version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert {container["image"] for pod in pods for container in pod["containers"]} == {"IMAGE"}
    for pod in pods:
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["envFrom"] == [{"secretRef": {"name": "expert-atlas"}}]
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod.get("volumes", ())}
    head, worker = (pod["containers"][0] for pod in pods)
    assert {"name": "EXPERT_ATLAS_DEVICE", "value": "cuda"} in head["env"]
    replicas = str(cluster["workerGroupSpecs"][0]["maxReplicas"])  # Kubernetes accepts variables only as strings
    assert {"name": "EXPERT_ATLAS_WORKERS", "value": replicas} in head["env"]
    assert {"name": "HF_HOME", "value": worker["volumeMounts"][0]["mountPath"]} in worker["env"]
    assert "kubectl create secret generic expert-atlas --from-literal=EXPERT_ATLAS_STORE=" in RAYJOB_TEXT


def test_the_image_holds_what_a_job_needs_and_its_python_comes_first() -> None:
    copied = [path for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()]
    assert set(copied) == {*PACKAGES, "Makefile", "requirements.lock"}
    assert all((ROOT / path).exists() for path in copied)
    (folder,) = re.findall(r"^WORKDIR (.*)$", DOCKERFILE, re.MULTILINE)
    assert f"PATH={folder}/.venv/bin:$PATH" in DOCKERFILE
    assert "make .venv/ready" in DOCKERFILE
