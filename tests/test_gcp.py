"""cluster/gcp.yaml, without a cloud: Ray's own code against an emulated API that knows Google's schema of it."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config

httplib2 = pytest.importorskip("httplib2", reason="no google-api-python-client: pip install 'pukd_ray[gcp]'")
pytest.importorskip("googleapiclient")

CLUSTER = Path(__file__).parents[1] / "cluster"
BROAD = {"roles/owner", "roles/editor"}


@dataclass
class GoogleCloud:
    """The few calls that Ray makes, as httplib2 sends them: (method, path) to answer; instances are kept by name."""

    instances: dict[str, dict[str, Any]] = field(default_factory=dict)
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=lambda: {"bindings": []})
    metadata: dict[str, Any] = field(default_factory=dict)
    lists: list[str] = field(default_factory=list)
    """Filters of the listings that were asked for."""

    def request(self, _http: Any, uri: str, method: str = "GET", body: Any = None, *_: Any, **__: Any) -> Any:
        """In place of `httplib2.Http.request`."""
        url = urlsplit(uri)
        answer = self.answer(method, url.path, json.loads(body) if body else {}, parse_qs(url.query))
        status = 404 if answer is None else 200
        response = httplib2.Response({"status": str(status), "content-type": "application/json"})
        return response, json.dumps(
            {"error": {"code": 404, "message": url.path}} if answer is None else answer
        ).encode()

    def answer(self, method: str, path: str, body: dict[str, Any], query: dict[str, list[str]]) -> Any:
        done = {"name": "operation", "status": "DONE"}
        instance = re.fullmatch(r"/compute/v1/projects/my-project/zones/us-central1-a/instances(?:/([^/]+))?", path)
        if instance and method == "POST":
            faults = [f"{list(f.path)}: {f.message}" for f in schema("Instance").iter_errors(body)]
            assert faults == []
            self.instances[body["name"]] = {**body, "status": "RUNNING"}
            return done
        if instance and method == "DELETE":
            return done if self.instances.pop(instance[1], None) else None
        if instance:
            self.lists += query["filter"]
            return {"items": list(self.instances.values())}
        if "/operations/" in path:
            return done
        if "/serviceAccounts" in path:
            if method == "POST":
                email = f"{body['accountId']}@my-project.iam.gserviceaccount.com"
                self.accounts[email] = {"email": email, "projectId": "my-project"}
                return self.accounts[email]
            return self.accounts.get(path.rpartition("/")[2])
        if path.endswith(":getIamPolicy"):
            return self.policy
        if path.endswith(":setIamPolicy"):
            self.policy = body["policy"]
            return self.policy
        if path.endswith("/setCommonInstanceMetadata"):
            self.metadata = body
            return done
        assert (method, path.rpartition("/")[2]) == ("GET", "my-project"), f"{method} {path} is not emulated"
        return {
            "name": "my-project",
            "projectId": "my-project",
            "lifecycleState": "ACTIVE",
            "commonInstanceMetadata": {},
        }


def schema(name: str) -> Draft202012Validator:
    """Of an object of the compute API, as Google's client ships it; unknown fields are faults."""
    document = json.loads((files("googleapiclient") / "discovery_cache/documents/compute.v1.json").read_text())
    return Draft202012Validator(strict(document["schemas"][name]) | {"schemas": strict(document["schemas"])})


