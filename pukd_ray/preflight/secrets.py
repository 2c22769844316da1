"""Credentials have no place in a config: all of it is written into the run folder, its URIs into many files more."""

from __future__ import annotations

from typing import Any

from pukd_ray.storage import redact


def secret_faults(raw: Any, key: str = "") -> list[str]:
    """A line for each text in the document that holds a password or a signature; none quotes it."""
    if isinstance(raw, dict):
        return [fault for k, v in raw.items() for fault in secret_faults(v, f"{key}.{k}".lstrip("."))]
    if isinstance(raw, list):
        return [fault for i, v in enumerate(raw) for fault in secret_faults(v, f"{key}.{i}")]
    if not isinstance(raw, str) or redact(raw) == raw:
        return []
    return [
        f"{key}: {redact(raw)} holds credentials, and a config is written into the run folder: give them to the "
        "machines instead, by a role, or in the environment (as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    ]
