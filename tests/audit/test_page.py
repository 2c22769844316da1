"""The labelling page in a real browser, with real keys."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from audit.webdriver import Browser, browser

from pukd_ray.audit.estimate import Counted, estimate_strata
from pukd_ray.audit.forms import Example, parse_labels, picture, render_page
from pukd_ray.corpus.pixels import encode_png

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.timeout(300),
]

AUDIT = "0123456789abcdef"
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "__proto__",
    "ünï\u2028ćø",
]
LEFT, BACKSPACE = "\ue012", "\ue003"


def image(value: int) -> str | None:
    return picture(encode_png(np.full((1, 16, 16), value, np.uint8)))


def write_page(path: Path, ids: list[str], audit: str = AUDIT) -> Path:
    pictures = [image(k % 256) for k in range(len(ids))]
    examples = [Example(f"<b>class {k}</b>", tuple(image(60 * k + 10 * i) or "" for i in range(4))) for k in range(3)]
    path.write_text(render_page("a <i>run</i>", audit, ids, pictures, examples), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM
    assert CHROMEDRIVER
    with browser(CHROMIUM, CHROMEDRIVER, tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def shown(page: Browser, what: str) -> str:
    text = page.run(f"return document.getElementById({what!r}).textContent")
    assert isinstance(text, str)
    return text


def save(page: Browser, audit: str = AUDIT) -> str:
    """Press Save; the file's text."""
    file = page.downloads / f"labels-{audit}.json"
    file.unlink(missing_ok=True)
    page.click("#save")
    for _ in range(100):
        if file.exists():
            return file.read_text(encoding="utf-8")
        time.sleep(0.1)
    raise AssertionError(f"{file.name} did not come")


def test_label_300_images_by_key_save_and_read_back(page: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    sizes, sampled, selected = (900, 400, 9_000, 90_000), (60, 60, 90, 90), (True, True, False, False)
    relevant = [rng.random(n) < share for n, share in zip(sizes, (0.97, 0.7, 0.05, 0.001), strict=True)]
    drawn = [rng.choice(n, k, replace=False) for n, k in zip(sizes, sampled, strict=True)]
    rows = [(h, int(row)) for h, rows in enumerate(drawn) for row in rows]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    ids = [f"stratum {h} row {row}" for h, row in rows]
    ids[7:11] = HOSTILE
    keys = "".join("y" if relevant[h][row] else "n" for h, row in rows)

    file = write_page(tmp_path / "label.html", ids)
    page.open(file)
    page.press(keys[:100])
    assert shown(page, "count") == "100 of 300 labelled"
    page.open(file)  # as after a crash: it goes on where it was
    assert shown(page, "count") == "100 of 300 labelled"
    assert shown(page, "id") == f"101 · {ids[100]}"
    page.press("uu" + LEFT + BACKSPACE + keys[100:102])  # two doubts, cleared up
    page.press("g")
    assert page.run("return document.querySelectorAll('#overview button').length") == 300
    page.press("yn")  # no answers while nothing single is shown
    page.click("#overview button:nth-child(103)")
    page.press(keys[102:])
    assert shown(page, "count") == "300 of 300 labelled"
    assert shown(page, "message").startswith("All images are labelled.")
    labels = parse_labels(save(page), ids, AUDIT)
    assert page.complaints() == []

    assert labels == dict(zip(ids, ({"y": "yes", "n": "no"}[key] for key in keys), strict=True))
    counted = []
    for h, size in enumerate(sizes):
        said = [labels[i] for i, (of, _) in zip(ids, rows, strict=True) if of == h]
        counted.append(Counted(selected[h], size, said.count("yes"), said.count("no"), 0))
    found = estimate_strata(counted)
    hits = [int(r.sum()) for r in relevant]
    truth = (found.prior, sum(hits) / sum(sizes)), (found.precision, sum(hits[:2]) / 1300)
    for figure, true in (*truth, (found.recall, sum(hits[:2]) / sum(hits))):
        assert figure.lower is not None
        assert figure.upper is not None
        assert figure.lower <= true <= figure.upper


def test_foreign_text_is_shown_and_never_run(page: Browser, tmp_path: Path) -> None:
    page.open(write_page(tmp_path / "label.html", HOSTILE, "1111111111111111"))
    for k, image_id in enumerate(HOSTILE):
        assert shown(page, "id") == f"{k + 1} · {image_id}"
        page.press("y" if k == 2 else "u")
    page.press("g")
    assert page.run("return [...document.querySelectorAll('#overview button')].map(b => b.title)") == HOSTILE
    assert page.run("return document.title") == "Audit of a <i>run</i> · pukd_ray"
    assert page.run("return document.querySelectorAll('i:not(#bar), h3 b').length") == 0
    asked = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [url for url in asked if not url.startswith("data:")] == []
    saved = save(page, "1111111111111111")
    assert parse_labels(saved, HOSTILE, "1111111111111111") == dict.fromkeys(HOSTILE, "unsure") | {HOSTILE[2]: "yes"}
    assert page.complaints() == []


def test_labels_of_another_audit_are_not_taken_up(page: Browser, tmp_path: Path) -> None:
    page.open(write_page(tmp_path / "label.html", ["a", "b"], "2222222222222222"))
    page.press("y")
    page.open(write_page(tmp_path / "label.html", ["a", "b"], "3333333333333333"))
    assert shown(page, "count") == "0 of 2 labelled"
    assert json.loads(save(page, "3333333333333333")) == {"audit": "3333333333333333", "labels": {}}
