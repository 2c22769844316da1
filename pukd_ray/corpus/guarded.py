"""Decoding that survives its decoder: an image on which it hangs or dies costs that image, and some seconds.

The first attempt at a batch decodes in this process, with a watchdog: a decoder that takes `seconds` for one image ends
the process, as a segmentation fault or the kernel's want of memory does by itself. Ray then begins the task anew, in
another process. Such a second attempt decodes in a process of its own, with limits of time and memory: the image that
outlasts or kills that one is known, and becomes a row (`timeout`, `corrupt`, `too_large`).
"""

from __future__ import annotations

import faulthandler
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

import numpy as np

from pukd_ray.corpus.pixels import PixelSpec, decode_batch

IMAGE_SECONDS = 60.0
"""Longest time for one image; the slowest that is legal (89 million pixels) takes seven seconds."""
IMAGE_MEMORY = 4 << 30
"""Most bytes of memory of the supervised process."""
START_SECONDS = 120.0
REARM_SECONDS = 1.0  # the watchdog is a thread to start: not for each of many small images

Decoded = tuple[list[np.ndarray | None], list[str | None]]
"""Pixels uint8 [C, H, W] and None, or None and "reason: detail", of each image."""


def decode_guarded(
    images: Sequence[bytes | None], spec: PixelSpec, attempt: int = 0, seconds: float = IMAGE_SECONDS
) -> Decoded:
    """Decode each image; `attempt` is how often the task that does so was begun before."""
    if not attempt:
        with _watchdog(seconds) as alive:
            return decode_batch(images, spec, alive)
    with _one_at_a_time:
        pairs = [_kept(spec, seconds).decode(data) for data in images]
    return [pixels for pixels, _ in pairs], [reason for _, reason in pairs]


_busy = 0
_lock, _one_at_a_time = threading.Lock(), threading.Lock()


@contextmanager
def _watchdog(seconds: float) -> Iterator[Alive]:
    """Ends this process, whatever holds its lock, if `Alive` is not called for `seconds`."""
    global _busy
    with _lock:
        _busy += 1
    try:
        yield Alive(seconds)
    finally:
        with _lock:
            _busy -= 1
            if not _busy:
                faulthandler.cancel_dump_traceback_later()


class Alive:
    """Says that work goes on."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._armed = seconds, -REARM_SECONDS

    def __call__(self) -> None:
        """Say it."""
        if (now := time.monotonic()) >= self._armed + min(REARM_SECONDS, self._seconds / 10):
            self._armed = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)


# -- the supervised process -------------------------------------------------------------------------------------

_PIXELS, _REASON = b"p", b"r"


@lru_cache(maxsize=1)
def _kept(spec: PixelSpec, seconds: float) -> Supervised:
    """One for all batches of this process. When this process ends, the other does: nothing more comes in."""
    return Supervised(spec, seconds, IMAGE_MEMORY)


@dataclass
class Supervised:
    """Decodes image by image in a process with limits."""

    spec: PixelSpec
    seconds: float
    memory: int
    _process: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes | None) -> tuple[np.ndarray | None, str | None]:
        """(pixels, None) or (None, "reason: detail")."""
        if not data:
            return None, "empty: no bytes"
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack(">Q", len(data)) + data)
            process.stdin.flush()
            answer = self._answer(process, self.seconds)
        except TimeoutError:
            self.stop()
            return None, f"timeout: not decoded within {self.seconds:g} s"
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.stop()
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return None, f"corrupt: it ends the process that decodes it ({how})"
        if answer[:1] == _REASON:
            return None, answer[1:].decode()
        return np.frombuffer(bytearray(answer[1:]), np.uint8).reshape(self.spec.shape), None

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        setup = pickle.dumps((self.spec, self.memory))
        process.stdin.write(struct.pack(">Q", len(setup)) + setup)
        process.stdin.flush()
        self._answer(process, START_SECONDS)
        return process

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """What the process says next; TimeoutError, or EOFError if it is dead."""
        assert process.stdout is not None
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            (size,) = struct.unpack(">Q", _wait(process.stdout, 8, waiting, until))
            return _wait(process.stdout, size, waiting, until)


def _wait(source: IO[bytes], count: int, waiting: selectors.BaseSelector, until: float) -> bytes:
    pieces = b""
    while len(pieces) < count:
        if not waiting.select(max(0.0, until - time.monotonic())):
            raise TimeoutError
        piece = source.raw.read(count - len(pieces))  # type: ignore[attr-defined]  # past its buffer
        if not piece:
            raise EOFError
        pieces += piece
    return pieces


def serve() -> None:
    """The supervised process: images come on standard input, answers go to standard output."""
    import os
    import resource

    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    (size,) = struct.unpack(">Q", source.read(8))
    spec, memory = pickle.loads(source.read(size))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = _PIXELS
    while True:
        sink.write(struct.pack(">Q", len(answer)) + answer)
        sink.flush()
        header = source.read(8)
        if len(header) < 8:
            return
        (pixels,), (reason,) = decode_batch([source.read(*struct.unpack(">Q", header))], spec)
        answer = _REASON + str(reason).encode(errors="replace") if pixels is None else _PIXELS + pixels.tobytes()
