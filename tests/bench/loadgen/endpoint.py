"""What truly happened at the endpoint? The C mock, built, started on its core, and its log."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[3]
SOURCE = Path(os.environ.get("MOONCAKE_MOCK", REPO.parent / "shared" / "tools" / "mock_endpoint"))


class Unavailable(Exception):  # noqa: N818  # a reason to skip, not an error
    """What was to be measured is not on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request as the mock saw it; nanoseconds of the monotonic clock."""

    request_id: str
    received_ns: int
    first_ns: int
    last_ns: int
    tokens: int
    times_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mock:
    """A running mock; `served` ends it and reads what it logged."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    emits: Path | None

    def stats(self) -> dict[str, float]:
        """requests, tokens, span_s, conns so far."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/__stats", timeout=10) as answer:
            value: dict[str, float] = json.loads(answer.read())
        return value

    def served(self) -> list[Served]:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        times: dict[int, list[int]] = {}
        if self.emits is not None and self.emits.exists():
            for seq, at in np.fromfile(self.emits, dtype="<u8").reshape(-1, 2).tolist():
                times.setdefault(seq, []).append(at)
        with self.log.open() as file:
            return [
                Served(
                    row["xrid"],
                    int(row["t_recv_ns"]),
                    int(row["t_first_ns"]),
                    int(row["t_last_ns"]),
                    int(row["emitted"]),
                    tuple(times.get(int(row["seq"]), ())),
                )
                for row in csv.DictReader(file)
            ]


def build(directory: Path) -> Path:
    """The mock's program. Raises Unavailable."""
    if not (SOURCE / "mock.c").exists():
        raise Unavailable(f"no mock.c in {SOURCE}; set MOONCAKE_MOCK to its directory")
    program = directory / "mock"
    directory.mkdir(parents=True, exist_ok=True)
    if not program.exists() or program.stat().st_mtime < (SOURCE / "mock.c").stat().st_mtime:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Unavailable("no C compiler for the mock endpoint; install gcc")
        subprocess.run([compiler, "-O2", "-o", program, SOURCE / "mock.c"], check=True)
    return program


@contextlib.contextmanager
def running(
    program: Path, scratch: Path, core: int, ttft_ms: float, gap_ms: float, tokens: int
) -> Iterator[Mock]:
    """The mock on a free port; with gaps it also logs each token's time, and runs in real time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log, emits = scratch / "mock.csv", scratch / "mock.emits" if gap_ms else None
    command = ["taskset", "-c", str(core)]
    if gap_ms and subprocess.run(["chrt", "-f", "50", "true"], capture_output=True).returncode == 0:
        command += ["chrt", "-f", "50"]
    command += [str(program), "--port", str(port), "--tokens", str(tokens), "--log", str(log)]
    command += ["--ttft-us", str(int(ttft_ms * 1e3)), "--itl-us", str(int(gap_ms * 1e3))]
    command += ["--emits", str(emits)] if emits else []
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    mock = Mock(f"http://127.0.0.1:{port}", process, log, emits)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                mock.stats()
                break
            time.sleep(0.05)
        yield mock
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
