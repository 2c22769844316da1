"""One way to reach local disks, object stores and fsspec; a file is there whole or not at all."""

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from flaky import Flaky
from fsspec.implementations.local import LocalFileSystem
from s3_server import serve_bucket

from pukd_ray import storage
from pukd_ray.config import SourceConfig
from pukd_ray.corpus.plan import make_units, measure
from pukd_ray.corpus.reading import read_rows
from pukd_ray.corpus.sources import check_reachable, list_source
from pukd_ray.errors import MissingError, PlaceError, RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.stages import STAGES, stages_from
from pukd_ray.storage import (
    as_json,
    is_local,
    list_files,
    move_tree,
    open_file,
    open_storage,
    read_bytes,
    split_uri,
    write_atomically,
    write_bytes,
)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serve_bucket("lake"):
        yield "s3://lake"


def test_local_uris() -> None:
    assert [is_local(u) for u in ("a/b", "/a", "file:///a", "s3://a", "local:///a")] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("a/b?c=d", ("", "a/b?c=d", "")),
        ("s3://b/k/*.jpg", ("s3://", "b/k/*.jpg", "")),
        ("s3://b/k?/x?.jpg", ("s3://", "b/k?/x?.jpg", "")),
        ("s3://b/k?region=eu-1&x=y", ("s3://", "b/k", "?region=eu-1&x=y")),
        ("file:///a?b=c", ("file://", "/a?b=c", "")),
    ],
)
def test_uris_are_split(uri: str, parts: tuple[str, str, str]) -> None:
    assert split_uri(uri) == parts
    assert "".join(split_uri(uri)) == uri


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_storage("x/y")[1] == f"{tmp_path}/x/y"
    assert open_storage(f"file://{tmp_path}/x y%20#")[1] == f"{tmp_path}/x y%20#"
    assert open_storage("~/z")[1] == f"{tmp_path}/home/z"


def test_an_unknown_scheme_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"nope://a/b: Protocol not known: nope"):
        open_storage("nope://a/b")


def everything(base: str) -> None:
    """What the project asks of a storage."""
    fs, root = open_storage(base)
    write_bytes(fs, f"{root}/deep/a b.bin", b"one")
    write_bytes(fs, f"{root}/deep/a b.bin", b"two")  # replaces
    write_bytes(fs, f"{root}/deep/er/c.json", as_json({"x": None}))
    assert read_bytes(fs, f"{root}/deep/a b.bin") == b"two"
    assert read_bytes(fs, f"{root}/deep/er/c.json") == b'{\n  "x": null\n}\n'
    assert [f.path for f in list_files(fs, f"{root}/deep")] == [f"{root}/deep/a b.bin", f"{root}/deep/er/c.json"]
    assert [f.path for f in list_files(fs, f"{root}/deep", recursive=False)] == [f"{root}/deep/a b.bin"]
    assert list_files(fs, f"{root}/nothing") == []

    def fail(sink: object) -> None:
        sink.write(b"half of it")
        raise RuntimeError("out of memory")

    for name in ("deep/a b.bin", "deep/new.bin"):
        with pytest.raises(RuntimeError, match="out of memory"):
            write_atomically(fs, f"{root}/{name}", fail)
    assert read_bytes(fs, f"{root}/deep/a b.bin") == b"two"
    assert [f.path for f in list_files(fs, root)] == [f"{root}/deep/a b.bin", f"{root}/deep/er/c.json"]
    fs.create_dir(f"{root}/moved")
    move_tree(fs, f"{root}/deep", f"{root}/moved/deep")
    move_tree(fs, f"{root}/nothing", f"{root}/moved/nothing")
    assert [f.path for f in list_files(fs, root)] == [f"{root}/moved/deep/a b.bin", f"{root}/moved/deep/er/c.json"]
    assert fs.get_file_info(f"{root}/deep").type == pafs.FileType.NotFound
    move_tree(fs, f"{root}/moved/deep/a b.bin", f"{root}/z.bin")
    assert read_bytes(fs, f"{root}/z.bin") == b"two"


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_local_disks(tmp_path: Path, scheme: str) -> None:
    everything(f"{scheme}{tmp_path}/x")


def test_memory_of_fsspec() -> None:
    everything("memory://everything")


def test_s3(s3: str) -> None:
    everything(f"{s3}/everything")
    everything(f"{s3}/again?region=us-east-1")


