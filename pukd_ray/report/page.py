"""Stage `report`: one self-contained page."""

from __future__ import annotations

from typing import Any

from pukd_ray.config import RunConfig
from pukd_ray.run_folder import RunFolder


def write_report(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Write `report.html`."""
    folder.write_text("report.html", "<html>" + config.name)
    return {"page": "report.html"}
