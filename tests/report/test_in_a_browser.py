"""The report with hostile names in it, in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from audit.webdriver import browser
from report.test_page import make_config, make_gallery, make_run, render

from pukd_ray.report.gallery import Picture

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver")

HOSTILE = [
    "</title></style></svg></script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "'><svg onload=document.title='owned'>{{ 7 * 7 }}",
]


def test_hostile_names_and_ids_are_shown_and_never_run(tmp_path: Path) -> None:
    assert CHROMIUM
    assert CHROMEDRIVER
    config = make_config(tmp_path, name=HOSTILE[0], classes=HOSTILE)
    gallery = make_gallery(*(Picture(text, 1.0, 0.5, True, False, None) for text in HOSTILE))
    file = tmp_path / "report.html"
    file.write_text(render(make_run(tmp_path, config), config, gallery), encoding="utf-8")
    with browser(CHROMIUM, CHROMEDRIVER, tmp_path / "browser") as page:
        page.open(file)
        assert HOSTILE[0] in page.run("return document.title")
        text = page.run("return document.documentElement.textContent")
        assert all(name in text for name in HOSTILE)
        assert page.run("return document.querySelectorAll('script, [onerror], [onload]').length") == 0
        asked = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [url for url in asked if not url.startswith("data:")] == []
        assert page.complaints() == []
