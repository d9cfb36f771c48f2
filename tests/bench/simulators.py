"""How many CPU seconds does an hour of traffic take to simulate, here and in Dynamo's Rust replay?

    .venv/bin/python tests/bench/simulators.py [--check] [--env-dir build/bench-dynamo]

One run measures all: `mooncake-bench simulate` of Mooncake's whole conversation trace with 8P+8D
and with 16 colocated instances, and `dynamo.replay` with 10P+10D and its KV router. Each is a
process of its own on one and the same core, in turns, three times; CPU seconds are those of the
whole process (user + system, start-up and writing included), and the medians are compared. No
absolute time is a bound; `--check` ends with 1 where Dynamo takes less than 2.5 times our CPU.

The trace is found in MOONCAKE_TRACES (default ../shared/traces beside the repository). Dynamo goes
into a virtual environment under --env-dir, made once; where that fails the rest is still measured.
Its log is off (it writes two lines a request), so that its simulation is what is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPO = Path(__file__).resolve().parents[2]
TRACE = "conversation_trace.jsonl"
RATIO_MIN = 2.5
DYNAMO_VERSION = "1.6.1"
# The plain install pulls a stub package that downloads from elsewhere, and fails.
DYNAMO = (f"ai-dynamo=={DYNAMO_VERSION}", f"ai-dynamo-runtime=={DYNAMO_VERSION}")
DYNAMO_NEEDS = (
    "aiohttp", "certifi", "kubernetes>=32.0.1,<33", "msgspec", "prometheus-client", "pyzmq",
    "redis", "tqdm", "zstandard<1", "pydantic<=2.13.5", "uvloop", "numpy", "pyyaml", "packaging",
)  # fmt: skip  # one a line would be half a page
BLOCK_TOKENS, DYNAMO_BLOCKS = 512, 2500  # 2,500 blocks of 512 tokens of KV on each of its workers.
OURS, COLOCATED, PEER = "ours, 8P+8D", "ours, 16 colocated", "dynamo.replay, 10P+10D"

results = Console()
diagnostics = Console(stderr=True)


class Unavailable(Exception):  # noqa: N818  # a reason to skip, not an error
    """What was to be measured is not on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Simulator:
    """A command, and the JSON summary it leaves, with the keys that count its requests."""

    name: str
    command: tuple[str, ...]
    summary: Path
    accounted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process took, in seconds and bytes, and the requests it accounted for."""

    cpu_s: float
    wall_s: float
    rss_bytes: int
    requests: int


def main() -> int:
    """Measure, print, write JSON; the exit code."""
    options = parse_options()
    try:
        trace = find_trace()
    except Unavailable as reason:
        diagnostics.print(f"skipped: {reason}", highlight=False, soft_wrap=True)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-simulators-") as scratch:
        cut = cut_trace(trace, options.requests, Path(scratch))
        outcome = compare(cut, options, Path(scratch))
    show(outcome)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(outcome, indent=2) + "\n")
    results.print(f"written to {options.json}", highlight=False, soft_wrap=True)
    ratio = outcome["ratio"]
    if options.check and ratio is None:
        diagnostics.print("not checked: there is nothing to compare with", highlight=False)
    return int(options.check and ratio is not None and ratio < RATIO_MIN)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--env-dir", type=Path, default=REPO / "build" / "bench-dynamo")
    parser.add_argument("--json", type=Path, default=REPO / "build" / "bench-simulators.json")
    parser.add_argument("--repeats", type=int, default=3, help="of each; medians are compared")
    parser.add_argument("--requests", type=int, default=0, help="the first N only; 0: all")
    parser.add_argument("--core", type=int, help="core to measure on (default: the last usable)")
    parser.add_argument(
        "--check", action="store_true", help=f"exit 1 if Dynamo / ours is below {RATIO_MIN}"
    )
    options = parser.parse_args()
    if options.repeats < 1 or options.requests < 0:
        parser.error("--repeats must be at least 1 and --requests at least 0")
    if options.core is not None and options.core not in usable_cores():
        parser.error(f"--core {options.core} is not usable; use one of {usable_cores()}")
    return options


def compare(trace: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All measurements as one JSON object; `ratio` is None where Dynamo could not be installed."""
    simulators = [ours(OURS, trace, scratch), ours(COLOCATED, trace, scratch)]
    skipped = None
    try:
        python = dynamo_environment(options.env_dir)
        simulators.append(dynamo(python, trace, scratch))
    except Unavailable as reason:
        skipped = str(reason)
    load = os.getloadavg()[0]
    cores = usable_cores()
    core = pin(options.core)
    requests = sum(1 for line in trace.open("rb") if line.strip())
    runs: dict[str, list[Usage]] = {one.name: [] for one in simulators}
    for turn in range(options.repeats):
        # In turns, so that a busy minute of the machine falls on all of them.
        for one in simulators:
            diagnostics.print(f"{turn + 1}/{options.repeats} {one.name}", highlight=False)
            usage = measure(one, scratch)
            assert usage.requests == requests, f"{one.name}: {usage.requests} of {requests} ended"
            runs[one.name].append(usage)
    split = {one.name: stages(one, scratch) for one in simulators[:2]}
    if cores:
        os.sched_setaffinity(0, cores)
    medians = {name: median(usages) for name, usages in runs.items()}
    cpu_s = {name: usage.cpu_s for name, usage in medians.items()}
    return {
        "trace": {"name": TRACE, "requests": requests},
        "medians": {name: asdict(usage) for name, usage in medians.items()},
        "runs": {name: [asdict(usage) for usage in usages] for name, usages in runs.items()},
        "stages_cpu_s": split,
        "ratio": cpu_s[PEER] / cpu_s[OURS] if PEER in cpu_s else None,
        "ratio_min": RATIO_MIN,
        "skipped": skipped,
        "dynamo": DYNAMO_VERSION,
        "core": core,
        "load_before": load,
        "machine": machine(),
    }


