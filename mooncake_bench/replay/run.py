"""What does `mooncake-bench replay` do? One trace against one endpoint, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
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
from mooncake_bench.replay.assemble import build_chunks, build_frames, judge
from mooncake_bench.replay.bodies import (
    AHEAD_BYTES,
    CLOSED_AHEAD_BYTES,
    BuildAhead,
    RequestBuilder,
    RequestShape,
)
from mooncake_bench.replay.client import ClientStats, Engine, Progress, Timeouts
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.live_run import LiveRun, Monitor
from mooncake_bench.replay.options import ReplayOptions, settle_salt
from mooncake_bench.replay.recorder import Batch
from mooncake_bench.replay.release import Retry
from mooncake_bench.replay.schedule import Ints, Plan, plan
from mooncake_bench.replay.scrape import Scraper
from mooncake_bench.replay.servers import SERVERS, warnings_about
from mooncake_bench.replay.target import (
    Target,
    authorization,
    control_url,
    fetch_samples,
    find_target,
)
from mooncake_bench.replay.tokenized import load_words
from mooncake_bench.slo import Slo, parse_slos
from workloads.statistics import reuse
from workloads.trace import Trace

START_MARGIN_S = 0.3
PROGRESS_EVERY_S = 0.5
MONITOR_EVERY_S = 0.25
FILES = 65_536


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
    stopped: str = ""
    """Why a monitor ended the run before its end, if it did."""
    interrupted: bool = False
    """Somebody else did: Ctrl-C."""
    salt: str = "none"
    measured_s: tuple[float, float] | None = None
    """Requests that arrive in it count; the others are warm-up and cool-down."""
    server_metrics: pl.DataFrame | None = None
    chunks: pl.DataFrame | None = None
    """Of prefills, where the cluster tells of them."""
    live: LiveRun | None = None
    """What the run was looked at through; its directory's own files replace it."""

    @property
    def valid(self) -> bool:
        return not self.invalid_reasons

    @property
    def spoilt(self) -> list[str]:
        """The reasons for which the run is invalid, but for having been stopped by a monitor."""
        return self.invalid_reasons[1:] if self.stopped else self.invalid_reasons


def replay(
    trace: Trace,
    url: str,
    options: ReplayOptions,
    on_progress: Callable[[Progress], None] | None = None,
    monitor: Monitor | None = None,
    directory: Path | None = None,
) -> ReplayResult:
    """Send the trace to the endpoint at its own times and wait for the last answer.

    With a `directory` the run can be looked at there meanwhile; `write` it there afterwards.

    `on_progress` is called about twice a second, from a thread of its own. SIGINT and SIGTERM end
    the run and keep what was measured; so does a reason that `monitor` gives. Raises ReplayError
    where the endpoint is down at the start.
    """
    _allow_files()
    parse_slos(options.slo)  # A wrong one must not wait for the end of the run.
    options = settle_salt(options)
    whole = plan(trace.frame, options.speed, waits_for_answers=options.sessions)
    _check_window(options, whole)
    target = find_target(url, options.model)
    bodies = build_ahead(trace, whole, options, target)
    live = LiveRun(directory, begun(trace, options, target), whole, monitor) if directory else None
    start, stopped = [0.0], [""]
    batches: list[Batch] = []

    async def main() -> ClientStats:
        engine = make_engine(whole, bodies, target, options)
        with _stopped_by_signals(engine), _reporting(engine, on_progress):
            bodies.start()
            await asyncio.to_thread(bodies.is_warm.wait)
            start[0] = time.perf_counter() + START_MARGIN_S
            if live is not None:
                live.follow(target, start[0])
            watch = asyncio.create_task(
                _watch(engine, live or monitor, batches, stopped), name="replay-monitor"
            )
            try:
                stats = await engine.run(start[0])
            finally:
                watch.cancel()
                # What the monitor raised is no silent end of watching.
                with contextlib.suppress(asyncio.CancelledError):
                    await watch
        if (batch := engine.recorder.drain()) is not None:
            batches.append(batch)
        return stats

    with scraping(target, options) as scraper:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                stats = runner.run(main())
        except BaseException:
            if live is not None:
                live.close(keep=True)
            raise
        finally:
            bodies.stop()
    result = conclude(whole, batches, [stats], options, target, start[0], stopped=stopped[0])
    result = dataclasses.replace(result, live=live)
    return with_server_metrics(result, scraper, start[0], options.server)


