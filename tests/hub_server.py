"""A Hugging Face hub of a test's own: one data set, by the calls that huggingface_hub's filesystem makes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 40


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": name}
    return {"type": "file", "oid": sha1(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "path": name}


@contextmanager
def serve_dataset(name: str, root: Path) -> Iterator[str]:
    """Files below `root` as data set `name`, which has one revision; the hub's address."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def say(self, value: Any) -> None:
            self.answer(json.dumps(value).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path.startswith(f"/api/datasets/{name}/tree/"):
                folder = root / "/".join(path.removeprefix(f"/api/datasets/{name}/tree/").split("/")[1:])
                deep = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
                if not folder.is_dir():
                    return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
                found = folder.rglob("*") if deep else folder.iterdir()
                return self.say([_entry(root, each) for each in sorted(found)])
            if path.startswith(f"/datasets/{name}/resolve/"):
                file = root / "/".join(path.removeprefix(f"/datasets/{name}/resolve/").split("/")[1:])
                if not file.is_file():
                    return self.answer(b"", 404, X_Error_Code="EntryNotFound")
                data, asked = file.read_bytes(), self.headers.get("Range")
                if asked:
                    start, _, stop = asked.removeprefix("bytes=").partition("-")
                    data = data[int(start) : int(stop) + 1 if stop else None]
                return self.answer(data, 206 if asked else 200, ETag=f'"{COMMIT}"')
            if path.startswith(f"/api/datasets/{name}"):
                return self.say({"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            given = json.loads(body) if body.startswith("{") else parse_qs(body)
            paths = [root / path for path in given["paths"]]
            self.say([_entry(root, path) for path in paths if path.exists()])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
