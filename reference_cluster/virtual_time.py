"""How does an hour pass in seconds? An event loop whose clock jumps to the next timer.

asyncio's own loop does everything but what has to do with time: its `_run_once` asks the system for
events and sleeps, this one takes the next timer from a heap and calls that now. Whatever is built
on timers and futures (sleep, timeout, TaskGroup, Queue, Runner) works unchanged. Timers of one
instant fire in the order they were set, which asyncio leaves open. Sockets and threads are refused:
their time is not ours. Of `BaseEventLoop` it leans on the private names `_ready`, `_stopping` and
`_run_once`, tested on every supported Python.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):  # noqa: N818  # the state itself, as people call it
    """Every task waits and no timer is set, so time can never move again."""


class Call:
    """A callback that is due at some time; the handle that `call_at` and `call_soon` return."""

    __slots__ = ("args", "callback", "context", "due_s")

    def __init__(
        self, due_s: float, callback: Callable[..., object], args: Any, context: Context | None
    ) -> None:
        self.due_s = due_s
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = context or copy_context()

    def cancel(self) -> None:
        self.callback = self.args = None

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.due_s


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """An event loop in virtual time, which begins at 0 s and moves only when all tasks wait.

    Its handles are `Call`s, which look like asyncio's to all who use them but not to mypy.
    """

    _ready: Any
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._timers: list[tuple[float, int, Call]] = []
        self._timers_set = 0

    def time(self) -> float:
        return self._now_s

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        call = Call(self._now_s, callback, args, context)
        self._ready.append(call)
        return call

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        call = Call(when, callback, args, context)
        self._timers_set += 1
        # The count decides between equal times, so that calls are never compared.
        heapq.heappush(self._timers, (when, self._timers_set, call))
        return call

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def _run_once(self) -> None:
        """One turn: if nothing is ready, jump to the next timer; then run all that is due."""
        ready, timers = self._ready, self._timers
        if not ready and not self._stopping:
            self._jump()
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        # What these calls make ready waits for the next turn, as in asyncio.
        for _ in range(len(ready)):
            call = ready.popleft()
            if call.callback is not None:
                self._run(call)

    def _jump(self) -> None:
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        if not timers:
            waiting = sorted(task.get_name() for task in asyncio.all_tasks(self))
            raise Deadlock(f"no timer is set and these tasks wait: {', '.join(waiting)}")
        # A timer may have been set for a moment that has passed.
        self._now_s = max(self._now_s, timers[0][0])

    def _run(self, call: Any) -> None:
        try:
            call.context.run(call.callback, *call.args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  # as asyncio: told to the loop's handler
            message = f"Exception in callback {call.callback!r}"
            self.call_exception_handler({"message": message, "exception": error})

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        # Runner's signal handler may call this; nobody sleeps, so nobody has to be woken.
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, *args: Any) -> Any:  # type: ignore[override]  # never returns
        raise RuntimeError("threads have no place in virtual time: model the work as a sleep")


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a virtual clock that begins at 0 s; raises Deadlock instead of hanging."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