@contextlib.contextmanager
def scraping(target: Target, options: ReplayOptions) -> Iterator[Scraper | None]:
    """Read the server's /metrics meanwhile, where that is wanted."""
    if not options.scrape:
        yield None
        return
    scraper = Scraper(control_url(target.url), authorization())
    scraper.start()
    try:
        yield scraper
    finally:
        scraper.stop()


def with_server_metrics(
    result: ReplayResult, scraper: Scraper | None, start: float, server: str = ""
) -> ReplayResult:
    """The result with what the scraper has read; `start` as of time.perf_counter().

    Of a kind of `server` that is known it is said what it could have told and did not.
    """
    metrics = scraper.frame(start) if scraper is not None else None
    if server:
        result.warnings.extend(warnings_about(SERVERS[server], result.requests, metrics))
    if scraper is None:
        return result
    if scraper.is_cut:
        result.warnings.append("server_metrics.parquet is cut: the server has too many series.")
    if scraper.missed:
        result.warnings.append(f"/metrics did not answer {scraper.missed} times during the run.")
    return dataclasses.replace(result, server_metrics=metrics)


def _allow_files() -> None:
    """Let this process open as many connections as the system lets it: the usual limit is 1,024."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A wish: what cannot be opened is counted and told in the results.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _watch(
    engine: Engine, monitor: Monitor | None, batches: list[Batch], stopped: list[str]
) -> None:
    """Show the monitor what is new until it has seen enough; keeps the batches it was shown."""
    while monitor is not None:
        await asyncio.sleep(MONITOR_EVERY_S)
        if (batch := engine.recorder.drain()) is not None:
            batches.append(batch)
        # In a thread: arithmetic on thousands of tokens must not hold up the reading of others.
        if why := await asyncio.to_thread(monitor.look, engine.progress(), batch):
            stopped[0] = why
            engine.stop()
            return


def conclude(
    whole: Plan,
    batches: list[Batch],
    engines: list[ClientStats],
    options: ReplayOptions,
    target: Target,
    start: float,
    lost: Ints | None = None,
    stopped: str = "",
) -> ReplayResult:
    """The result of a replay that has ended; `start` as of time.perf_counter().

    `lost` are the positions of the rows whose worker was lost: as in `assemble.build_frames`.
    `stopped` says why a monitor ended it early.
    """
    requests, spans = build_frames(whole, batches, lost)
    client, invalid, warnings = judge(options, whole, requests, engines, stopped)
    ago_s = time.perf_counter() - start
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago_s)
    # On the same machine, logs of the server on the monotonic clock can be laid beside it.
    client["start_perf_counter_s"] = start
    client["times"] = "kernel" if all(one.kernel_times for one in engines) else "process"
    client["rss_bytes"] = max((one.rss_bytes for one in engines), default=0)
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
        stopped,
        not stopped and any(one.interrupted_at_s is not None for one in engines),
        options.salt,
        measured_window(options, _last_arrival_s(options, whole, requests)),
        chunks=build_chunks(batches) if target.info else None,
    )


def write(result: ReplayResult, trace: Trace, options: ReplayOptions, directory: Path) -> Run:
    """Write the run directory through `records.write_run`. Raises RecordsError."""
    run = write_run(
        directory,
        run_info(result, trace, options),
        result.requests,
        result.spans,
        result.samples,
        result.server_metrics,
        result.chunks,
        reuse(trace),
    )
    if result.live is not None:
        result.live.close()
    return run


def begun(trace: Trace, options: ReplayOptions, target: Target) -> RunInfo:
    """What can be said of a run that is about to begin."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    none = pl.DataFrame()
    to_come = ReplayResult(
        none,
        none,
        none,
        {},
        [],
        [],
        target.info,
        target.url,
        target.model,
        now,
        salt=options.salt,
    )
    return run_info(to_come, trace, options)


