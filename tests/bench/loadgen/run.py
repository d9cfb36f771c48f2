"""How fast and how exact is our load generator, beside the others, on one core?

    .venv/bin/python tests/bench/loadgen/run.py [--parts ...] [--tools ...] [--check]

Every tool runs on one core against the C mock endpoint on another, whose log knows the true times.
Closed loop: req/s of 16 tokens over 64 streams, tokens/s of 256 over 32. Open loop (TTFT 50 ms,
gaps 10 ms, Poisson): schedule error is arrival at the server minus due time, TTFT and gap errors
are the tool's figure minus the mock's; where a tool tells no start, its schedule is laid at its
best. Bursts are 28 rows at one instant; "large" has a prompt of 126,000 tokens each second beside
50 req/s, whose own errors are left out. Every tool runs at --niceness (below 0 where root may),
which keeps a shared machine's other users out of the figures. Peers are installed by pip into
environments of their own under --env-dir, once; one that cannot be is skipped, with the reason.
`--check` ends with 1 and names each bound that is missed. Nothing runs it by itself: it needs a
calm machine.

The mock's source is found in MOONCAKE_MOCK (default ../shared/tools/mock_endpoint).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import endpoint
import measure
import tools
from endpoint import REPO, Unavailable
from rich.console import Console
from rich.table import Table
from workload import Part, parts

results = Console(width=150)
diagnostics = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure of a tool in a part, and the most (or, by a negative sign, the least) it may be."""

    part: str
    tool: str
    figure: str
    most: float

    def missed(self, value: float) -> bool:
        return not (value >= -self.most if self.most < 0 else value <= self.most)


def _open_bounds(part: str, tool: str) -> list[Bound]:
    limits = {"schedule_ms.p50": 0.15, "schedule_ms.p99": 2.0, "ttft_ms.p50": 0.1}
    limits |= {"ttft_ms.p99": 1.5, "gap_ms.p99": 1.0}
    return [Bound(part, tool, figure, most) for figure, most in limits.items()]


BOUNDS = (
    Bound("closed16", tools.OURS, "req_s", -20_000),
    Bound("closed256", tools.OURS, "tok_s", -1_200_000),
    Bound("closed16", tools.OURS, "times_best_llm_peer", -50),
    Bound("closed16", tools.OURS, "times_locust", -5),
    *(bound for rate in (50, 200, 500) for bound in _open_bounds(f"open{rate}", tools.OURS)),
    Bound("open500", tools.OURS, "cpu", 0.35),
    *(Bound(f"open{rate}", tools.OURS, "rss_mb", 120) for rate in (50, 200, 500, 1000)),
    *(Bound("open1000", tools.OURS, f"{kind}.p99", 5.0) for kind in ("schedule_ms", "ttft_ms")),
    Bound("bursts", tools.OURS, "schedule_ms.p99", 3.0),
    Bound("large", tools.OURS, "ttft_ms.p99", 2.0),
    *(
        bound
        for tool in tools.TOOLS
        if tool.name.startswith("ours, Locust")
        for bound in (
            *_open_bounds("open500", tool.name),
            Bound("open500", tool.name, "sent_once", -1),
            Bound("open500", tool.name, "missing_samples", 0),
        )
    ),
)


def main() -> int:
    """Measure, print, write JSON; the exit code."""
    options = parse_options()
    os.sched_setaffinity(0, {options.mock_core})
    try:
        program = endpoint.build(options.env_dir / "mock")
    except Unavailable as reason:
        diagnostics.print(f"skipped: {reason}", highlight=False, soft_wrap=True)
        return 0
    outcome = run_all(options, program)
    add_ratios(outcome)
    show(outcome)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(outcome, indent=2) + "\n")
    results.print(f"written to {options.json}", highlight=False, soft_wrap=True)
    missed = judge(outcome) if options.check else []
    for line in missed:
        diagnostics.print(line, highlight=False, soft_wrap=True)
    return int(bool(missed))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cores = sorted(os.sched_getaffinity(0))
    parser.add_argument("--parts", nargs="+", default=list(parts(1.0)), choices=list(parts(1.0)))
    parser.add_argument("--tools", nargs="+", help="names as in the table, or their beginnings")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each part")
    parser.add_argument("--env-dir", type=Path, default=REPO / "build" / "bench-loadgen")
    parser.add_argument("--json", type=Path, default=REPO / "build" / "bench-loadgen.json")
    parser.add_argument("--core", type=int, default=cores[-1], help="of the tools")
    parser.add_argument("--mock-core", type=int, default=cores[0])
    best = -15 if os.geteuid() == 0 else 0
    parser.add_argument("--niceness", type=int, default=best, help="of all tools alike")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    options = parser.parse_args()
    if len(cores) < 2:
        parser.error("the mock and the tools need a core each; this machine has one")
    return options