# ---- what is measured ------------------------------------------------------------------------


def ours(name: str, trace: Path, scratch: Path) -> Simulator:
    """`mooncake-bench simulate`, on the reference system or on the colocated baseline."""
    out = scratch / name.replace(" ", "-")
    system = {
        OURS: "--prefill 8 --decode 8 --scheduling kvcache-centric",
        COLOCATED: "--instances 16 --batching prefill-first --scheduling least-loaded",
    }[name]
    command = ["simulate", "--trace", str(trace), "--out", str(out), *system.split()]
    return Simulator(
        name,
        (sys.executable, "-m", "mooncake_bench.cli", *command),
        out / "summary.json",
        ("finished", "rejected", "failed"),
    )


def dynamo(python: Path, trace: Path, scratch: Path) -> Simulator:
    """Dynamo's offline replay with its KV-aware router."""
    report = scratch / "dynamo.json"
    script = Path(__file__).with_name("dynamo_replay.py")
    numbers = (str(number) for number in (BLOCK_TOKENS, 10, 10, DYNAMO_BLOCKS))
    command = (str(python), str(script), str(trace), str(report), *numbers)
    return Simulator(PEER, command, report, ("completed_requests",))


def find_trace() -> Path:
    directory = Path(os.environ.get("MOONCAKE_TRACES", REPO / ".." / "shared" / "traces"))
    if not (directory / TRACE).is_file():
        raise Unavailable(f"{TRACE} is not here; set MOONCAKE_TRACES to the directory it is in")
    return (directory / TRACE).resolve()


def cut_trace(trace: Path, requests: int, scratch: Path) -> Path:
    """The first rows as a file of their own: Dynamo has no flag for it. 0 keeps all."""
    if not requests:
        return trace
    cut = scratch / TRACE
    with trace.open("rb") as whole, cut.open("wb") as file:
        file.writelines(line for _, line in zip(range(requests), whole, strict=False))
    return cut


def dynamo_environment(directory: Path) -> Path:
    """The Python of a virtual environment with Dynamo in it, made on the first call."""
    python = directory / "bin" / "python"
    complete = directory / f"has-dynamo-{DYNAMO_VERSION}"  # Written last: half a one is made anew.
    if complete.exists():
        return python
    diagnostics.print(f"installing Dynamo into {directory}", highlight=False, soft_wrap=True)
    install = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    attempt(sys.executable, "-m", "venv", "--clear", str(directory))
    attempt(*install, "--no-deps", *DYNAMO)
    attempt(*install, *DYNAMO_NEEDS)
    attempt(str(python), "-c", "import dynamo.replay")
    complete.touch()
    return python


