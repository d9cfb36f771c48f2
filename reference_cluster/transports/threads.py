"""How does a task wait for a blocking transfer, with a deadline, and stop it when cancelled?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from reference_cluster.transports.bytes import TransportError

T = TypeVar("T")


async def run_stoppable(
    executor: Executor,
    work: Callable[[], T],
    stop: Callable[[], None],
    deadline_s: float,
    peer: str,
) -> T:
    """The result of `work`, done in a thread of the executor; errors name the `peer`.

    At the deadline, or when the waiting task is cancelled, `stop` is called, which must make
    `work` end soon; only then TransportError or CancelledError is raised, so that the work
    touches no memory afterwards. Work that still waits for a thread is dropped.
    """
    loop = asyncio.get_running_loop()
    job = executor.submit(work)
    done = asyncio.wrap_future(job)
    is_late = False

    def halt() -> None:
        if not job.cancel():
            stop()

    def expire() -> None:
        nonlocal is_late
        is_late = True
        halt()

    timer = loop.call_later(deadline_s, expire)
    cancelled: asyncio.CancelledError | None = None
    try:
        while not done.done():
            try:
                # A failure is told below, by result(); here only the end matters.
                with contextlib.suppress(Exception):
                    await asyncio.shield(done)
            except asyncio.CancelledError as error:
                if not job.cancelled():
                    cancelled = error
                    halt()
    finally:
        timer.cancel()
    if cancelled is not None:
        raise cancelled
    if is_late and (done.cancelled() or done.exception() is not None):
        raise TransportError(f"{peer}: not done within {deadline_s:g} s")
    if done.cancelled():
        raise TransportError(f"{peer}: the transport was closed")
    return done.result()
