"""How does a Locust worker send without gevent in the way? `python -m ...replay.engine_process N`.

The streaming engine in a process of its own. Orders come on stdin, reports go to stdout (wire.py);
it ends with its job, or when stdin closes because the worker is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sys
import threading
import time
from typing import BinaryIO

import msgspec

from mooncake_bench.replay.client import ClientStats, Engine
from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.prepare import load_trace
from mooncake_bench.replay.run import build_ahead, loop_factory, make_engine
from mooncake_bench.replay.schedule import plan
from mooncake_bench.replay.wire import (
    Done,
    Job,
    Ready,
    Records,
    Report,
    Start,
    Stop,
    decode_order,
    encode,
    read_frame,
    write_frame,
)
from workloads.errors import TraceError

REPORT_EVERY_S = 0.25


class Reports:
    """Writes reports from a thread: a slow reader must not hold up the reading of tokens.

    The queue is bounded by what the run measures at all.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._queue: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-reports", daemon=True)
        self._thread.start()

    def send(self, report: Report) -> None:
        self._queue.put(report)

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (report := self._queue.get()) is not None:
            try:
                write_frame(self._stream, encode(report))
            except OSError:  # The worker is gone, and everybody who could want this.
                os._exit(1)


class Orders:
    """Reads orders in a thread and passes them to the loop."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self.start: asyncio.Future[float] = self._loop.create_future()
        """Start of the run in seconds of time.perf_counter(); cancelled by an early stop."""
        self.engine: Engine | None = None
        threading.Thread(target=self._run, name="engine-orders", daemon=True).start()

    def _run(self) -> None:
        while (frame := read_frame(self._stream)) is not None:
            self._loop.call_soon_threadsafe(self._follow, decode_order(frame))
        os._exit(0)  # Nobody is left to report to.

    def _follow(self, order: Job | Start | Stop) -> None:
        if isinstance(order, Start) and not self.start.done():
            # From here on only the monotonic clock is used.
            self.start.set_result(time.perf_counter() + order.wall_s - time.time())
        elif isinstance(order, Stop):
            self.start.cancel()
            if self.engine is not None:
                self.engine.stop()


async def serve(job: Job, orders: Orders, reports: Reports) -> ClientStats | None:
    """Prepare, wait for the start, send; None when stopped before the start."""
    trace = await asyncio.to_thread(load_trace, job.options)
    if trace.sha256 != job.sha256 or trace.frame.height != job.rows:
        raise ReplayError(
            f"--trace {job.options.trace}: not the master's file (sha256 or rows differ); "
            "copy the same file to every host"
        )
    options = _my_options(job)
    mine = plan(
        trace.frame, options.speed, job.worker, job.workers, waits_for_answers=options.sessions
    )
    bodies = build_ahead(trace, mine, options, job.target)
    engine = make_engine(mine, bodies, job.target, options)
    bodies.start()
    try:
        await asyncio.to_thread(bodies.is_warm.wait)
        reports.send(Ready(len(mine)))
        try:
            start = await orders.start
        except asyncio.CancelledError:
            return None
        orders.engine = engine
        reporter = asyncio.create_task(_report(engine, reports), name="engine-report")
        stats = await engine.run(start)
        reporter.cancel()
        reports.send(Records(engine.recorder.drain(), engine.progress()))
        return stats
    finally:
        bodies.stop()


def _my_options(job: Job) -> ReplayOptions:
    """The options with this worker's share of the requests at a time, at least one."""
    share, more = divmod(job.options.concurrency, job.workers)
    mine = max(share + (job.worker < more), 1) if job.options.concurrency else 0
    return msgspec.structs.replace(job.options, concurrency=mine)


async def _report(engine: Engine, reports: Reports) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_S)
        reports.send(Records(engine.recorder.drain(), engine.progress()))


async def _main(inward: BinaryIO, outward: BinaryIO) -> None:
    frame = read_frame(inward)
    job = decode_order(frame) if frame is not None else None
    if not isinstance(job, Job):
        return
    orders, reports = Orders(inward), Reports(outward)
    try:
        reports.send(Done(await serve(job, orders, reports)))
    except (ReplayError, TraceError) as error:
        reports.send(Done(error=str(error)))
    reports.close()


def main() -> None:
    """Serve one job on stdin and stdout, with the niceness in the first argument if we may."""
    if sys.platform != "win32":
        # The worker has given way by now, for this process: who may not raise it again, does not.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    # Whatever else prints must not get between the messages.
    outward = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inward = os.fdopen(os.dup(0), "rb")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_main(inward, outward))
    # Not waiting for the thread that still reads orders.
    outward.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
