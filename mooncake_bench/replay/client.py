"""How are requests sent at their times, whatever became of those before them, and timed honestly?

The streaming engine: a dispatcher at absolute deadlines (release.py) over a pool of keep-alive
connections (connection.py), bodies built ahead (bodies.py), columns for records (recorder.py).
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import sys
import time
from array import array
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from mooncake_bench.replay import stamped
from mooncake_bench.replay.alarm import Alarm
from mooncake_bench.replay.bodies import BuildAhead
from mooncake_bench.replay.connection import Connection, now
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.recorder import FAILED, REJECTED, Recorder, Verdict
from mooncake_bench.replay.release import Releases, Retry
from mooncake_bench.replay.schedule import Plan
from mooncake_bench.replay.stamped import KernelClock

IDLE_LIMIT_S = 4.0
"""An idle connection older than this is not reused: uvicorn hangs up after 5 s, others later."""
WARM_S = 0.1
WARM_CONNECTIONS = 64
"""Connections are opened this long before rows are due, at most so many at a time."""
CATCH_UP_SENDS = 16
"""So many late sends are made at once before tokens are read again."""
TICK_S = 0.05


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds: to connect, from send to first token, between tokens, from send to the end."""

    connect_s: float = 10.0
    first_token_s: float = 600.0
    stall_s: float = 120.0
    total_s: float = 3600.0


class Address(msgspec.Struct, frozen=True):
    """Where connections go; resolved once, so that no name is looked up on the send path."""

    host: str
    port: int
    is_tls: bool = False


class Progress(msgspec.Struct, frozen=True):
    """Counts of one engine at a moment; `elapsed_s` from the start of the run."""

    elapsed_s: float
    planned: int
    sent: int
    finished: int
    rejected: int
    failed: int
    tokens: int

    @property
    def in_flight(self) -> int:
        # Rows of an endpoint that is gone fail without having been sent.
        return max(0, self.sent - self.finished - self.rejected - self.failed)

    def __str__(self) -> str:
        return (
            f"{self.elapsed_s:.0f} s: {self.sent} of {self.planned} sent, {self.finished} "
            f"finished, {self.rejected} rejected, {self.failed} failed, {self.in_flight} in flight"
        )


class ClientStats(msgspec.Struct, frozen=True):
    """What the engine says of itself: reasons to believe its times, or not. Seconds, shares."""

    planned: int
    wall_s: float
    cpu_share: float
    loop_lag_p99_s: float
    loop_lag_max_s: float
    connections: int
    rss_bytes: int = 0
    """The most memory that the process had until the last answer; 0 where nobody can tell."""
    interrupted_at_s: float | None = None
    gone: str = ""
    """Why the endpoint was given up before the plan's end, if it was."""
    kernel_times: bool = False
    """Every time of an answer is the kernel's, of its arrival; else that of its reading."""


