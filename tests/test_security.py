"""What SECURITY.md tells people to run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(find_spec("pip_audit") is None, reason="needs pip-audit")
def test_the_check_for_known_holes_finds_what_is_installed() -> None:
    (options,) = re.findall(r"&& pip-audit ([^#\n]*)", (ROOT / "SECURITY.md").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *options.split(), "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"would have audited (\d+) packages", done.stdout + done.stderr)
    assert int(found) > 20
