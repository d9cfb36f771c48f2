"""Does the virtual clock do what asyncio's does, only at once?"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
import socket
import time

import pytest

from reference_cluster.virtual_time import Deadlock, VirtualTimeLoop, run_virtual

HOUR_S = 3600.0


def now() -> float:
    return asyncio.get_running_loop().time()


def test_an_hour_takes_no_time() -> None:
    """A task that wakes every second for an hour needs next to no time of the host's processor."""

    async def main() -> float:
        for _ in range(3600):
            await asyncio.sleep(1.0)
        return now()

    begin_s = time.process_time()
    assert run_virtual(main()) == HOUR_S
    assert time.process_time() - begin_s < HOUR_S / 100


@pytest.mark.timeout(20)
@pytest.mark.parametrize("days", [1, 400, 10_000])
def test_the_clock_does_not_stick_at_large_times(days: int) -> None:
    """Where floats are coarser than any fixed clock resolution, timers still fire, and exactly."""

    async def main() -> list[float]:
        await asyncio.sleep(days * 24 * HOUR_S)
        times = [now()]
        for _ in range(3):
            await asyncio.sleep(0.25)
            times.append(now())
        return times

    start_s = days * 24 * HOUR_S
    assert run_virtual(main()) == [start_s, start_s + 0.25, start_s + 0.5, start_s + 0.75]


def test_timers_fire_at_exactly_their_time() -> None:
    """1,000 timers at random times, in random order: each sees its own `when`, to the last bit."""
    rng = random.Random(5)
    due = [rng.uniform(0.0, 10_000.0) for _ in range(1000)]
    fired: list[tuple[float, float]] = []

    def fire(when: float) -> None:
        fired.append((when, now()))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for when in due:
            loop.call_at(when, fire, when)
        await asyncio.sleep(10_001.0)

    run_virtual(main())
    assert fired == [(when, when) for when in sorted(due)]


def test_timers_a_hair_apart_stay_apart() -> None:
    """The next float is another moment: the clock has no resolution of its own."""
    later = math.nextafter(1.0, 2.0)

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        fired: list[float] = []
        loop.call_at(later, lambda: fired.append(loop.time()))
        loop.call_at(1.0, lambda: fired.append(loop.time()))
        await asyncio.sleep(2.0)
        return fired

    assert run_virtual(main()) == [1.0, later]


def test_timers_of_one_moment_fire_in_the_order_they_were_set() -> None:
    """First come, first served, which asyncio's own loop leaves open."""

    async def main() -> list[int]:
        fired: list[int] = []
        loop = asyncio.get_running_loop()
        for number in range(100):
            loop.call_at(1.0, fired.append, number)
        await asyncio.sleep(2.0)
        return fired

    assert run_virtual(main()) == list(range(100))


def test_a_cancelled_timer_never_fires_and_moves_no_clock() -> None:
    """Neither before its time nor when it is the last one there is."""
    fired: list[str] = []

    async def main() -> float:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: fired.append(context["message"]))
        timer = loop.call_later(1.0, fired.append, "cancelled")
        loop.call_later(0.5, timer.cancel)
        loop.call_later(2.0, fired.append, "kept")
        loop.call_later(HOUR_S, fired.append, "late").cancel()
        soon = loop.call_soon(fired.append, "soon")
        soon.cancel()
        await asyncio.sleep(3.0)
        assert timer.cancelled()
        assert timer.when() == 1.0
        return now()

    assert run_virtual(main()) == 3.0
    assert fired == ["kept"]


def test_a_failing_callback_is_told_to_the_loops_handler() -> None:
    """As asyncio does: the loop goes on, and the error is not lost."""
    told: list[object] = []

    async def main() -> float:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        loop.call_later(1.0, int, "x")
        await asyncio.sleep(2.0)
        return now()

    assert run_virtual(main()) == 2.0
    assert [type(error) for error in told] == [ValueError]


def test_context_variables_follow_their_tasks() -> None:
    """Each callback runs in the context it was set in."""
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []

    async def one(name: str) -> None:
        who.set(name)
        await asyncio.sleep(1.0)
        seen.append(who.get())

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for name in ("a", "b"):
                group.create_task(one(name), name=name)
        seen.append(who.get())

    run_virtual(main())
    assert seen == ["a", "b", "nobody"]