def attempt(*command: str) -> None:
    """Run a step of the installation; raises Unavailable with its last words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"Dynamo cannot be installed here: {last}")


# ---- measuring -------------------------------------------------------------------------------


def usable_cores() -> list[int]:
    # macOS has no affinity: nothing can be pinned there.
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(core: int | None) -> int | None:
    """Keep this process, and with it all it starts, on one core; which one, None if it cannot."""
    cores = usable_cores()
    if not cores:
        return None
    chosen = cores[-1] if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


def measure(simulator: Simulator, scratch: Path) -> Usage:
    """Run it once from the start of its process to the end."""
    simulator.summary.unlink(missing_ok=True)
    cpu_s, wall_s, rss_bytes = run(simulator.command, scratch)
    summary = json.loads(simulator.summary.read_text())
    requests = sum(int(summary[key]) for key in simulator.accounted)
    return Usage(cpu_s, wall_s, rss_bytes, requests)


def run(command: tuple[str, ...], scratch: Path, **env: str) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and peak bytes of a process; raises RuntimeError if it fails."""
    log = scratch / "log.txt"
    with log.open("wb") as file:
        began_s = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=REPO,
            stdout=file,
            stderr=file,
            env={**os.environ, "DYN_LOG": "off", **env},
        )
        # wait4 is the only one that tells the use of this very child. Its peak begins with this
        # process's own size, which is why nothing large is imported here before the end.
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail(log)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return used.ru_utime + used.ru_stime, wall_s, used.ru_maxrss * unit


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def stages(simulator: Simulator, scratch: Path) -> dict[str, float]:
    """CPU seconds of each stage of one more run of ours; they add up to the whole process."""
    out = scratch / "stages.json"
    script = Path(__file__).with_name("simulate_stages.py")
    arguments = simulator.command[3:]
    command = (sys.executable, str(script), str(out), *arguments)
    # `-m` has this checkout come first; a script needs to be told.
    cpu_s, _, _ = run(command, scratch, PYTHONPATH=str(REPO))
    passed: Mapping[str, float] = json.loads(out.read_text())
    return {
        "start-up": passed["load_trace begins"],
        "reading": passed["simulate begins"] - passed["load_trace begins"],
        "simulating": passed["simulate ends"] - passed["simulate begins"],
        "summarising, writing, exit": cpu_s - passed["simulate ends"],
    }


def median(usages: list[Usage]) -> Usage:
    """Each column's own median."""
    return Usage(
        statistics.median(one.cpu_s for one in usages),
        statistics.median(one.wall_s for one in usages),
        round(statistics.median(one.rss_bytes for one in usages)),
        usages[0].requests,
    )


def machine() -> dict[str, Any]:
    from mooncake_bench.records import fingerprint  # Large: only when all is measured.

    return fingerprint()


# ---- showing ---------------------------------------------------------------------------------


def show(outcome: Mapping[str, Any]) -> None:
    """The table, the stages and the ratio, on stdout."""
    table = Table("", "CPU s", "wall s", "peak MB", "requests / CPU s", "CPU, ours = 1", box=None)
    base_s = outcome["medians"][OURS]["cpu_s"]
    for name, row in outcome["medians"].items():
        each = ", ".join(f"{one['cpu_s']:.2f}" for one in outcome["runs"][name])
        table.add_row(
            name,
            f"{row['cpu_s']:.2f} ({each})",
            f"{row['wall_s']:.2f}",
            f"{row['rss_bytes'] / 1e6:.0f}",
            f"{row['requests'] / row['cpu_s']:,.0f}",
            f"{row['cpu_s'] / base_s:.2f}",
        )
    # Wide enough for the table, whatever the terminal: it is read in logs too.
    Console(width=max(results.width, 110)).print(table, highlight=False)
    for name, parts in outcome["stages_cpu_s"].items():
        line = " · ".join(f"{stage} {cpu_s:.2f}" for stage, cpu_s in parts.items())
        results.print(f"{name}, CPU s: {line}", highlight=False, soft_wrap=True)
    if outcome["skipped"]:
        diagnostics.print(f"{PEER} skipped: {outcome['skipped']}", highlight=False, soft_wrap=True)
    else:
        verdict = f"Dynamo / ours, CPU seconds: {outcome['ratio']:.2f} (at least {RATIO_MIN})"
        results.print(verdict, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
