"""How far is what a tool reports from what happened? Errors in milliseconds, shares of a core."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from endpoint import Served
from workload import LARGE_TOKENS, Part


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as the tool reports it; nanoseconds of the monotonic clock."""

    sent_ns: float
    times_ns: list[float]


@dataclass(slots=True)
class Report:
    """What a tool says: by request where it can be matched, else only the times to first token."""

    start_ns: float | None = None
    by_request: dict[str, Seen] = field(default_factory=dict)
    ttft_ms: list[float] = field(default_factory=list)
    has_own_times: bool = False
    """It replays no trace: there is no schedule to hold it to."""


@dataclass(slots=True)
class Usage:
    """CPU seconds and memory of a process and all below it, sampled."""

    at: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    rss_bytes: list[float] = field(default_factory=list)

    def share(self, begin: float, end: float) -> float:
        """Share of a core between two moments of time.perf_counter()."""
        if len(self.at) < 2 or end <= begin:
            return float("nan")
        used = np.interp([begin, end], self.at, self.cpu_s)
        return float((used[1] - used[0]) / (end - begin))


@contextlib.contextmanager
def watched(*pids: int, every_s: float = 0.1) -> Iterator[Usage]:
    """Sample these processes and all below them until the block ends."""
    usage, is_over = Usage(), threading.Event()
    ended: dict[int, float] = {}

    def sample() -> None:
        roots = [psutil.Process(pid) for pid in pids]
        while not is_over.wait(every_s):
            rss = 0
            for one in _families(roots):
                with contextlib.suppress(psutil.Error), one.oneshot():
                    times = one.cpu_times()
                    ended[one.pid] = times.user + times.system
                    rss += one.memory_info().rss
            usage.at.append(time.perf_counter())
            usage.cpu_s.append(sum(ended.values()))
            usage.rss_bytes.append(rss)

    thread = threading.Thread(target=sample, name="watch-usage", daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        is_over.set()
        thread.join()


def _families(roots: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for root in roots:
        with contextlib.suppress(psutil.Error):
            found += [root, *root.children(recursive=True)]
    return found


def closed_figures(stats: dict[str, float], usage: Usage, served_until: float) -> dict[str, Any]:
    """Throughput as the mock counted it."""
    span_s = stats["span_s"] or float("nan")
    return {
        "requests": int(stats["requests"]),
        "req_s": stats["requests"] / span_s,
        "tok_s": stats["tokens"] / span_s,
        "cpu": usage.share(served_until - span_s, served_until),
        "rss_mb": max(usage.rss_bytes, default=0) / 1e6,
    }


def open_figures(part: Part, served: list[Served], report: Report, usage: Usage) -> dict[str, Any]:
    """Errors of schedule, TTFT and gaps; p50, p99 and largest, milliseconds."""
    rows = {str(number): row for number, row in enumerate(part.rows)}
    mine = [one for one in served if one.tokens and one.request_id not in ("-1",)]
    figures: dict[str, Any] = {
        "planned": len(part.rows),
        "served": len(mine),
        "sent_once": sorted(one.request_id for one in mine) == sorted(rows),
        "samples": len(report.by_request) or len(report.ttft_ms),
        "schedule_ms": _schedule_ms(part, mine, report),
    }
    if mine:
        begin = min(one.received_ns for one in mine) / 1e9
        end = max(one.last_ns for one in mine) / 1e9
        figures["cpu"] = usage.share(begin, end)
        inside = [rss for at, rss in zip(usage.at, usage.rss_bytes, strict=True) if at <= end]
        # While it sends; what reading a trace or writing results takes is in the other one.
        figures["rss_mb"] = max(inside, default=0) / 1e6
        figures["rss_peak_mb"] = max(usage.rss_bytes, default=0) / 1e6
    small = [
        one
        for one in mine
        if one.request_id in report.by_request
        and (one.request_id not in rows or rows[one.request_id].input_tokens < LARGE_TOKENS)
    ]
    pairs = [(one, report.by_request[one.request_id]) for one in small]
    pairs = [(one, seen) for one, seen in pairs if seen.times_ns]
    if pairs:
        figures["ttft_ms"] = _spread(
            [
                (seen.times_ns[0] - seen.sent_ns - one.first_ns + one.received_ns) / 1e6
                for one, seen in pairs
            ]
        )
    elif report.ttft_ms:
        figures["ttft_ms"] = _spread([value - part.ttft_ms for value in report.ttft_ms])
    gaps = [
        np.abs(np.diff(seen.times_ns) - np.diff(one.times_ns)) / 1e6
        for one, seen in pairs
        if len(seen.times_ns) == len(one.times_ns) > 1
    ]
    if gaps:
        figures["gap_ms"] = _spread(np.concatenate(gaps))
    return figures


def _schedule_ms(part: Part, served: list[Served], report: Report) -> dict[str, float]:
    """Arrival at the server minus due time; without a known start, by order, at its best."""
    if not served or report.has_own_times:
        return {}
    if report.start_ns is not None:
        due = {str(number): row.due_s for number, row in enumerate(part.rows)}
        return _spread(
            [
                (one.received_ns - report.start_ns) / 1e6 - due[one.request_id] * 1e3
                for one in served
                if one.request_id in due
            ]
        )
    received = np.sort([one.received_ns for one in served]) / 1e6
    due_ms = np.sort([row.due_s for row in part.rows])[: len(received)] * 1e3
    late = received[: len(due_ms)] - due_ms
    return _spread(late - late.min())


def _spread(values: Any) -> dict[str, float]:
    p50, p99, largest = np.quantile(np.asarray(values, dtype=float), (0.5, 0.99, 1.0)).tolist()
    return {"p50": p50, "p99": p99, "max": largest}
