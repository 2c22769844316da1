"""The cluster files, without a cloud: by Ray's own code, AWS's linter, and an emulated EC2."""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from moto import mock_aws
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.util.metrics import Counter

from pukd_ray.runtime.metrics import LABELS

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
MY_ADDRESS = "203.0.113.7/32"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


@pytest.fixture(scope="module")
def stack() -> Iterator[dict[str, str]]:
    """Outputs of cluster/aws-stack.yaml in an emulated account."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "none")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with mock_aws():
            vpc = boto3.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
            values = {"Vpc": vpc, "MyAddress": MY_ADDRESS, "Lake": "lake", "Runs": "runs"}
            formation = boto3.client("cloudformation")
            formation.create_stack(
                StackName="pukd-ray",
                TemplateBody=(CLUSTER / "aws-stack.yaml").read_text(),
                Capabilities=["CAPABILITY_NAMED_IAM"],
                Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in values.items()],
            )
            (made,) = formation.describe_stacks(StackName="pukd-ray")["Stacks"]
            yield {output["OutputKey"]: output["OutputValue"] for output in made["Outputs"]}


@pytest.fixture(scope="module")
def aws(stack: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """aws.yaml as `ray up` completes it, with the stack's security group."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config, validate_config

    (raw,) = documents("aws.yaml")
    for node_type in raw["available_node_types"].values():
        node_type["node_config"]["SecurityGroupIds"] = [stack["SecurityGroup"]]
    config = prepare_config(raw)
    validate_config(config)
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))  # Ray makes a key pair
        return bootstrap_aws(config)


