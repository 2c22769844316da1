"""One driver writes into a run folder; what it commits is whole, and is there once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from record_types import faults_of

from pukd_ray import storage
from pukd_ray.errors import RunError
from pukd_ray.run import lease as module
from pukd_ray.run.folder import LEASES, RunFolder
from pukd_ray.run.lease import Lease
from pukd_ray.run.records import LeaseRecord
from pukd_ray.storage import create_file, open_storage

FIRST = f"{LEASES}/00000001.json"
HOLDER = """
import sys, time
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.lease import Lease
with Lease(RunFolder(sys.argv[1])) as lease:
    lease.take()
    print("taken", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "LAPSE_SECONDS", 0.6)


@pytest.fixture
def holder(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, run.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def elsewhere(run: RunFolder, token: int = 1, **more: Any) -> dict[str, Any]:
    """A lease of a driver on another machine, as if just written."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {
        "token": token,
        "host": "far-away",
        "pid": 77,
        "process": "far-away/boot/pid:[1]/5",
        "since": now,
        "beat": 3,
        "last_beat": now,
        "released": False,
    }
    run.write_json(f"{LEASES}/{token:08d}.json", record | more)
    return record | more


def test_a_second_driver_is_refused_in_one_line_that_names_the_first(
    run: RunFolder, holder: subprocess.Popen[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(RunError) as caught, Lease(run):
        pass
    assert time.monotonic() - began < 5
    record = run.read_json(FIRST)
    told = str(caught.value)
    assert told.startswith(f"output: {run.display} is in use by process {holder.pid} on {record['host']}, since ")
    assert f"since {record['since']}, last heard of at {record['last_beat']}: " in told
    assert told.endswith("wait for it, stop it, or choose another output")
    assert "\n" not in told


def test_the_lease_of_a_process_that_was_killed_is_free_at_once(run: RunFolder, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with Lease(run) as lease:
        assert lease.take() == RunFolder(run.uri, 2)
        assert lease.take() == RunFolder(run.uri, 2)
        assert run.read_json(f"{LEASES}/00000002.json")["released"] is False
    assert time.monotonic() - began < 5
    assert run.read_json(f"{LEASES}/00000002.json")["released"] is True


def test_a_process_whose_storage_failed_at_the_end_takes_its_folder_again(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.2)
    leases = Path(run.root) / LEASES
    with Lease(run) as lease:
        lease.take()
        leases.rename(leases.with_name("away"))
        leases.write_text("no folder")
    leases.unlink()
    leases.with_name("away").rename(leases)
    assert run.read_json(FIRST)["released"] is False
    with Lease(run) as lease:
        assert lease.take().token == 2
        with pytest.raises(RunError, match=f"is in use by process {os.getpid()} "), Lease(run):
            pass


def test_nothing_is_written_unless_it_is_taken(run: RunFolder) -> None:
    with Lease(run):
        pass
    assert not Path(run.root).exists()


def test_tokens_grow_and_old_leases_go(run: RunFolder) -> None:
    for token in range(1, 5):
        with Lease(run) as lease:
            assert lease.take().token == token
    assert [name.rpartition("/")[2] for name in run.files(LEASES)] == ["00000003.json", "00000004.json"]


@pytest.mark.usefixtures("quick")
def test_a_lease_that_moves_is_respected_and_one_that_does_not_lapses(run: RunFolder) -> None:
    elsewhere(run)
    stop = threading.Event()

    def beat() -> None:
        beats = 3
        while not stop.wait(0.05):
            beats += 1
            elsewhere(run, beat=beats)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunError, match="is in use by process 77 on far-away"), Lease(run):
            pass
    finally:
        stop.set()
        thread.join()
    began = time.monotonic()
    with Lease(run) as lease:
        assert lease.take().token == 2
    assert time.monotonic() - began > 0.5


def test_a_lease_older_than_clocks_differ_is_not_watched(run: RunFolder) -> None:
    elsewhere(run, last_beat=(datetime.now(UTC) - timedelta(hours=1)).isoformat())
    began = time.monotonic()
    with Lease(run) as lease:
        assert lease.take().token == 2
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("quick")
def test_the_holder_keeps_its_lease_alive(run: RunFolder) -> None:
    with Lease(run) as lease:
        lease.take()
        deadline = time.monotonic() + 20
        while run.read_json(FIRST)["beat"] < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run.read_json(FIRST)["beat"] >= 3


def test_whoever_was_thought_dead_commits_nothing(run: RunFolder) -> None:
    with Lease(run) as lease:
        held = lease.take()
        held.commit_json("markers/score/00000.json", {"chunk": "00000"})
        elsewhere(run, token=2)
        for commit in (
            lambda: held.commit_json("markers/score/00001.json", {}),
            lambda: held.finish("score", {}, 1.0, {}),
            lambda: held.record_attempt("score", 1.0, "interrupted"),
        ):
            with pytest.raises(RunError, match=r"was taken over by process 77 on far-away, .*: it goes on there"):
                commit()
    assert run.files("markers/score") == ["markers/score/00000.json"]
    assert run.marker("score") is None
    assert run.attempts("score") is None
    assert run.read_json(f"{LEASES}/00000002.json")["released"] is False


@pytest.mark.usefixtures("quick")
def test_whoever_was_thought_dead_stops_at_its_next_beat(run: RunFolder) -> None:
    def hold() -> None:
        with Lease(run) as lease:
            lease.take()
            elsewhere(run, token=2)
            time.sleep(20)

    with pytest.raises(RunError, match="was taken over by process 77 on far-away"):
        hold()
    assert run.read_json(f"{LEASES}/00000002.json")["released"] is False


def test_two_that_commit_the_same_chunk_are_found_out(run: RunFolder) -> None:
    """Even if neither sees the lease of the other: as one that sleeps between looking and writing."""
    run.commit_json("markers/score/00000.json", {"files": ["a"]})
    run.commit_json("markers/score/00000.json", {"files": ["a"]})  # heard, but not answered
    with pytest.raises(RunError, match=r"markers/score/00000\.json: another driver has written it"):
        run.commit_json("markers/score/00000.json", {"files": ["b"]})
    assert run.read_json("markers/score/00000.json") == {"files": ["a"]}


def no_links(*_: Path) -> None:
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize("storage", ["disk", "disk without links", "memory"])
def test_of_many_drivers_one_takes_the_lease(tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(f"memory://{tmp_path}" if storage == "memory" else str(tmp_path / "run"))
    if storage == "disk without links":
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    many = [Lease(run) for _ in range(1 if storage == "memory" else 8)]
    for lease in many:
        lease.__enter__()
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(outcome, [lease.take for lease in many]))
    assert sum(isinstance(got, RunFolder) for got in taken) == 1
    assert all(isinstance(got, RunFolder) or "is in use by process" in str(got) for got in taken)
    for lease in many:
        lease.__exit__(None, None, None)
    assert run.read_json(FIRST)["released"] is True
    assert run.files(LEASES) == [FIRST]


def outcome(action: Callable[[], object]) -> object:
    try:
        return action()
    except RunError as error:
        return error


def test_a_file_is_created_once(tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/a/b", f"local://{tmp_path}/c/d", f"memory://{tmp_path}/e"):
        fs, path = open_storage(uri)
        assert create_file(fs, path, uri, b"one")
        assert create_file(fs, path, uri, b"one")  # an answer that got lost
        assert not create_file(fs, path, uri, b"two")
        with fs.open_input_stream(path) as file:
            assert file.read() == b"one"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b", "d"]


@pytest.mark.usefixtures("quick")
def test_a_fault_in_telling_what_the_holder_is_at_does_not_cost_the_lease(run: RunFolder) -> None:
    def broken() -> None:
        raise TypeError("bool() undefined")

    with Lease(run, broken) as lease:
        lease.take()
        until = time.monotonic() + 20
        while run.read_json(FIRST)["beat"] < 3 and time.monotonic() < until:
            time.sleep(0.02)
        assert run.read_json(FIRST)["beat"] >= 3
        assert run.read_json(FIRST)["doing"] is None


@pytest.mark.usefixtures("quick")
def test_a_beat_says_what_its_holder_is_at(run: RunFolder) -> None:
    doing: Any = {
        "stage": "score", "seconds": 1.0, "part": "score", "done": 3.0, "total": None, "unit": "images",
        "seconds_left": None, "seconds_left_in_all": 7.5,
    }  # fmt: skip
    with Lease(run, lambda: doing) as lease:
        lease.take()
        until = time.monotonic() + 20
        while not run.read_json(FIRST).get("doing") and time.monotonic() < until:
            time.sleep(0.02)
        assert run.read_json(FIRST)["doing"] == doing
        assert faults_of(run.read_json(FIRST), LeaseRecord) == []
    assert run.read_json(FIRST)["doing"] is None
