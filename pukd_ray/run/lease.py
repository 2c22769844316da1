"""One writer per run folder: a lease that its holder keeps alive, with a number that only grows (a fencing token).

`markers/lease/<token>.json` is the lease; the highest token holds the folder. Taking it is writing the next number,
which must not be there yet. The holder writes its file anew every few seconds; whoever finds a lease that was not given
back watches it for a minute and takes it over if nothing moves. No clocks are compared, except that a lease is not
watched which is older than clocks can differ; and on the machine of a holder that has died nothing is waited for.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pukd_ray.errors import RunError
from pukd_ray.run.folder import LEASES, RunFolder
from pukd_ray.run.records import DoingRecord, LeaseRecord

BEAT_SECONDS = 10.0
LAPSE_SECONDS = 60.0
CLOCKS_DIFFER_SECONDS = 600.0
STOP = signal.SIGUSR2
"""What a beat sends its driver when another has taken over; it raises KeyboardInterrupt."""

_held: set[str] = set()
"""Drivers of this process that hold a lease: one whose storage failed when it was to be given back does not."""


class Lease:
    """The right to write into a run folder: free or RunError on entering, taken by `take`, given back on leaving.

    `doing` is asked at every beat what the holder is at, for those who look from elsewhere.
    """

    def __init__(self, folder: RunFolder, doing: Callable[[], DoingRecord | None] = lambda: None) -> None:
        self._folder, self._seen, self._doing = folder, 0, doing
        self._record: LeaseRecord | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._lost = False
        self._former: Any = None

    def __enter__(self) -> Lease:
        self._seen = _wait_until_free(self._folder)
        return self

    def take(self) -> RunFolder:
        """The folder to write into; RunError if another driver was faster."""
        token = self._seen + 1
        if self._record is None:
            now = _now()
            record: LeaseRecord = {
                "token": token,
                "driver": uuid.uuid4().hex,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process": _process(os.getpid()),
                "since": now,
                "beat": 0,
                "last_beat": now,
                "released": False,
            }
            _held.add(record["driver"])
            if not self._folder.create_json(_name(token), record):
                raise RunError(_in_use(self._folder, self._folder.read_json(_name(token))))
            self._record = record
            if token > 2:
                self._folder.delete(_name(token - 2))
            main = threading.current_thread() is threading.main_thread()
            if main:  # not SIGINT, which a shell's background processes ignore
                self._former = signal.signal(STOP, signal.default_int_handler)
            threading.Thread(target=self._beat, args=(main,), daemon=True).start()
        return RunFolder(self._folder.uri, token)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._record is None:
            return
        _held.discard(self._record["driver"])
        with self._lock, suppress(RunError):  # it lapses all the same
            if not self._lost:
                self._folder.write_json(_name(self._record["token"]), self._record | {"doing": None, "released": True})
        if self._former is not None:
            signal.signal(STOP, self._former)
        if self._lost and isinstance(error, KeyboardInterrupt):
            RunFolder(self._folder.uri, self._record["token"]).check_lease()

    def _told(self) -> DoingRecord | None:
        """What the holder is at; a fault in telling it must not cost the lease."""
        try:
            return self._doing()
        except Exception:
            return None

    def _beat(self, interrupt: bool) -> None:
        """Say every few seconds that the holder lives; if another has taken over, stop the holder."""
        assert self._record is not None
        held = RunFolder(self._folder.uri, self._record["token"])
        while not self._stop.wait(BEAT_SECONDS):
            with self._lock, suppress(RunError):  # storage that does not answer may do so at the next beat
                if self._stop.is_set():
                    return
                self._lost = held.lease_is_lost()
                if not self._lost:
                    self._record |= {
                        "beat": self._record["beat"] + 1,
                        "last_beat": _now(),
                        "doing": self._told(),
                    }
                    held.write_json(_name(held.token), self._record)
            if self._lost:
                if interrupt:
                    signal.pthread_kill(threading.main_thread().ident or 0, STOP)
                return


def _name(token: int) -> str:
    return f"{LEASES}/{token:08d}.json"


def find_lease(folder: RunFolder) -> LeaseRecord | None:
    """The newest lease, given back or not; None if there never was one."""
    token = folder.last_token()
    record: LeaseRecord | None = folder.read_json(_name(token)) if token else None
    return record


def _wait_until_free(folder: RunFolder) -> int:
    """Token of the last lease, given back or lapsed; RunError if its holder lives."""
    first = find_lease(folder)
    if first is None or first["released"]:
        return folder.last_token()
    if first["process"].rpartition("/")[0] == _process(0).rpartition("/")[0]:  # a process that this one can see
        given_up = first["pid"] == os.getpid() and first["driver"] not in _held
        if _process(first["pid"]) == first["process"] and not given_up:
            raise RunError(_in_use(folder, first))
        return first["token"]
    age = (datetime.now(UTC) - datetime.fromisoformat(first["last_beat"])).total_seconds()
    began = time.monotonic()
    while age < CLOCKS_DIFFER_SECONDS and time.monotonic() - began < LAPSE_SECONDS:
        time.sleep(min(1.0, LAPSE_SECONDS / 10))
        now = find_lease(folder)
        if now is None or now["released"]:
            return folder.last_token()
        if (now["token"], now["beat"]) != (first["token"], first["beat"]):
            raise RunError(_in_use(folder, now))
    return first["token"]


def _in_use(folder: RunFolder, lease: LeaseRecord) -> str:
    return (
        f"output: {folder.display} is in use by process {lease['pid']} on {lease['host']}, since {lease['since']}, "
        f"last heard of at {lease['last_beat']}: wait for it, stop it, or choose another output"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _process(pid: int) -> str:
    """What tells a process from all others: machine as booted, namespace of process ids, and when it started.

    Without the last for a process that is not there (or 0).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}/{pid if pid and _answers(pid) else ''}"
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    return f"{place}/{started}"


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
