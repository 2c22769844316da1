"""A process that drives one run after the other, as a service would; it is killed, or lives through all of it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import psutil

ANSWER_SECONDS = 600.0


def serve() -> None:
    """Runs come on standard input, a line of JSON each: config file and overrides; so go what came of them."""
    from pukd_ray import load_config, run_pipeline
    from pukd_ray.runtime.engine import cause_of

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a run prints is no answer
    for line in sys.stdin:
        asked, told = json.loads(line), None
        try:
            run_pipeline(load_config(asked["config"], asked["overrides"]))
        except Exception as error:
            told = cause_of(error)
        gc.collect()
        me = psutil.Process()
        answer = {"error": told, "bytes": me.memory_info().rss, "files": me.num_fds()}
        answers.write(json.dumps(answer) + "\n")


class Driver:
    """Such a process, from outside."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
            )
        self._answers: Queue[dict[str, Any] | None] = Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        threading.Thread(target=self._outlive, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(json.loads(line))

    def _outlive(self) -> None:
        """Its output does not end with it where a process that it started holds it open."""
        self.process.wait()
        self._listener.join(1.0)  # what it said last comes first
        self._answers.put(None)

    def ask(self, config: Path, overrides: dict[str, Any]) -> None:
        """Begin a run."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"config": str(config), "overrides": overrides}) + "\n")
        self.process.stdin.flush()

    @property
    def answered(self) -> bool:
        """Whether the run has ended, or the process has."""
        return not self._answers.empty()

    def answer(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any] | None:
        """What came of the run: its error or None, the process's memory in bytes, its open files. None: it is dead.

        RuntimeError if nothing comes for so long.
        """
        try:
            return self._answers.get(timeout=seconds)
        except Empty:
            raise RuntimeError(f"soak: a run has not ended within {seconds:g} s: its driver hangs") from None

    def end(self) -> None:
        """End the process, if there is one."""
        self.process.kill()
        self.process.wait()
