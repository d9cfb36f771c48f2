"""What would this cluster have done with these requests? The same program, in virtual time."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.engines.modelled import wake
from reference_cluster.request import Request
from reference_cluster.virtual_time import run_virtual

# Look at the cluster every so many seconds, from 0 s on; an answer of True ends the run there.
Watch = tuple[float, Callable[[Cluster], bool | None]]


@dataclass(slots=True, repr=False)  # asyncio.Runner's signal check prints its task's result.
class Simulated:
    """All requests, ended unless `is_stopped`; `samples` are rows of SAMPLE_COLUMNS."""

    requests: Sequence[Request]
    samples: list[tuple[Any, ...]]
    is_stopped: bool = False  # By the watch, which had seen enough.


async def replay(
    config: ClusterConfig,
    profile: Profile,
    requests: Sequence[Request],
    is_step_by_step: bool = False,
    watch: Watch | None = None,
) -> Simulated:
    """Offer every request at its arrival time on the running loop's clock, which reads 0 s now."""
    left = len(requests)
    all_ended = asyncio.Event()

    def on_end(request: Request) -> None:
        nonlocal left
        left -= 1
        if not left:
            all_ended.set()

    crashes: list[BaseException] = []

    def on_crash(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A failing callback loses its request: end the run rather than wait for it for ever."""
        crashes.append(context.get("exception") or RuntimeError(context["message"]))
        all_ended.set()

    asyncio.get_running_loop().set_exception_handler(on_crash)
    cluster = Cluster(config, profile, on_end, steps_max=1 if is_step_by_step else None)
    serving = asyncio.create_task(cluster.run(), name="cluster")
    serving.add_done_callback(lambda _: all_ended.set())  # Nobody waits for a crashed cluster.
    watching = asyncio.create_task(look(cluster, *watch), name="watch") if watch else None
    if watching is not None:
        watching.add_done_callback(lambda _: all_ended.set())
    try:
        for request in requests:
            await sleep_until(request.timeline.arrived_s)
            if all_ended.is_set():
                break
            cluster.submit(request)
        if left:
            await all_ended.wait()
        if crashes:
            raise crashes[0]
        if watching is not None and watching.done():
            watching.result()  # Raises what it crashed with.
            return Simulated(requests, cluster.samples.rows, is_stopped=True)
        if left:
            await serving  # Raises what it crashed with.
    finally:
        serving.cancel()
        if watching is not None:
            watching.cancel()
    cluster.check_integrity()
    return Simulated(requests, cluster.samples.rows)


async def look(cluster: Cluster, every_s: float, at: Callable[[Cluster], bool | None]) -> None:
    """Show the cluster to `at` until it has seen enough."""
    while not at(cluster):  # noqa: ASYNC110  # It looks at regular times; nothing could wake it.
        await asyncio.sleep(every_s)


async def sleep_until(when_s: float) -> None:
    """Sleep to a time of the loop's clock, not at all if it has come.

    Unlike `asyncio.sleep`, which rounds now + (then - now), it never wakes a hair too early.
    """
    loop = asyncio.get_running_loop()
    if when_s > loop.time():
        woken = loop.create_future()
        loop.call_at(when_s, wake, woken)
        await woken


def simulate(
    config: ClusterConfig,
    profile: Profile,
    requests: Sequence[Request],
    is_step_by_step: bool = False,
    watch: Watch | None = None,
) -> Simulated:
    """Run to the end in virtual time. `requests` are in order of arrival, times from 0 s."""
    with collector_paused():
        return run_virtual(replay(config, profile, requests, is_step_by_step, watch))


@contextmanager
def collector_paused() -> Iterator[None]:
    """No looking for cyclic garbage: a run has little, and looking costs a fifth of its time."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()
