"""How does a bench run a whole live cluster, and what has it left behind at the end?

`serve` as a user starts it, with a configuration file, and `replay` against it; then all that must
be gone after it: processes, shared memory, directories.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from mooncake_bench.records import Run
from reference_cluster.transports.bytes import SHARED_MEMORY

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "mooncake_bench.cli"]
START_S_MAX, END_S_MAX = 60.0, 30.0
INVALID = 3  # Exit code of a replay whose client was too slow; its run is written all the same.


class LiveCluster:
    """A server that runs, and what it says of itself."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log
        self.client = httpx.Client(base_url=url, timeout=20.0)

    def get(self, path: str) -> Any:
        return self.client.get(path).json()

    def workers(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.get("/cluster/info")["workers"]}

    def total(self, count: str) -> float:
        """The sum of what the workers count; those that started anew began at 0."""
        return float(sum(row.get(count, 0.0) for row in self.workers().values()))

    @property
    def conductor_pid(self) -> int:
        """The supervisor's child that is no worker."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        pids = {int(pid) for pid in Path(children).read_text().split()}
        (found,) = pids - {row["pid"] for row in self.workers().values()}
        return found

    def unsettled(self) -> list[str]:
        """Books that do not balance, and whatever is held for somebody."""
        answer = self.get("/cluster/integrity")
        found = [f"{name}: {line}" for name, line in answer["problems"].items() if line]
        found += [f"{answer['in_flight']} requests in flight"] * bool(answer["in_flight"])
        for row in self.workers().values():
            if row["state"] != "member":
                found.append(f"{row['name']} is {row['state']}")
            for held in ("requests", "pinned_blocks", "lent", "coming", "streams"):
                if row.get(held):
                    found.append(f"{row['name']} {held}: {row[held]:g}")
        return found

    def settled(self, within_s: float = 15.0) -> list[str]:
        """What is still unsettled after so long; nothing as soon as nothing is."""
        end_s = time.monotonic() + within_s
        while (found := self.unsettled()) and time.monotonic() < end_s:
            time.sleep(0.1)
        return found


@contextmanager
def serving(
    config: str, scratch: Path, leftovers: list[str], *flags: str, start_s_max: float = START_S_MAX
) -> Iterator[LiveCluster]:
    """`serve` with this configuration; `leftovers` gets what is still there after its end."""
    path, log = scratch / "cluster.toml", scratch / "serve.log"
    path.write_text(config)
    with log.open("wb") as file:
        command = [*COMMAND, "serve", "--port", "0", "--config", str(path), *flags]
        process = subprocess.Popen(command, cwd=REPO, stdout=file, stderr=file)
        try:
            url = waited(lambda: said_url(log), start_s_max, lambda: process.poll() is not None)
            if url is None:
                raise RuntimeError(f"the cluster did not start: {log.read_text().strip()}")
            cluster = LiveCluster(url, process, log)
            yield cluster
            cluster.client.close()
        finally:
            process.terminate()
            try:
                process.wait(END_S_MAX)
            except subprocess.TimeoutExpired:
                leftovers.append("the server did not end")
                process.kill()
                process.wait()
    # The kernel takes a moment for the last processes and their memory.
    waited(lambda: not left_by(process.pid) or None, 5.0)
    leftovers += left_by(process.pid)


def said_url(log: Path) -> str | None:
    found = re.search(r"http://[^\s]+", log.read_text())
    return found.group() if found else None


def waited(
    ask: Callable[[], Any], within_s: float, is_over: Callable[[], bool] = lambda: False
) -> Any:
    """The first answer that is not None; None if there is none in time."""
    end_s = time.monotonic() + within_s
    while (answer := ask()) is None and time.monotonic() < end_s and not is_over():
        time.sleep(0.05)
    return answer


def left_by(supervisor: int) -> list[str]:
    """Processes, shared memory and directories of a cluster, by its supervisor's number."""
    mark = f"mcb-{supervisor}-"
    found = [str(path) for path in SHARED_MEMORY.glob(f"{mark}*")]
    found += [str(path) for path in Path(tempfile.gettempdir()).glob(f"{mark}*")]
    return found + [f"process {pid}" for pid in processes_with(mark)]


def processes_with(mark: str) -> list[int]:
    """Of all processes those whose command line has this mark, but zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_one = mark.encode() in path.read_bytes()
        except OSError:
            continue
        if is_one:
            found.append(int(path.parent.name))
    return found


@contextmanager
def replaying(url: str, trace: Path | str, out: Path, *flags: str) -> Iterator[None]:
    """`replay` beside what is done meanwhile; at the end it is waited for."""
    command = [*COMMAND, "replay", "--url", url, "--trace", str(trace), "--out", str(out), *flags]
    with (out.parent / f"{out.name}.log").open("wb") as file:
        process = subprocess.Popen(command, cwd=REPO, stdout=file, stderr=file)
        try:
            yield
            code = process.wait()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
    if code not in (0, INVALID):
        raise RuntimeError(f"the replay ended with {code}: {Path(file.name).read_text()[-500:]}")


def start_of(run: Run) -> float:
    """When a replay's clock read 0, on this machine's monotonic clock."""
    return float(run.info.client["start_perf_counter_s"])


def write_trace(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
