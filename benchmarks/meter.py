"""What a command costs: seconds, CPU seconds by process, peak memory; read from /proc while it runs.

python -m benchmarks.meter python jobs/full_pipeline.py --output /tmp/demo
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
PAUSE = 0.2


@dataclass
class Cost:
    """Of a command and all of its descendants."""

    seconds: float = 0.0
    """From start to end of the command."""
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU seconds by what the processes did; of processes that Ray reuses, by all that they did."""
    peak_mib: dict[str, float] = field(default_factory=dict)
    """Peak resident memory of the driver, of all workers together, and of the object store."""
    said: dict[str, Any] = field(default_factory=dict)
    """The command's last line, if it is JSON; else `last` has its text."""


def _role(name: str, is_driver: bool) -> str:
    if is_driver:
        return "driver"
    if name.startswith("ray::"):
        return name[5:].strip().split(" ")[0].split("(")[0] if "MapWorker" not in name else name[5:].strip()
    program = name.split(" ")[0].rpartition("/")[2]
    if program in ("raylet", "gcs_server"):
        return program
    return "worker" if "spawn" in name or "daft" in name else "Ray's own"


def measure(command: Sequence[str], env: dict[str, str] | None = None) -> Cost:
    """Run `command`. RuntimeError, with the end of what it wrote, if it fails."""
    cost, began = Cost(), time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    ours, cpu = {process.pid}, dict[int, float]()
    roles: defaultdict[int, dict[str, None]] = defaultdict(dict)
    peak: defaultdict[str, float] = defaultdict(float)
    while process.poll() is None:
        now: defaultdict[str, float] = defaultdict(float)
        for pid in sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
            try:
                stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                if pid not in ours and int(stat[1]) not in ours:
                    continue
                name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                status = Path(f"/proc/{pid}/status").read_text()
            except (OSError, IndexError):
                continue
            ours.add(pid)
            memory = {line.split(":")[0]: line.split() for line in status.splitlines() if line.startswith("Rss")}
            own = sum(int(memory[k][1]) for k in ("RssAnon",) if k in memory) / 1024
            shared = int(memory["RssShmem"][1]) / 1024 if "RssShmem" in memory else 0.0
            role = _role(name, pid == process.pid)
            cpu[pid] = (int(stat[11]) + int(stat[12])) / TICKS
            roles[pid][role] = None
            if role == "raylet":
                now["object store"] += shared
            now["driver" if role == "driver" else "Ray's own" if role in _SYSTEM else "workers"] += own
        for what, value in now.items():
            peak[what] = max(peak[what], value)
        time.sleep(PAUSE)
    cost.seconds = time.time() - began
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{(out + err)[-3000:]}")
    totals: defaultdict[str, float] = defaultdict(float)
    for pid, seconds in cpu.items():
        did = [r for r in roles[pid] if r not in ("IDLE", "Ray's own")] or list(roles[pid])
        totals[" + ".join(dict.fromkeys(did))] += seconds
    cost.cpu = {k: round(v, 2) for k, v in totals.items() if v >= 0.05}
    cost.peak_mib = {k: round(v, 1) for k, v in peak.items()}
    last = (out.strip().splitlines() or [""])[-1]
    cost.said = json.loads(last) if last.startswith("{") else {"last": last}
    return cost


_SYSTEM = frozenset({"raylet", "gcs_server", "Ray's own"})


def main(command: Sequence[str]) -> None:
    """Run a command and print what it cost."""
    load = os.getloadavg()[0]
    cost = measure(command)
    print(f"{cost.seconds:.1f} s, CPU {sum(cost.cpu.values()):.1f} s; load average before it {load:.1f}")
    for did, seconds in sorted(cost.cpu.items(), key=lambda item: -item[1]):
        print(f"{seconds:8.2f} s  {did}")
    print("peak MiB: " + ", ".join(f"{what} {value:,.0f}" for what, value in sorted(cost.peak_mib.items())))
    print(json.dumps(cost.said))


if __name__ == "__main__":
    main(sys.argv[1:])
