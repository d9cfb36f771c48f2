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
from mooncake_bench.slo import parse_slo
from reference_cluster.config import load_config
from reference_cluster.cost_model import load_profile
from reference_cluster.errors import ServeError
from workloads.trace import open_trace

TRACE = "conversation-like"
PROFILE = "h100-llama3-70b"
SLO = "ttft<10s,tbt<50ms"
# Requests a second and node at which prefill instances are busy about 0.6 of the time.
NODE_RATE_RPS = 0.525
LOCUSTFILE = Path(__file__).parent / "replay" / "locustfile.py"
ANSWER_S_MAX = 120.0  # After the last arrival, for the longest outputs.

CHUNKED = {"colocated.batching": "chunked", "colocated.prefix_caching": True}
LIVE = {
    "live-2p2d": ("2P+2D", ["--prefill", "2", "--decode", "2"]),
    "live-4-colocated": (
        "4 colocated",
        ["--instances", "4", "--batching", "chunked", "--prefix-caching"],
    ),
}
SIMULATED: dict[str, tuple[str, dict[str, Any]]] = {
    "simulated-8p8d": ("8P+8D", {"prefill_instances": 8, "decode_instances": 8}),
    "simulated-16-colocated": ("16 colocated", {"system": "colocated", **CHUNKED}),
    "simulated-16-colocated-prefill-first": (
        "16 colocated, prefill-first",
        {"system": "colocated", "conductor.scheduling": "least-loaded"},
    ),
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
    """An hour in virtual time on 16 nodes."""
    title, overrides = SIMULATED[name]
    slo = parse_slo(SLO)
    overrides = {**overrides, "profile": PROFILE}
    config = load_config(None, {**overrides, "slo.ttft_s": slo.ttft_s, "slo.tbt_s": slo.tbt_s})
    say(f"simulating an hour of {TRACE} on {title}")
    trace = open_trace(f"{TRACE}:rate_rps={16 * NODE_RATE_RPS}")
    return simulate_trace(trace, config, load_profile(PROFILE), directory, name=title)


def live(directory: Path, name: str, live_s: float, say: Callable[[str], None]) -> Run:
    """A short stretch in real time on 4 nodes: Locust replays against a cluster beside it."""
    title, flags = LIVE[name]
    say(f"replaying {live_s:.0f} s of {TRACE} with Locust against a live {title}")
    trace = f"{TRACE}:rate_rps={4 * NODE_RATE_RPS},duration_s={live_s}"
    with serving([*flags, "--profile", PROFILE, "--slo", SLO]) as url:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
        command += ["--url", url, "--trace", trace, "--slo", SLO]
        command += ["--name", title, "--out", str(directory)]
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