def test_a_corpus_on_s3(s3: str) -> None:
    fs, root = open_storage(f"{s3}/corpus")
    names = ["cat/50%20.png", "cat/a b.png", "dog/#1.png", "dog/é+.png", "dog/notes.txt"]
    for name in names:
        write_bytes(fs, f"{root}/{name}", name.encode())
    pictures = sorted(names[:4])
    for uri in (f"{s3}/corpus", f"{s3}/corpus/", f"{s3}/corpus/**/*.png", f"{s3}/corpus?region=us-east-1"):
        source = SourceConfig(uri=uri)
        format_name, files, left_out = list_source(source, "corpus")
        assert [f.relative for f in files] == pictures
        assert left_out == ({} if "*" in uri else {".txt": 1})
        measured = [(f, measure(f, format_name, source), f.relative) for f in files]
        (unit,) = make_units("corpus", 0, source, format_name, measured)
        rows = list(read_rows(unit, source))
        assert [r.image for r in rows] == [name.encode() for name in pictures]
        assert [r.label for r in rows] == [name[:3] for name in pictures]
        assert [r.source for r in rows] == [f.uri for f in files]
    assert check_reachable([f"{s3}/corpus/cat", f"{s3}/none", f"{s3}/none/*.png"], "corpus") == [
        f"corpus.uri: no such file or folder: {s3}/none",
        f"corpus.uri: no such folder: {s3}/none",
    ]


class Answers(BaseHTTPRequestHandler):
    """A web server, or an S3, with one file; what it says to HEAD and to GET is set by the test."""

    content = bytes(range(250)) * 4
    says: ClassVar[dict[str, list[tuple[int, str] | None]]] = {}
    """Status and S3 error code of each coming request; None and the end of the list: the file."""

    def do_GET(self) -> None:
        answer = self.says[self.command].pop(0) if self.says.get(self.command) else None
        body, headers = b"", {}
        if answer is None:
            status, body = 200, self.content
            if "Range" in self.headers:
                first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
                status, body = 206, body[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{last}/{len(self.content)}"
        else:
            status, code = answer
            body = f"<Error><Code>{code}</Code><Message>-</Message></Error>".encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body)), "Accept-Ranges": "bytes"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Host and port of `Answers`."""
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(Answers, "says", {})
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


S3 = "s3://lake/a.bin?endpoint_override={}&scheme=http&region=us-east-1"
WEB = "http://{}/a.bin"


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (S3, {"HEAD": [(404, "")]}),
        (S3, {"HEAD": [(403, "")]}),
        (S3, {"GET": [(404, "NoSuchKey")]}),
        (S3, {"GET": [(403, "AccessDenied")]}),
        (S3, {"GET": [(403, "InvalidObjectState")]}),  # in an archive: its HEAD is fine
        (WEB, {"HEAD": [(404, "")], "GET": [(404, "")]}),
    ],
)
def test_faults_that_last_are_said_at_once(
    server: str, form: str, says: dict[str, list[tuple[int, str] | None]]
) -> None:
    Answers.says = says
    uri = form.format(server)
    missing = any("404" in str(answer) for answers in says.values() for answer in answers)
    with pytest.raises(MissingError if missing else PlaceError) as caught, open_file(uri) as file:
        file.read()
    told = str(caught.value)
    assert told.startswith(f"{uri}: is not there (" if missing else f"{uri}: the storage refuses it (")
    assert told.endswith("run the same command again to go on where this stopped")
    assert not any(says.values())


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (S3, {"HEAD": [(503, "")] * 9}),  # the client itself asks three times
        (S3, {"HEAD": [(400, "")]}),
        (S3, {"GET": [(400, "ExpiredToken")]}),
        (S3, {"GET": [(400, "ExpiredToken"), None, (400, "ExpiredToken")]}),
        (WEB, {"HEAD": [(503, "")], "GET": [(503, "")]}),
        (WEB, {"GET": [(503, "")]}),
    ],
)
def test_faults_that_pass_are_waited_for(
    server: str, form: str, says: dict[str, list[tuple[int, str] | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "says", says)
    with open_file(form.format(server)) as file:
        assert file.read(300) == Answers.content[:300]
        assert file.seek(-10, 2) == 990
        assert file.read(300) + file.read() == Answers.content[-10:]
        assert file.seek(20) == 20
        assert file.read(5) == Answers.content[20:25]
        assert (file.seek(5, 1), file.tell()) == (30, 30)
    assert not any(says.values())


@pytest.mark.parametrize("form", [S3, WEB])
def test_storage_that_stays_away_is_named(server: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.02)
    uri = form.format(server)
    Answers.says = {"HEAD": [(503, "")] * 99, "GET": [(503, "")] * 99}
    with pytest.raises(RunError) as caught:
        open_file(uri)
    assert str(caught.value).startswith(f"{uri}: the storage does not answer (")
    assert "503" in str(caught.value)
    assert str(caught.value).endswith("run the same command again to go on where this stopped")


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path: Path, flaky: type[Flaky]) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    flaky.faults = chain([None, None, 3], repeat(None))
    with open_file(f"flaky://{tmp_path}/a") as file:
        assert file.read(4) + file.read(4) + file.read(4) == b"0123456789"
        assert file.seek(20) == 20
        assert file.read(4) == b""


def test_faults_of_the_program_are_not_waited_for() -> None:
    """Nor are those of what it was given."""
    for fault in (KeyError("x"), ValueError("x"), RunError("x"), AssertionError(), MemoryError()):
        times = []

        def fail(fault: Exception = fault, times: list[int] = times) -> None:
            times.append(1)
            raise fault

        with pytest.raises(type(fault)):
            storage.patiently("somewhere", fail)
        assert times == [1]


def test_a_run_folder_rides_out_trouble_of_its_storage(
    tmp_path: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, writing, looking and deleting."""
    run = RunFolder(f"flaky://{tmp_path}/run")
    trouble = [ConnectionResetError("gone for a moment"), OSError(28, "No space left on device"), TimeoutError()]

    def with_trouble(method: str, action: Callable[[], object]) -> object:
        pending, times = iter(trouble), []
        real = getattr(LocalFileSystem, method)

        def troubled(self: Flaky, *arguments: object, **options: object) -> object:
            times.append(1)
            if fault := next(pending, None):
                raise fault
            return real(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Flaky, method, troubled)
            answer = action()
        assert len(times) > len(trouble)
        return answer

    with_trouble("makedirs", lambda: run.write_json("a/b.json", {"x": 1}))
    assert with_trouble("info", lambda: run.exists("a/b.json"))
    flaky.faults = chain(trouble, repeat(None))
    assert run.read_json("a/b.json") == {"x": 1}
    flaky.faults = chain(trouble, repeat(None))
    table = pa.table({"a": [1]})
    run.write_table("t.parquet", table)
    flaky.faults = chain([None, None, *trouble], repeat(None))
    assert run.read_table("t.parquet") == table
    with_trouble("rm", lambda: run.delete("t.parquet"))
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {"run/a/b.json"}
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.0)
    flaky.faults = repeat(ConnectionResetError("gone for good"))
    with pytest.raises(PlaceError, match=rf"^flaky://{tmp_path}/run/a/b.json: the storage does not answer"):
        run.read_json("a/b.json")