def run_all(options: argparse.Namespace, program: Path) -> dict[str, Any]:
    """{"measured": {part: {tool: figures}}, "skipped": {tool or "tool, part": reason}}."""
    outcome: dict[str, Any] = {"machine": _machine(), "measured": {}, "skipped": {}}
    outcome["machine"]["niceness"] = options.niceness
    ready: list[tools.Tool] = []
    bench = tools.Bench(options.env_dir.absolute(), options.core, Path(), options.niceness)
    for tool in tools.TOOLS:
        if options.tools and not any(tool.name.startswith(name) for name in options.tools):
            continue
        try:
            if tool.package:
                tools.environment(bench, tool)
            ready.append(tool)
        except Unavailable as reason:
            outcome["skipped"][tool.name] = str(reason)
    for part in (parts(options.seconds)[name] for name in options.parts):
        for tool in ready:
            if part.name in tool.parts:
                run_one(options, program, part, tool, outcome)
    return outcome


def run_one(
    options: argparse.Namespace,
    program: Path,
    part: Part,
    tool: tools.Tool,
    outcome: dict[str, Any],
) -> None:
    """Measure one tool in one part into the outcome."""
    diagnostics.print(f"{time.strftime('%H:%M:%S')} {part.name}: {tool.name}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="bench-loadgen-") as directory:
        scratch = Path(directory)
        place = options.env_dir.absolute()
        bench = tools.Bench(place, options.core, scratch, options.niceness)
        timing = (part.ttft_ms, part.gap_ms, part.tokens)
        try:
            with endpoint.running(program, scratch, options.mock_core, *timing) as server:
                report, usage = tool.run(bench, part, server)
                stats = server.stats()
                served = server.served()
        except (Unavailable, KeyError, IndexError, OSError) as reason:
            outcome["skipped"][f"{tool.name}, {part.name}"] = str(reason)
            return
        if part.is_open:
            figures = measure.open_figures(part, served, report, usage)
            figures["missing_samples"] = len(part.rows) - figures["samples"]
        else:
            last = max((one.last_ns for one in served), default=0) / 1e9
            figures = measure.closed_figures(stats, usage, last)
            figures["samples"] = len(report.by_request) or len(report.ttft_ms)
    outcome["measured"].setdefault(part.name, {})[tool.name] = figures


def add_ratios(outcome: dict[str, Any]) -> None:
    """How many times the others' throughput ours is, in this run."""
    closed = outcome["measured"].get("closed16", {})
    if tools.OURS not in closed:
        return
    mine = closed[tools.OURS]
    peers = [closed[name]["req_s"] for name in tools.LLM_PEERS if name in closed]
    if peers:
        mine["times_best_llm_peer"] = mine["req_s"] / max(peers)
    if "Locust FastHttpUser" in closed:
        mine["times_locust"] = mine["req_s"] / closed["Locust FastHttpUser"]["req_s"]


def judge(outcome: dict[str, Any]) -> list[str]:
    """A line for each bound that is missed; what was not measured is not judged."""
    lines = []
    for bound in BOUNDS:
        figures: Any = outcome["measured"].get(bound.part, {}).get(bound.tool)
        for key in bound.figure.split("."):
            figures = figures.get(key) if isinstance(figures, dict) else None
        if figures is not None and bound.missed(float(figures)):
            word = "at least" if bound.most < 0 else "at most"
            lines.append(
                f"missed: {bound.tool}, {bound.part}: {bound.figure} is {float(figures):,.3f}, "
                f"bound {word} {abs(bound.most):,g}"
            )
    return lines


def show(outcome: dict[str, Any]) -> None:
    """One table; errors as p50 / p99 / largest in ms."""
    columns = [
        "part",
        "tool",
        "req/s",
        "tok/s",
        "schedule error",
        "TTFT error",
        "gap error",
        "core",
        "MB",
        "served",
    ]
    table = Table(*columns, title="load generators on one core; errors in ms: p50 / p99 / max")
    for part, by_tool in outcome["measured"].items():
        for tool, figures in by_tool.items():
            served = f"{figures.get('served', figures.get('requests', 0)):,}"
            if "planned" in figures:
                served += f" of {figures['planned']:,}"
            table.add_row(
                part,
                tool,
                _number(figures.get("req_s")),
                _number(figures.get("tok_s")),
                *(_errors(figures.get(f"{kind}_ms")) for kind in ("schedule", "ttft", "gap")),
                f"{figures.get('cpu', math.nan):.0%}",
                f"{figures.get('rss_mb', math.nan):.0f}",
                served,
            )
        table.add_section()
    results.print(table)
    mine = outcome["measured"].get("closed16", {}).get(tools.OURS, {})
    for figure, word in (("times_best_llm_peer", "the best LLM peer"), ("times_locust", "Locust")):
        if figure in mine:
            results.print(f"closed16: ours is {mine[figure]:.1f} times {word}", highlight=False)
    for name, reason in outcome["skipped"].items():
        results.print(f"skipped: {name}: {reason}", highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _errors(spread: dict[str, float] | None) -> str:
    if not spread:
        return ""
    return " / ".join(
        f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in spread.values()
    )


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": sys.version.split()[0],
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


if __name__ == "__main__":
    sys.exit(main())
