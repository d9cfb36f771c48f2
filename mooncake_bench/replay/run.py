"""What does `mooncake-bench replay` do? One trace against one endpoint, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mooncake_bench.records import Run, RunInfo, fingerprint, installed_versions, write_run
from mooncake_bench.replay.assemble import build_frames, judge
from mooncake_bench.replay.bodies import AHEAD_BYTES, BuildAhead, RequestBuilder, RequestShape
from mooncake_bench.replay.client import ClientStats, Engine, Progress, Timeouts
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.recorder import Batch
from mooncake_bench.replay.schedule import Ints, Plan, plan
from mooncake_bench.replay.target import Target, authorization, fetch_samples, find_target
from mooncake_bench.slo import parse_slo
from workloads.trace import Trace

START_MARGIN_S = 0.3
PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay measured: frames as in records.py, what the client says of itself, verdicts."""

    requests: pl.DataFrame
    spans: pl.DataFrame
    samples: pl.DataFrame
    client: dict[str, Any]
    invalid_reasons: list[str]
    warnings: list[str]
    info: dict[str, Any]
    """The cluster's own description; {} of other servers."""
    url: str
    model: str
    started_at: str

    @property
    def valid(self) -> bool:
        return not self.invalid_reasons


def replay(
    trace: Trace,
    url: str,
    options: ReplayOptions,
    on_progress: Callable[[Progress], None] | None = None,
) -> ReplayResult:
    """Send the trace to the endpoint at its own times and wait for the last answer.

    `on_progress` is called about twice a second, from a thread of its own. SIGINT and SIGTERM end
    the run and keep what was measured. Raises ReplayError where the endpoint is down at the start.
    """
    parse_slo(options.slo)  # A wrong one must not wait for the end of the run.
    target = find_target(url, options.model)
    whole = plan(trace.frame, options.speed)
    bodies = build_ahead(trace, whole, options, target)
    start = [0.0]

    async def main() -> tuple[ClientStats, list[Batch]]:
        engine = Engine(whole, bodies, target.address, timeouts(options))
        with _stopped_by_signals(engine), _reporting(engine, on_progress):
            bodies.start()
            await asyncio.to_thread(bodies.is_warm.wait)
            start[0] = time.perf_counter() + START_MARGIN_S
            stats = await engine.run(start[0])
        batch = engine.recorder.drain()
        return stats, [batch] if batch else []

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            stats, batches = runner.run(main())
    finally:
        bodies.stop()
    return conclude(whole, batches, [stats], options, target, start[0])


def conclude(
    whole: Plan,
    batches: list[Batch],
    engines: list[ClientStats],
    options: ReplayOptions,
    target: Target,
    start: float,
    lost: Ints | None = None,
) -> ReplayResult:
    """The result of a replay that has ended; `start` as of time.perf_counter().

    `lost` are the positions of the rows whose worker was lost: as in `assemble.build_frames`.
    """
    requests, spans = build_frames(whole, batches, lost)
    client, invalid, warnings = judge(options, whole, requests, engines)
    ago_s = time.perf_counter() - start
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago_s)
    samples = fetch_samples(target, start)
    if target.clock_ahead_s is not None:
        client["server_clock_error_s"] = target.clock_error_s
    return ReplayResult(
        requests,
        spans,
        samples,
        client,
        invalid,
        warnings,
        target.info,
        target.url,
        target.model,
        started.isoformat(timespec="seconds"),
    )


def write(result: ReplayResult, trace: Trace, options: ReplayOptions, directory: Path) -> Run:
    """Write the run directory through `records.write_run`. Raises RecordsError."""
    return write_run(
        directory, run_info(result, trace, options), result.requests, result.spans, result.samples
    )


def run_info(result: ReplayResult, trace: Trace, options: ReplayOptions) -> RunInfo:
    """What was run: the replay's options beside the cluster's own config."""
    config = {
        "replay": msgspec.to_builtins(options) | {"url": result.url, "model": result.model},
        "cluster": result.info.get("config", {}),
    }
    rate_rps = trace.rate_rps * options.speed
    return RunInfo(
        name=options.name or trace.name,
        source=result.info.get("source", "external"),
        system=result.info.get("system", "external"),
        trace={
            "name": trace.name,
            "sha256": trace.sha256,
            "jittered": trace.jittered,
            "transforms": list(trace.transforms),
            "block_tokens": trace.block_tokens,
            "duration_s": trace.duration_s / options.speed,
            "rate_rps": rate_rps,
            "speed": options.speed,
        },
        config=config,
        profile=result.info.get("profile") or {},
        slo=parse_slo(options.slo),
        seed=options.seed,
        versions=installed_versions(("mooncake-bench", "polars", "uvloop", "locust")),
        machine=fingerprint(),
        valid=result.valid,
        invalid_reasons=result.invalid_reasons,
        warnings=result.warnings,
        client=result.client,
        started_at=result.started_at,
    )


def build_ahead(trace: Trace, mine: Plan, options: ReplayOptions, target: Target) -> BuildAhead:
    """The builder of the plan's requests, not yet started."""
    is_chat = options.endpoint == "chat"
    shape = RequestShape(
        host=target.host_header,
        path=target.path + ("/v1/chat/completions" if is_chat else "/v1/completions"),
        model=target.model,
        trace_key=trace.sha256,
        block_tokens=trace.block_tokens,
        is_chat=is_chat,
        sends_tokens=options.sends_tokens,
        wants_timeline=bool(target.info),
        authorization=authorization(),
    )
    return BuildAhead(RequestBuilder(shape, mine).build, len(mine), AHEAD_BYTES)


def timeouts(options: ReplayOptions) -> Timeouts:
    """The engine's timeouts from the flags."""
    return Timeouts(
        options.connect_timeout,
        options.first_token_timeout,
        options.stall_timeout,
        options.total_timeout,
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where there is one; asyncio's own elsewhere (Windows)."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


@contextlib.contextmanager
def _stopped_by_signals(engine: Engine) -> Iterator[None]:
    """Ctrl-C keeps what was measured: the engine stops, the caller gets its records."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or sys.platform == "win32":
        yield
        return
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(one) for one in signals]
    for one in signals:
        loop.add_signal_handler(one, engine.stop)
    try:
        yield
    finally:
        for one, handler in zip(signals, before, strict=True):
            loop.remove_signal_handler(one)
            signal.signal(one, handler)


@contextlib.contextmanager
def _reporting(engine: Engine, on_progress: Callable[[Progress], None] | None) -> Iterator[None]:
    """Show progress from a thread: drawing must not hold up the reading of tokens."""
    if on_progress is None:
        yield
        return
    is_over = threading.Event()

    def report() -> None:
        while not is_over.wait(PROGRESS_EVERY_S):
            on_progress(engine.progress())

    thread = threading.Thread(target=report, name="replay-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        on_progress(engine.progress())
