"""How does an hour pass in seconds? An event loop whose clock jumps to the next timer.

`asyncio.BaseEventLoop` works out how long it may sleep and calls `_selector.select(timeout)`; here
that call moves the clock to the next timer and reports no events. Everything built on timers and
futures (sleep, timeout, TaskGroup, Queue, Runner) works unchanged. Sockets and threads are refused:
their time is not ours. The loop leans on the private names `_selector`, `_scheduled`,
`_clock_resolution`, `_process_events` and `_write_to_self`, tested on every supported Python.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):  # noqa: N818  # the state itself, as people call it
    """Every task waits and no timer is set, so time can never move again."""


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """An event loop in virtual time, which begins at 0 s and moves only when all tasks wait."""

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._selector = self  # BaseEventLoop waits in `_selector.select()`; time jumps there.
        self._clock_resolution = math.ulp(0.0)

    def time(self) -> float:
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """Jump to the next timer. The loop calls this when nothing is ready to run."""
        if timeout is None:
            waiting = sorted(task.get_name() for task in asyncio.all_tasks(self))
            raise Deadlock(f"no timer is set and these tasks wait: {', '.join(waiting)}")
        if timeout > 0:
            # The timer's own time, not now + timeout: sums of differences would drift.
            self._now_s = self._scheduled[0].when()
            # The loop runs what is due before now + resolution: the next float, no more and, at
            # large times, no less, or nothing would ever be due.
            self._clock_resolution = math.ulp(self._now_s)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""

    def run_in_executor(self, *args: Any) -> Any:  # type: ignore[override]  # never returns
        raise RuntimeError("threads have no place in virtual time: model the work as a sleep")


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a virtual clock that begins at 0 s; raises Deadlock instead of hanging."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
