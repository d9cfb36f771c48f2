"""Which request goes out next, and when? At its time, after its session's last turn, or in turn."""

from __future__ import annotations

import bisect
import heapq
import math
from collections import defaultdict, deque

import msgspec
import numpy as np

from mooncake_bench.replay.schedule import Plan

NEVER = math.inf


class Retry(msgspec.Struct, frozen=True):
    """A rejected request is sent again: so many attempts in all, after what the server asks for.

    Where it does not say, after a random share of `base_s`, doubled with each attempt up to
    `cap_s` (full jitter).
    """

    attempts: int = 5
    base_s: float = 0.5
    cap_s: float = 30.0

    def pause_s(self, request: int, attempt: int, retry_after_s: float) -> float:
        """Seconds from the rejection of this attempt (1: the first) to the next one."""
        if retry_after_s >= 0.0:  # False for NaN.
            return min(retry_after_s, self.cap_s)
        jitter = np.random.default_rng((request, attempt))
        return float(jitter.random()) * min(self.cap_s, self.base_s * 2.0 ** (attempt - 1))


class Releases:
    """The order and the times in which the rows of a plan go out; seconds of time.perf_counter.

    In open loop a row's time is the plan's. In closed loop (`concurrency` > 0) it is the moment at
    which one of so many places became free. A row with a turn before it is released after that
    turn's end, in both.
    """

    def __init__(self, plan: Plan, start: float, concurrency: int = 0) -> None:
        self._plan = plan
        self._start = start
        self._followers: defaultdict[int, list[int]] = defaultdict(list)
        first = np.ones(len(plan), dtype=bool)
        if plan.after is not None:
            first = plan.after < 0
            for row in np.flatnonzero(~first).tolist():
                self._followers[int(plan.after[row])].append(row)
        self._rows: list[int] = np.flatnonzero(first).tolist()
        self._due: list[float] = (plan.due_s[first] + start).tolist()
        self._at = 0
        self._ready: list[tuple[float, int]] = []
        """Rows whose time an answer has set: a heap."""
        self._left = len(plan)
        self._places = deque([start] * concurrency) if concurrency else None
        """Since when each free place is free."""

    @property
    def is_over(self) -> bool:
        """Whether every row has gone out."""
        return self._left == 0

    @property
    def next_at(self) -> float:
        """When the next row goes out; NEVER while only an answer could tell."""
        if self._places is not None and not self._places:
            return NEVER
        planned = self._next_planned()
        return min(planned, self._ready[0][0]) if self._ready else planned

    def pop(self) -> tuple[int, float | None]:
        """The next row, and the moment of its release where an answer has set it."""
        at: float | None = None
        if self._ready and self._ready[0][0] <= self._next_planned():
            at, row = heapq.heappop(self._ready)
        else:
            row = self._rows[self._at]
            self._at += 1
        if self._places is not None:
            at = max(at or 0.0, self._places.popleft())
        self._left -= 1
        return row, at

    def settled(self, row: int, at: float) -> bool:
        """The row's request has ended; whether that sets somebody's time."""
        if self._places is not None:
            self._places.append(at)
        for follower in self._followers.pop(row, ()):
            assert self._plan.pause_s is not None
            due = self._start + float(self._plan.due_s[follower])
            due = max(due, at + float(self._plan.pause_s[follower]))
            heapq.heappush(self._ready, (due, follower))
        return self._places is not None or bool(self._ready)

    def due_before(self, until: float) -> int:
        """How many rows go out by then, as far as is known."""
        if self._places is not None:
            return min(len(self._places), self._left)
        planned = bisect.bisect_right(self._due, until, lo=self._at) - self._at
        return planned + sum(at <= until for at, _ in self._ready)

    def _next_planned(self) -> float:
        if self._at == len(self._rows):
            return NEVER
        return self._due[self._at] if self._places is None else self._places[0]
