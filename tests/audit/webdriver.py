"""Just enough of the WebDriver protocol to press keys in headless Chromium."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1200,900",
]


class Browser:
    """One session."""

    def __init__(self, base: str, downloads: Path) -> None:
        self.base = base
        self.downloads = downloads

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One command; its value."""
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def open(self, file: Path) -> None:
        """Load a local file."""
        self.call("POST", "/url", {"url": file.as_uri()})

    def run(self, script: str) -> Any:
        """What a function body returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, keys: str) -> None:
        """Real key events, one after the other."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def complaints(self) -> list[str]:
        """What the console got since it was last asked: errors, and what the page's own policy forbade."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(found.values()))}/click")


@contextmanager
def browser(chromium: str, chromedriver: str, folder: Path) -> Iterator[Browser]:
    """Headless Chromium with a new profile in `folder`, downloading to `folder/downloads`."""
    downloads = folder / "downloads"
    options = {
        "binary": chromium,
        "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"],
        "prefs": {"download.default_directory": str(downloads)},
    }
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    driver = subprocess.Popen([chromedriver, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(
            int(found[1]) for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        root = Browser(f"http://127.0.0.1:{port}", downloads)
        session = root.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        page = Browser(f"{root.base}/session/{session['sessionId']}", downloads)
        try:
            yield page
        finally:
            page.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)