def test_a_run_folder_on_s3(s3: str) -> None:
    run = RunFolder(f"{s3}/runs/one/")
    assert run.display == f"{s3}/runs/one"
    run.write_text("scores/a.parquet", "x")
    run.write_text("metrics.json", "{}")
    run.write_json("markers/score/00000.json", {})
    run.finish("score", {}, 1.5, {})
    assert run.files("scores") == ["scores/a.parquet"]
    first = run.retire([s for s in STAGES if s.name in ("score", "select")])
    assert run.marker("score") is None
    assert not run.has_outputs(stages_from("score")[0])
    run.write_text("scores/b.parquet", "y")
    second = run.retire([s for s in STAGES if s.name in ("score", "select")])
    assert first != second
    below = len(run.root) + 1
    assert {f.path[below:] for f in list_files(run.fs, run.root)} == {
        "metrics.json",
        f"{first}/markers/score.attempts.json",
        f"{first}/markers/score.json",
        f"{first}/markers/score/00000.json",
        f"{first}/scores/a.parquet",
        f"{second}/scores/b.parquet",
    }


@pytest.mark.parametrize("conditional", [True, False])
def test_a_file_is_created_once_on_s3(s3: str, conditional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With boto3, and by looking where there is none."""
    if not conditional:
        monkeypatch.setattr(storage, "_s3_client", lambda _: None)
        monkeypatch.setattr(storage, "SETTLE_SECONDS", 0.0)
    run = RunFolder(f"{s3}/created-{conditional}?region=us-east-1")
    assert run.create_json("markers/lease/00000001.json", {"a": 1})
    assert run.create_json("markers/lease/00000001.json", {"a": 1})
    assert not run.create_json("markers/lease/00000001.json", {"a": 2})
    assert run.read_json("markers/lease/00000001.json") == {"a": 1}
    if conditional:
        monkeypatch.setattr(storage, "read_bytes", lambda *_: b"whatever is there")  # it is S3 that refuses
        assert not run.create_json("markers/lease/00000001.json", {"a": 1})


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    fs, root = open_storage(str(tmp_path))

    def outer(sink: object) -> None:
        sink.write(b"outer")
        write_bytes(fs, f"{root}/a", b"inner")

    write_atomically(fs, f"{root}/a", outer)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"outer"
