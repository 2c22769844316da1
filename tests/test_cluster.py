"""The cluster YAML is one that Ray accepts; checked offline with Ray's own validators."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_aws_yaml_is_valid_and_keeps_the_dashboard_private() -> None:
    autoscaler = pytest.importorskip("ray.autoscaler._private.util")
    raw = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    config = autoscaler.prepare_config(raw)
    autoscaler.validate_config(config)
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert any("--dashboard-host=127.0.0.1" in c for c in raw["head_start_ray_commands"])
    assert any("--autoscaling-config=" in c for c in raw["head_start_ray_commands"])