@pytest.mark.usefixtures("stack")
def test_ec2_accepts_every_node_type(aws: dict[str, Any]) -> None:
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(aws["provider"], aws["cluster_name"])
    ec2 = boto3.client("ec2")
    spot, profiles = set(), {}
    for name, node_type in aws["available_node_types"].items():
        tags = {"ray-node-name": name, "ray-node-type": "worker", "ray-user-node-type": name}
        (node,) = provider.create_node(copy.deepcopy(node_type["node_config"]), tags, 1)
        (described,) = ec2.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"]
        profiles[name] = described["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        if described.get("InstanceLifecycle") == "spot":
            spot.add(name)
        kind = node_type["node_config"]["InstanceType"]
        (facts,) = ec2.describe_instance_types(InstanceTypes=[kind])["InstanceTypes"]
        resources = node_type["resources"]
        gpus = sum(gpu["Count"] for gpu in facts.get("GpuInfo", {"Gpus": []})["Gpus"])
        assert resources.get("GPU", 0) == gpus, kind
        assert resources["CPU"] == (0 if name == "head" else facts["VCpuInfo"]["DefaultVCpus"]), kind
        (disk,) = node_type["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 100  # the image alone has about 20 GB
    assert spot == {"cpu", "gpu"}
    assert profiles == {n: "pukd-ray-head" if n == "head" else "pukd-ray-worker" for n in profiles}


def test_spot_comes_first_and_all_of_it_goes(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    assert types["gpu"]["priority"] > types["gpu_on_demand"]["priority"]
    assert types["gpu"]["resources"] == types["gpu_on_demand"]["resources"]
    assert {t["min_workers"] for t in types.values()} == {0}
    assert aws["idle_timeout_minutes"] <= 10
    assert "RAY_enable_autoscaler_v2=1" in aws["head_start_ray_commands"][-1]  # v1 knows no priorities


def test_nothing_is_open_but_ssh_from_one_address(stack: dict[str, str], aws: dict[str, Any]) -> None:
    import boto3

    (group,) = boto3.client("ec2").describe_security_groups(GroupIds=[stack["SecurityGroup"]])["SecurityGroups"]
    rules = [
        (r["IpProtocol"], r.get("FromPort"), [i["CidrIp"] for i in r["IpRanges"]], len(r["UserIdGroupPairs"]))
        for r in group["IpPermissions"]
    ]
    assert sorted(rules) == [("-1", None, [], 1), ("tcp", 22, [MY_ADDRESS], 0)]
    start = aws["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=" in start


def test_nothing_is_installed_on_a_node(aws: dict[str, Any]) -> None:
    kinds = ("setup_commands", "head_setup_commands", "worker_setup_commands")
    assert {kind: aws[kind] for kind in kinds} == {kind: [] for kind in kinds}


def test_the_raw_file_cannot_be_used_by_accident() -> None:
    """What must be changed is no valid name: AWS refuses it, and never falls back to an open group of Ray's."""
    (raw,) = documents("aws.yaml")
    for node_type in raw["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"] == ["sg-CHANGE-ME"]


@pytest.mark.usefixtures("stack")
def test_nodes_may_do_only_what_they_must() -> None:
    import boto3

    iam = boto3.client("iam")
    (policy,) = iam.list_policies(Scope="Local")["Policies"]
    version = iam.get_policy_version(PolicyArn=policy["Arn"], VersionId=policy["DefaultVersionId"])
    allowed = {
        (action, resource)
        for statement in version["PolicyVersion"]["Document"]["Statement"]
        for action in listed(statement["Action"])
        for resource in listed(statement["Resource"])
    }
    lake = {action for action, resource in allowed if resource.endswith(":::lake/*")}
    assert lake == {"s3:GetObject"}
    assert {action for action, resource in allowed if resource == "*"} == {"ecr:GetAuthorizationToken"}
    assert not any("*" in action for action, _ in allowed)
    worker = iam.list_attached_role_policies(RoleName="pukd-ray-worker")["AttachedPolicies"]
    assert [attached["PolicyArn"] for attached in worker] == [policy["Arn"]]
    assert iam.list_role_policies(RoleName="pukd-ray-worker")["PolicyNames"] == []


def test_awss_linter_finds_nothing_in_the_stack() -> None:
    from cfnlint.api import lint

    assert lint((CLUSTER / "aws-stack.yaml").read_text()) == []


def test_rays_autoscaler_reads_the_kubernetes_cluster() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = documents("kuberay.yaml")[0]["spec"]["rayClusterSpec"]
    cluster = {"metadata": {"name": "pukd-ray-x7b2k", "namespace": "default"}, "spec": spec}  # as the operator makes it
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert {name: t["resources"].get("CPU") for name, t in types.items()} == {"headgroup": 0, "cpu": 15, "gpu": 15}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert {t["min_workers"] for t in types.values()} == {0}
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"]["cpu"] == group["rayStartParams"]["num-cpus"]


def test_a_job_ends_its_cluster_starts_again_and_can_wait_in_a_queue() -> None:
    """What KubeRay's and Kueue's admission ask of it: `validation.go` and `rayjob_webhook.go` of the two."""
    job = documents("kuberay.yaml")[0]
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"]  # neither lets a job be suspended without
    assert "clusterSelector" not in job["spec"]  # Kueue leaves such jobs alone
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}  # or it takes no autoscaler
    assert "head" not in [group["groupName"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]


@pytest.mark.parametrize(
    ("number", "folder", "file"),
    [
        (0, "KUBERAY_CRDS", "ray.io_rayjobs.yaml"),
        (2, "PROMETHEUS_CRDS", "monitoring.coreos.com_podmonitors.yaml"),
    ],
)
def test_kubernetes_would_take_every_field(number: int, folder: str, file: str) -> None:
    """No package has the CRDs: name folders of clones, `helm-chart/kuberay-operator/crds` of KubeRay's and
    `example/prometheus-operator-crd` of Prometheus' operator's."""
    if folder not in os.environ:
        pytest.skip(f"{folder} does not name the folder of the operator's CRDs")
    definition = yaml.safe_load((Path(os.environ[folder]) / file).read_text())
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    faults = Draft202012Validator(strict(schema)).iter_errors(documents("kuberay.yaml")[number])
    assert [f"{list(fault.path)}: {fault.message}" for fault in faults] == []


def strict(schema: Any) -> Any:
    """JSON schema of Kubernetes' own, with the fields forbidden that its API server would drop without a word."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(inner) for key, inner in schema.items()}
    return {"additionalProperties": False, **made} if "properties" in schema else made


def test_only_own_pods_the_operator_and_prometheus_get_in() -> None:
    job, policy, monitor = documents("kuberay.yaml")
    own = {"app": "pukd-ray"}
    templates = [job["spec"]["submitterPodTemplate"], *pod_templates(job)]
    assert len(templates) == 4
    assert [template["metadata"]["labels"] for template in templates] == [own] * 4
    assert policy["spec"]["podSelector"]["matchLabels"] == own
    rules = [
        (who["podSelector"]["matchLabels"], [port["port"] for port in rule.get("ports", [])])
        for rule in policy["spec"]["ingress"]
        for who in rule["from"]
    ]
    assert rules == [
        (own, []),
        ({"app.kubernetes.io/name": "kuberay-operator"}, ["dashboard"]),
        ({"app.kubernetes.io/name": "prometheus"}, ["metrics"]),
    ]
    assert monitor["spec"]["selector"]["matchLabels"] == own
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "metrics"}]
    for template in pod_templates(job):
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == 8080
    for group in groups(job):
        assert group["rayStartParams"]["metrics-export-port"] == "8080"


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = job["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pod_templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in groups(job)]


def test_every_process_asks_for_the_token(aws: dict[str, Any]) -> None:
    """tests/test_jobs.py sees what that does, on a real head."""
    assert re.search(r"^ +RAY_AUTH_MODE=token$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert list(aws["file_mounts"]) == ["~/.ray/auth_token"]
    assert documents("kuberay.yaml")[0]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for path in CLUSTER.iterdir():
        assert "disabled" not in path.read_text(), path


def test_versions_are_those_of_the_project() -> None:
    docker = (CLUSTER / "Dockerfile").read_text()
    base = re.search(r"^FROM rayproject/ray:([\d.]+)-py(\d)(\d+)$", docker, re.MULTILINE)
    assert base
    (ray,) = [r for d in PROJECT["dependencies"] if (r := Requirement(d)).name == "ray"]
    assert base[1] in ray.specifier
    assert f"{base[2]}.{base[3]}" in SpecifierSet(PROJECT["requires-python"])
    job = documents("kuberay.yaml")[0]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == base[1]
    files = [job, documents("aws.yaml"), documents("gcp.yaml")]
    images = set(re.findall(r'"image": "[^"]*/([^"/]+)"', json.dumps(files)))
    assert images == {f"pukd_ray:{PROJECT['version']}"}


def test_the_dashboard_draws_every_metric_by_labels_that_it_has() -> None:
    board = json.loads((CLUSTER / "grafana.json").read_text())
    drawn = set()
    for target in (target for panel in board["panels"] for target in panel["targets"]):
        names = re.findall(r"ray_pukd_(\w+)", target["expr"])
        drawn |= set(names)
        own = [metric_labels(name) for name in names]
        assert target["expr"].count('{run="$run"}') == len(names)
        grouped = {label for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(", ")}
        assert all(grouped <= labels for labels in own), target["expr"]
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped, target["legendFormat"]
    assert drawn == {name + "_total" * (kind is Counter) for name, (kind, *_) in LABELS.items()}
    (variable,) = [v for v in board["templating"]["list"] if v["name"] == "run"]
    assert metric_labels(re.search(r"ray_pukd_(\w+), run", variable["definition"])[1])  # type: ignore[index]


def metric_labels(name: str) -> set[str]:
    """Of a metric as Prometheus calls it, without `run`."""
    return set(LABELS[name if name in LABELS else name.removesuffix("_total")][1])
