"""How does a sleeper wake at an absolute time to within microseconds?

The timers of asyncio and uvloop round to a millisecond. On Linux a timer file descriptor does not;
elsewhere the loop's own timer serves.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import sys
import time

EARLY_S = 0.0001
"""A core that slept needs about so long to be up, so a long sleep ends this much early."""
LONG_S = 0.001
_CLOCK_MONOTONIC = 1  # The clock of time.perf_counter() on Linux.
_ABSOLUTE = 1
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec`: interval, then value, as seconds and nanoseconds."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """Wakes one sleeper at a time; belongs to the running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._is_woken = False
        self._descriptor = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._descriptor = self._libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._ring)

    def close(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    async def until(self, due: float) -> None:
        """Sleep until `time.perf_counter()` is `due`, or until somebody calls `wake`.

        Returns at once if that has passed; `due` may be infinite.
        """
        has_slept = False
        while not self._is_woken and (left_s := due - time.perf_counter()) > 0.0:
            if has_slept and left_s <= EARLY_S:
                continue  # Awake already: the moment is met to a microsecond.
            early_s = EARLY_S if left_s >= LONG_S else 0.0
            has_slept = True
            self._waiter = self._loop.create_future()
            if due < math.inf:
                self._set(due - early_s, left_s - early_s)
            await self._waiter
        self._is_woken = False

    def wake(self) -> None:
        """End the sleep under way, or keep the next one from beginning."""
        if not self._is_woken:
            self._is_woken = True
            self._end_sleep(self._waiter)

    def _set(self, due: float, left_s: float) -> None:
        if self._descriptor < 0:
            self._loop.call_later(left_s, self._end_sleep, self._waiter)
            return
        spec = _TimerSpec(0, 0, int(due), int(due % 1.0 * 1e9))
        if self._libc.timerfd_settime(self._descriptor, _ABSOLUTE, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _ring(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:  # Set anew between the wake-up and the read.
            return
        self._end_sleep(self._waiter)

    def _end_sleep(self, waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
