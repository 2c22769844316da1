"""cluster/grafana.json against a real Prometheus that reads a real run: every query of it finds something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from heads import environment, free_ports, running, start_head, wait_for
from ray.job_submission import JobStatus
from synthetic import write_config, write_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

BOARD = Path(__file__).parents[1] / "cluster" / "grafana.json"


def test_every_query_finds_something(tmp_path: Path) -> None:
    prometheus = shutil.which("prometheus") or pytest.skip("Prometheus is not installed (Debian's package prometheus)")
    config = write_task(tmp_path, images=420, files=7)
    image = tmp_path / "no.png"
    image.write_bytes(b"")  # one that is rejected
    config["corpus"] = [config["corpus"], {"uri": str(image), "relevant": False}]
    config["distill"] |= {"steps": 6000}  # Ray hands its metrics over every ten seconds
    file = write_config(tmp_path, config)
    (port,) = free_ports(1)
    with start_head(tmp_path, 1) as head:
        scrape = {"job_name": "ray", "static_configs": [{"targets": [head.metrics.split("/")[2]]}]}
        (tmp_path / "prometheus.yml").write_text(
            yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
        )
        command = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
        with running([*command, f"--storage.tsdb.path={tmp_path}/tsdb"], environment(), tmp_path / "prometheus.log"):
            job = head.submit(f"--config {file}")
            found: dict[str, set[str]] = {}
            wait_for(lambda: look(port, found) or head.status(job).is_terminal(), 300)
            assert head.status(job) == JobStatus.SUCCEEDED, head.logs(job)
            look(port, found)
    assert [query for query in queries() if not found.get(query) and "gpus" not in query] == []


def queries() -> list[str]:
    panels = json.loads(BOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def look(port: int, found: dict[str, set[str]]) -> bool:
    """Whether Prometheus cannot be asked any more; adds what it finds for each query now."""
    for query in queries():
        asked = query.replace("$run", "tiny").replace("$__rate_interval", "10s")
        try:
            page = urlopen(f"http://127.0.0.1:{port}/api/v1/query?{urlencode({'query': asked})}", timeout=10)
        except OSError:
            continue  # not yet
        answer: dict[str, Any] = json.loads(page.read())
        assert answer["status"] == "success", answer
        found.setdefault(query, set()).update(json.dumps(one["metric"]) for one in answer["data"]["result"])
    return False