class Engine:
    """Sends a plan once. Create and use it inside one running loop.

    `concurrency` > 0 makes a closed loop: so many requests at a time, due times ignored.
    """

    def __init__(
        self,
        plan: Plan,
        bodies: BuildAhead,
        address: Address,
        timeouts: Timeouts,
        *,
        concurrency: int = 0,
        retry: Retry | None = None,
        gone_after_s: float = 2.0,
    ) -> None:
        self.recorder = Recorder(plan.request, plan.due_s)
        self._plan = plan
        self._bodies = bodies
        self._address = address
        self._timeouts = timeouts
        self._concurrency = concurrency
        self._retry = retry
        self._gone_after_s = gone_after_s
        self._tls = ssl.create_default_context() if address.is_tls else None
        # Under TLS one packet is not one read.
        self._clock = KernelClock() if stamped.IS_OFFERED and self._tls is None else None
        self._start = 0.0
        self._releases = Releases(plan, 0.0, concurrency)
        self._is_sent = bytearray(len(plan))
        self._sent = 0
        self._kept: dict[int, bytes] = {}
        """Requests that may be sent again."""
        self._attempts: dict[int, int] = {}
        self._again: dict[int, asyncio.TimerHandle] = {}
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._warming = 0
        self._opened = 0
        self._awaited = 0
        self._changed = asyncio.Event()
        self._alarm: Alarm | None = None
        self._dispatcher: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._loop_lags = array("d")
        self._gone = ""
        self._interrupted_at_s: float | None = None
        self._info = self._resolve()

    async def run(self, start: float) -> ClientStats:
        """Send every row at `start` (of time.perf_counter) plus its due time; wait for the rest.

        Ends early when `stop` is called or when nothing listens at the address any more. Raises
        what the building of a request raised.
        """
        self._start = self.recorder.origin = start
        self._releases = Releases(self._plan, start, self._concurrency)
        self._dispatcher = asyncio.create_task(self._dispatch(), name="replay-dispatch")
        if self._interrupted_at_s is not None:
            self._dispatcher.cancel()
        watcher = asyncio.create_task(self._watch(), name="replay-watch")
        with _steady_interpreter():
            cpu_s = 0.0
            try:
                if (left_s := start - now()) > 0:
                    await asyncio.sleep(left_s)
                cpu_s = time.process_time()
                await self._finish(self._dispatcher)
            finally:
                wall_s, cpu_s = max(now() - start, 1e-9), time.process_time() - cpu_s
                for task in (watcher, self._dispatcher, self._probe, *self._opening):
                    if task is not None:
                        task.cancel()
                self._close_all()
        return self._stats(wall_s, cpu_s)

    def stop(self) -> None:
        """End now: requests in flight fail as interrupted, unsent rows stay unsent."""
        if self._interrupted_at_s is None:
            self._interrupted_at_s = max(0.0, now() - self._start) if self._start else 0.0
        self._changed.set()
        if self._dispatcher is not None:
            self._dispatcher.cancel()

    def progress(self) -> Progress:
        _, finished, rejected, failed = self.recorder.counts
        tokens = self.recorder.tokens
        elapsed_s = now() - self._start
        return Progress(elapsed_s, len(self._plan), self._sent, finished, rejected, failed, tokens)

    async def _dispatch(self) -> None:
        releases = self._releases
        self._alarm = alarm = Alarm()
        warm_at, burst = 0.0, 0
        try:
            while not releases.is_over:
                while (at := now()) < releases.next_at or at < self._start:
                    if at >= warm_at:
                        self._warm()
                        warm_at = now() + WARM_S / 2
                    # Not past the moment to open connections for what comes later.
                    await alarm.until(min(max(releases.next_at, self._start), warm_at))
                    burst = 0
                row, released = releases.pop()
                if released is not None:
                    self.recorder.released(row, released)
                while (request := self._bodies.take(row)) is None:
                    if self._bodies.error is not None:
                        raise self._bodies.error
                    await asyncio.sleep(0.0005)
                self._send(row, request)
                burst += 1
                if burst % CATCH_UP_SENDS == 0:
                    await asyncio.sleep(0)
        finally:
            self._alarm = None
            alarm.close()

    def _warm(self) -> None:
        """Open the connections that the rows due soon will need."""
        missing = self._releases.due_before(now() + WARM_S) - len(self._idle) - self._warming
        for _ in range(min(missing, WARM_CONNECTIONS - self._warming)):
            self._warming += 1
            self._spawn(self._open_ahead(), "replay-open-ahead")

    def _send(self, row: int, request: bytes) -> None:
        self._is_sent[row] = 1
        self._sent += 1
        self._awaited += 1
        if self._retry is not None:
            self._kept[row] = request
            self._attempts[row] = 1
        self._write(row, request)

    def _write(self, row: int, request: bytes) -> None:
        connection = self._take_idle()
        if connection is not None:
            self.recorder.sent(row, connection.send(row, request))
        else:
            self._spawn(self._connect_and_send(row, request), f"replay-connect-{row}")

    def _take_idle(self) -> Connection | None:
        oldest = now() - IDLE_LIMIT_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable and connection.idle_since > oldest:
                return connection
            self._drop(connection)
        return None

    async def _connect_and_send(self, row: int, request: bytes) -> None:
        try:
            connection = await self._open()
        except (OSError, TimeoutError) as error:
            reason = _connect_reason(error)
            self._on_settled(Verdict(row, FAILED, now(), reason))
            if isinstance(error, ConnectionRefusedError):
                self._suspect(reason)
            return
        self.recorder.sent(row, connection.send(row, request))

    async def _open_ahead(self) -> None:
        try:
            self._idle.append(await self._open())
        except (OSError, TimeoutError):
            return  # Whoever needs it will try again, and tell.
        finally:
            self._warming -= 1

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(self._on_settled, self._on_released)
        async with asyncio.timeout(self._timeouts.connect_s):
            if self._clock is not None:
                await stamped.connect(*self._info, connection, self._clock)
            else:
                await loop.create_connection(
                    lambda: connection,
                    *self._info,
                    ssl=self._tls,
                    server_hostname=self._address.host if self._tls else None,
                )
        self._opened += 1
        self._connections.add(connection)
        return connection

    def _on_settled(self, verdict: Verdict) -> None:
        if self._retry is not None:
            if verdict.status == REJECTED and self._send_again(verdict, self._retry):
                return
            self._kept.pop(verdict.row, None)
        self._awaited -= 1
        self.recorder.settle(verdict)
        if self._releases.settled(verdict.row, now()) and self._alarm is not None:
            self._alarm.wake()
        if not self._awaited:
            self._changed.set()

    def _send_again(self, verdict: Verdict, retry: Retry) -> bool:
        """Set the time of another attempt; False where the rejection stands."""
        row = verdict.row
        attempt = self._attempts[row]
        if attempt >= retry.attempts:
            return False
        self._attempts[row] = attempt + 1
        pause_s = retry.pause_s(int(self._plan.request[row]), attempt, verdict.retry_after_s)

        def send() -> None:
            del self._again[row]
            self._write(row, self._kept[row])

        self._again[row] = asyncio.get_running_loop().call_later(pause_s, send)
        return True

    def _on_released(self, connection: Connection) -> None:
        self._idle.append(connection)

    async def _finish(self, dispatcher: asyncio.Task[None]) -> None:
        """Wait for the dispatcher and the answers; or settle what an early end leaves."""
        try:
            await dispatcher
            while self._awaited and self._interrupted_at_s is None:
                self._changed.clear()
                await self._changed.wait()
        except asyncio.CancelledError:
            if not self._gone and self._interrupted_at_s is None:
                raise
        if self._interrupted_at_s is not None:
            self._fail_active("interrupted")
        elif self._gone:
            self._fail_unsent(f"endpoint gone: {self._gone}")

    def _fail_active(self, reason: str) -> None:
        at = now()
        for task in self._opening:
            task.cancel()
        for timer in self._again.values():
            timer.cancel()
        for connection in list(self._connections):
            connection.fail(reason, at)
        for row in self.recorder.pending().tolist():
            if self._is_sent[row]:
                self._on_settled(Verdict(row, FAILED, at, reason))

    def _fail_unsent(self, reason: str) -> None:
        """Rows that nobody will answer; those in the future fail at their own time."""
        at = now()
        for row in self.recorder.pending().tolist():
            if not self._is_sent[row]:
                self._awaited += 1
                due = self._start + float(self._plan.due_s[row])
                self._on_settled(Verdict(row, FAILED, max(at, due), reason))

    def _suspect(self, reason: str) -> None:
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._check_alive(reason), name="replay-probe")

    async def _check_alive(self, reason: str) -> None:
        """Give up when every attempt is refused for `gone_after_s` and no stream is left."""
        until = now() + self._gone_after_s
        while now() < until or any(connection.row >= 0 for connection in self._connections):
            await asyncio.sleep(min(0.2, self._gone_after_s / 4))
            try:
                self._idle.append(await self._open())
            except ConnectionRefusedError:
                continue
            except (OSError, TimeoutError):
                return
            return
        self._gone = reason
        if self._dispatcher is not None:
            self._dispatcher.cancel()

    async def _watch(self) -> None:
        """Timeouts, stale connections and the lateness of the loop, all by one slow ticker."""
        limits = self._timeouts
        shortest_s = min(limits.first_token_s, limits.stall_s, limits.total_s)
        every = max(1, round(min(0.25, shortest_s / 8) / TICK_S))
        tick = 0
        while True:
            due = now() + TICK_S
            await asyncio.sleep(TICK_S)
            self._loop_lags.append(max(0.0, now() - due))
            if self._clock is not None:
                self._clock.follow()
            tick += 1
            if tick % every == 0:
                self._sweep(now())

    def _sweep(self, at: float) -> None:
        limits = self._timeouts
        for connection in list(self._connections):
            if connection.row >= 0:
                waiting = at - (connection.last_token_at or connection.sent_at)
                limit = limits.stall_s if connection.last_token_at else limits.first_token_s
                if at - connection.sent_at > limits.total_s:
                    connection.fail(f"no end within {limits.total_s:g} s", at)
                elif waiting > limit:
                    what = "token for" if connection.last_token_at else "first token within"
                    connection.fail(f"no {what} {limit:g} s", at)
            elif at - connection.idle_since > IDLE_LIMIT_S or not connection.is_open:
                self._drop(connection)
        self._idle = [one for one in self._idle if one in self._connections]

    def _drop(self, connection: Connection) -> None:
        self._connections.discard(connection)
        connection.close()

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _close_all(self) -> None:
        for connection in self._connections:
            connection.close()
        if self._clock is not None:
            self._clock.close()
        self._connections.clear()
        self._idle.clear()

    def _resolve(self) -> tuple[str, int]:
        """The first address that takes a connection. Raises ReplayError."""
        where = f"{self._address.host}:{self._address.port}"
        try:
            infos = socket.getaddrinfo(
                self._address.host, self._address.port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise ReplayError(f"{where}: unknown host ({error.strerror}); correct --url") from None
        for family, kind, protocol, _, address in infos:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(self._timeouts.connect_s)
                if probe.connect_ex(address) == 0:
                    return str(address[0]), int(address[1])
        raise ReplayError(f"{where}: nothing listens there; start the server or correct --url")

    def _stats(self, wall_s: float, cpu_s: float) -> ClientStats:
        lags = np.frombuffer(self._loop_lags, dtype=np.float64)
        return ClientStats(
            planned=len(self._plan),
            wall_s=wall_s,
            cpu_share=cpu_s / wall_s,
            loop_lag_p99_s=float(np.quantile(lags, 0.99)) if len(lags) else 0.0,
            loop_lag_max_s=float(lags.max()) if len(lags) else 0.0,
            connections=self._opened,
            rss_bytes=_most_memory(),
            interrupted_at_s=self._interrupted_at_s,
            gone=self._gone,
            kernel_times=self._clock is not None and not self._clock.missing,
        )


def _most_memory() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _steady_interpreter() -> Iterator[None]:
    """No long pauses: old objects are no garbage, and the builder thread yields quickly."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval_s)


def _connect_reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError):
        return "connect timeout"
    return f"connect failed: {getattr(error, 'strerror', None) or type(error).__name__}"