def strict(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return {"$ref": f"#/schemas/{part['$ref']}"}
    if part.get("format") in ("int64", "uint64"):
        return {"type": ["string", "integer"]}
    made = {key: strict(inner) for key, inner in part.items() if key not in ("id", "description")}
    if isinstance(part.get("properties"), dict):
        made["properties"] = {key: strict(inner) for key, inner in part["properties"].items()}
        made.setdefault("additionalProperties", False)
    return made


def raw() -> dict[str, Any]:
    text = (CLUSTER / "gcp.yaml").read_text().replace("PROJECT", "my-project")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GoogleCloud:
    made = GoogleCloud()
    monkeypatch.setattr(httplib2.Http, "request", lambda *args, **named: made.request(*args, **named))
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray makes a key pair
    return made


@pytest.fixture
def gcp(cloud: GoogleCloud) -> dict[str, Any]:
    """gcp.yaml as `ray up` completes it."""
    assert cloud.accounts == {}
    from ray.autoscaler._private.gcp.config import bootstrap_gcp

    config = prepare_config(raw())
    validate_config(config)
    config["provider"]["gcp_credentials"] = {"type": "credentials_token", "credentials": "none"}
    completed: dict[str, Any] = bootstrap_gcp(config)
    return completed


def test_compute_engine_takes_every_node_type(cloud: GoogleCloud, gcp: dict[str, Any]) -> None:
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

    provider = GCPNodeProvider(gcp["provider"], gcp["cluster_name"])
    spot, accounts = set(), {}
    for name, node_type in gcp["available_node_types"].items():
        tags = {"ray-node-name": "ray-pukd-ray", "ray-node-type": "worker", "ray-user-node-type": name}
        (node,) = provider.create_node(copy.deepcopy(node_type["node_config"]), tags, 1)
        made = cloud.instances[node]
        machine = made["machineType"].rpartition("/")[2]
        resources = node_type["resources"]
        assert resources["CPU"] == (0 if name == "head" else int(machine.rpartition("-")[2])), machine
        assert resources.get("GPU", 0) == (machine == "g2-standard-16"), machine  # has one L4
        if "GPU" in resources:
            assert made["scheduling"]["onHostMaintenance"] == "TERMINATE"  # Google refuses others
        (disk,) = made["disks"]
        assert disk["initializeParams"]["diskSizeGb"] >= 100  # the image alone has about 20 GB
        if made.get("scheduling", {}).get("provisioningModel") == "SPOT":
            assert made["scheduling"]["instanceTerminationAction"] == "DELETE"  # else its disk is paid for ever
            spot.add(name)
        (account,) = made["serviceAccounts"]
        accounts[name] = account["email"].partition("@")[0]
    assert spot == {"cpu", "gpu"}
    assert accounts == {n: "pukd-ray-head" if n == "head" else "pukd-ray-worker" for n in accounts}

    assert sorted(provider.non_terminated_nodes({})) == sorted(cloud.instances)
    assert "(labels.ray-cluster-name = pukd-ray)" in cloud.lists[-1]
    for node in list(cloud.instances):
        provider.terminate_node(node)
    assert cloud.instances == {}


def test_the_schema_refuses_what_google_would() -> None:
    (head, *_) = raw()["available_node_types"].values()
    assert list(schema("Instance").iter_errors(head["node_config"])) == []
    for wrong in ({"scheduling": {"provisioningModel": "spot"}}, {"InstanceType": "e2"}, {"scheduling": [{}]}):
        assert list(schema("Instance").iter_errors(head["node_config"] | wrong)), wrong


def test_it_is_the_same_cluster_as_on_aws() -> None:
    aws = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    google = raw()
    for key in aws:
        if key not in ("provider", "docker", "auth", "initialization_commands", "available_node_types"):
            assert google[key] == (
                aws[key] if "commands" not in key else [c.replace("aws", "gcp") for c in aws[key]]
            ), key
    for name, node_type in aws["available_node_types"].items():
        ours = google["available_node_types"][name]
        assert {k: v for k, v in ours.items() if k != "node_config"} == {
            k: v for k, v in node_type.items() if k != "node_config"
        }


def test_bootstrapping_makes_no_account_of_the_nodes_broader(cloud: GoogleCloud, gcp: dict[str, Any]) -> None:
    """Ray makes an account of its own, with rights on the whole project: no node has it."""
    (ours,) = cloud.accounts
    members = {member for binding in cloud.policy["bindings"] for member in binding["members"]}
    assert members == {f"serviceAccount:{ours}"}
    assert not BROAD & {binding["role"] for binding in cloud.policy["bindings"]}
    assert ours not in json.dumps(gcp["available_node_types"])
    assert "ssh-keys" in json.dumps(cloud.metadata)


def test_nothing_listens_outside_and_all_know_the_token(gcp: dict[str, Any]) -> None:
    start = gcp["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_enable_autoscaler_v2=1" in start  # v1 knows no priorities
    assert gcp["file_mounts"]["~/.ray/auth_token"].endswith(".ray/auth_token")