def test_time_stands_still_while_anything_can_run() -> None:
    """Work takes no virtual time, however many turns of the loop it needs."""

    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return now()

    assert run_virtual(main()) == 0.0


def test_a_timeout_ends_a_wait() -> None:
    """`asyncio.timeout` fires on the virtual clock; one that is not reached costs nothing."""

    async def main() -> tuple[float, float]:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7.0):
                await asyncio.Event().wait()
        first = now()
        async with asyncio.timeout(HOUR_S):
            await asyncio.sleep(1.0)
        return first, now()

    assert run_virtual(main()) == (7.0, 8.0)


def test_a_cancelled_sleeper_wakes_at_once() -> None:
    """Cancelling takes effect now, and the timer left behind does not move the clock."""

    async def main() -> tuple[bool, float]:
        sleeper = asyncio.create_task(asyncio.sleep(HOUR_S), name="sleeper")
        await asyncio.sleep(2.0)
        sleeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeper
        await asyncio.sleep(1.0)
        return sleeper.cancelled(), now()

    assert run_virtual(main()) == (True, 3.0)


def test_a_failing_task_cancels_its_group() -> None:
    """TaskGroup works unchanged: one failure ends the others, now."""

    async def fail() -> None:
        await asyncio.sleep(3.0)
        raise ValueError("as planned")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail(), name="fail")
            group.create_task(asyncio.sleep(HOUR_S), name="sleeper")

    async def main() -> float:
        with pytest.raises(ExceptionGroup):
            await both()
        return now()

    assert run_virtual(main()) == 3.0


def test_a_queue_hands_items_over_when_they_come() -> None:
    """A bounded queue blocks its producer: items leave at the consumer's pace of one in 2 s."""

    async def main() -> list[tuple[int, float]]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

        async def produce() -> None:
            for item in range(3):
                await queue.put(item)

        producer = asyncio.create_task(produce(), name="producer")
        got = []
        for _ in range(3):
            await asyncio.sleep(2.0)
            got.append((await queue.get(), now()))
        await producer
        return got

    assert run_virtual(main()) == [(0, 2.0), (1, 4.0), (2, 6.0)]


@pytest.mark.timeout(20)
def test_a_deadlock_names_the_tasks_that_wait() -> None:
    """Instead of hanging, the loop says who waits for what can never come."""

    async def main() -> None:
        never = asyncio.Event()
        other = asyncio.create_task(never.wait(), name="decode-3")
        asyncio.current_task().set_name("the-main-task")  # type: ignore[union-attr]
        await other

    with pytest.raises(Deadlock, match="decode-3, the-main-task"):
        run_virtual(main())


def test_threads_are_refused() -> None:
    """A thread's time is not the loop's; the message says what to do instead."""

    async def main() -> None:
        await asyncio.to_thread(time.time)

    with pytest.raises(RuntimeError, match="model the work as a sleep"):
        run_virtual(main())


def test_looking_up_a_host_is_refused() -> None:
    """Names are looked up in a thread."""

    async def main() -> None:
        await asyncio.open_connection("localhost", 1)

    with pytest.raises(RuntimeError, match="threads have no place"):
        run_virtual(main())


def test_sockets_are_refused() -> None:
    """A socket becomes ready in real time, which does not pass here."""
    ours, theirs = socket.socketpair()

    async def main() -> None:
        ours.setblocking(False)
        with pytest.raises(NotImplementedError):
            await asyncio.get_running_loop().sock_recv(ours, 1)
        with pytest.raises(NotImplementedError):
            asyncio.get_running_loop().add_reader(ours, print)

    with ours, theirs:
        run_virtual(main())


def test_every_run_begins_at_zero_and_leaves_nothing_behind() -> None:
    """A second run starts afresh, and the loop of the first is closed."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> float:
        loops.append(asyncio.get_running_loop())
        begin = now()
        await asyncio.sleep(5.0)
        return begin

    assert run_virtual(main()) == run_virtual(main()) == 0.0
    assert all(isinstance(loop, VirtualTimeLoop) and loop.is_closed() for loop in loops)


def test_an_error_comes_out_of_the_run() -> None:
    """What `main` raises is what the caller sees."""

    async def main() -> None:
        await asyncio.sleep(1.0)
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run_virtual(main())
