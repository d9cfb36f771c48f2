"""What does the whole tool look like in three minutes? Live and simulated, side by side."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mooncake_bench.records import Run, read_run
from mooncake_bench.report import write_report
from mooncake_bench.simulation import simulate_trace
from reference_cluster.config import load_config
from reference_cluster.cost_model import load_profile
from reference_cluster.errors import ServeError
from workloads.trace import open_trace

TRACE = "conversation-like"
# Two prefill instances at about 0.6 of what they can do: an eighth of the published rate for each.
LIVE_RATE_RPS = 0.85
LOCUSTFILE = Path(__file__).parent / "replay" / "locustfile.py"
ANSWER_S_MAX = 120.0  # After the last arrival, for the longest outputs.

LIVE = {
    "live-2p2d": ("2P+2D", ["--prefill", "2", "--decode", "2"]),
    "live-4-colocated": ("4 colocated", ["--instances", "4", "--scheduling", "least-loaded"]),
}
SIMULATED: dict[str, dict[str, Any]] = {
    "simulated-8p8d": {"prefill_instances": 8, "decode_instances": 8},
    "simulated-16-colocated": {
        "system": "colocated",
        "colocated_instances": 16,
        "conductor.scheduling": "least-loaded",
    },
}


def run_demo(out: Path, live_s: float, say: Callable[[str], None]) -> Path:
    """Replay a generated conversation-like trace on 4 live and 16 simulated nodes.

    Each is split in prefill and decode instances, then colocated. Takes about twice `live_s` and
    half a minute; returns the report's path.
    """
    runs = [simulated(out / name, name, say) for name in SIMULATED]
    runs = [live(out / name, name, live_s, say) for name in LIVE] + runs
    page = write_report(runs, out / "report.html")
    say(f"open {page}")
    return page


def simulated(directory: Path, name: str, say: Callable[[str], None]) -> Run:
    """An hour in virtual time."""
    config = load_config(None, SIMULATED[name])
    say(f"simulating an hour of {TRACE} on {config.title}")
    profile = load_profile(config.profile)
    return simulate_trace(open_trace(TRACE), config, profile, directory, name=config.title)


def live(directory: Path, name: str, live_s: float, say: Callable[[str], None]) -> Run:
    """A short stretch in real time: Locust replays against a cluster that runs beside it."""
    title, flags = LIVE[name]
    say(f"replaying {live_s:.0f} s of {TRACE} with Locust against a live {title}")
    trace = f"{TRACE}:rate_rps={LIVE_RATE_RPS},duration_s={live_s}"
    with serving(flags) as url:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
        command += ["--url", url, "--trace", trace, "--name", title, "--out", str(directory)]
        command += ["--loglevel", "ERROR", "--only-summary", "--exit-code-on-error", "0"]
        log = directory.with_suffix(".locust.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            done = subprocess.run(
                command, stdout=file, stderr=file, timeout=live_s + ANSWER_S_MAX, check=False
            )
        # 3: the run is invalid, and says so itself in the report.
        if done.returncode not in (0, 3):
            last = log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
            raise ServeError(f"locust ended with {done.returncode}: {last}; see {log}")
    return read_run(directory)


@contextmanager
def serving(flags: list[str]) -> Iterator[str]:
    """A live cluster in a process of its own, on a free port; yields its URL."""
    command = [sys.executable, "-m", "mooncake_bench.cli", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            found = re.search(r"http://\S+", line)
            if not found:
                raise ServeError(f"the live cluster did not start: {line.strip()}")
            yield found.group()
        finally:
            server.terminate()