def run_info(result: ReplayResult, trace: Trace, options: ReplayOptions) -> RunInfo:
    """What was run: the replay's options beside the cluster's own config."""
    config = {
        "replay": msgspec.to_builtins(options)
        | {"url": result.url, "model": result.model, "salt": result.salt},
        "cluster": result.info.get("config", {}),
    }
    rate_rps = trace.rate_rps * options.speed
    slo, slo_by_class = parse_slos(options.slo)
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
            "salt": result.salt,
        },
        config=config,
        profile=result.info.get("profile") or {},
        slo=slo,
        slo_by_class=slo_by_class,
        measured_s=result.measured_s,
        seed=options.seed,
        versions=installed_versions(("mooncake-bench", "polars", "uvloop", "locust")),
        machine=fingerprint(),
        valid=result.valid,
        invalid_reasons=result.invalid_reasons,
        warnings=result.warnings,
        client=result.client,
        started_at=result.started_at,
    )


def measured_window(options: ReplayOptions, last_s: float) -> tuple[float, float] | None:
    """[start, end) of the arrivals that count, seconds; None where all do."""
    if not options.warmup and not options.cooldown:
        return None
    # Without a cool-down the last arrival counts too.
    return options.warmup, last_s - options.cooldown if options.cooldown else last_s + 1e-3


def _last_arrival_s(options: ReplayOptions, whole: Plan, requests: pl.DataFrame) -> float:
    """When the last request arrives: by the plan, unless answers decide."""
    if not options.concurrency and whole.after is None:
        return float(whole.due_s[-1])
    latest = requests["arrival_s"].max()
    return float(latest) if isinstance(latest, float) else 0.0


def _check_window(options: ReplayOptions, whole: Plan) -> None:
    """Raise ReplayError where warm-up and cool-down leave nothing to measure."""
    window_s = measured_window(options, float(whole.due_s[-1]))
    if window_s is None or options.concurrency or whole.after is not None:
        return
    if not ((whole.due_s >= window_s[0]) & (whole.due_s < window_s[1])).any():
        raise ReplayError(
            f"--warmup {options.warmup:g} and --cooldown {options.cooldown:g}: no request of "
            f"{float(whole.due_s[-1]):.0f} s is left to measure; shorten them"
        )


def make_engine(mine: Plan, bodies: BuildAhead, target: Target, options: ReplayOptions) -> Engine:
    """The engine that sends the plan as the options say."""
    return Engine(
        mine,
        bodies,
        target.address,
        timeouts(options),
        concurrency=options.concurrency,
        retry=Retry() if options.retry == "backoff" else None,
    )


def build_ahead(trace: Trace, mine: Plan, options: ReplayOptions, target: Target) -> BuildAhead:
    """The builder of the plan's requests, not yet started."""
    is_chat = options.endpoint == "chat"
    salt = "" if options.salt == "none" else options.salt
    _check_literals(mine, is_chat)
    shape = RequestShape(
        host=target.host_header,
        path=target.path + ("/v1/chat/completions" if is_chat else "/v1/completions"),
        model=target.model,
        trace_key=trace.sha256 + (f"/{salt}" if salt else ""),
        block_tokens=trace.block_tokens,
        is_chat=is_chat,
        sends_tokens=options.sends_tokens,
        wants_timeline=bool(target.info),
        authorization=authorization(),
        salt=salt,
        cache_salt=salt if options.cache_salt else "",
        slo_headers=slo_headers(options.slo) if options.slo_headers else {},
        words=load_words(options.tokenizer) if options.tokenizer else None,
    )
    ahead_bytes = CLOSED_AHEAD_BYTES if options.concurrency else AHEAD_BYTES
    return BuildAhead(RequestBuilder(shape, mine).build, len(mine), ahead_bytes)


def slo_headers(text: str) -> dict[str | None, str]:
    """Header lines that tell a server the bounds, by class; None is the key of all others."""
    slo, by_class = parse_slos(text)
    known: list[tuple[str | None, Slo]] = [(None, slo), *by_class.items()]
    return {
        name: f"x-slo-ttft-ms: {one.ttft_s * 1e3:.12g}\r\nx-slo-tpot-ms: {one.tbt_s * 1e3:.12g}\r\n"
        for name, one in known
    }


def _check_literals(mine: Plan, is_chat: bool) -> None:
    if mine.prompts is None or is_chat:
        return
    if mine.prompts.str.starts_with("[").any():
        raise ReplayError("--trace: its prompts are messages of a chat; add --endpoint chat")


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
