"""Is a probe plainly over the target already, so that the rest of it would teach nothing?

Two rules, either of which ends a probe:
1. *Out of reach*: more requests have missed their SLOs than the target allows of the whole probe.
   No answer still to come could change the verdict.
2. *Rising*: over the later half of the probe so far both the requests in flight and the TTFT (over
   the time of arrival) rise, each slope at least RISING_T of its standard errors above zero; the
   median TTFT of the latest answers is over its bound; and half of the allowed misses have
   happened. Looked for after a twentieth of the probe and SETTLE_S.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from mooncake_bench.replay.client import Progress
from mooncake_bench.replay.live import tbts_s, ttfts_s
from mooncake_bench.replay.recorder import FINISHED, Batch
from mooncake_bench.replay.schedule import Floats, Plan
from mooncake_bench.slo import Slo, percent, seconds

SETTLE_S = 5.0
RISING_T = 3.0
LATEST = 20
MIN_POINTS = 10
MAX_POINTS = 4000


class Overload:
    """Watches one probe through its records; `look` says why to stop, or nothing."""

    def __init__(
        self,
        plan: Plan,
        slo: Slo,
        by_class: dict[str, Slo],
        target: float,
        window_s: tuple[float, float],
    ) -> None:
        names = plan.classes.to_list() if plan.classes is not None else [None] * len(plan)
        bounds = [by_class.get(name, slo) if name is not None else slo for name in names]
        self._ttft_bound = np.array([one.ttft_s for one in bounds])
        self._tbt_bound = np.array([one.tbt_s for one in bounds])
        self._requests = plan.request
        self._window_s = window_s
        inside = (plan.due_s >= window_s[0]) & (plan.due_s < window_s[1])
        self._planned = int(inside.sum())
        self._target = target
        self._allowed = int(np.floor((1.0 - target) * self._planned + 1e-9))
        last_s = float(plan.due_s[-1]) if len(plan) else 0.0
        self._settled_s = max(SETTLE_S, 0.05 * last_s)
        self.missed = 0
        self._in_flight: deque[tuple[float, float]] = deque(maxlen=MAX_POINTS)
        self._ttft: deque[tuple[float, float, float]] = deque(maxlen=MAX_POINTS)
        """(arrival, TTFT, TTFT over its bound) of answers, in seconds."""

    def look(self, progress: Progress, batch: Batch | None) -> str:
        """Take new records into account; why the probe is plainly over, or ""."""
        self._in_flight.append((progress.elapsed_s, float(progress.in_flight)))
        if batch is not None:
            self._take(batch)
        if self.missed > self._allowed:
            return (
                f"{self.missed} of {self._planned} requests missed their SLOs already: "
                f"{percent(self._target)} is out of reach"
            )
        if progress.elapsed_s < self._settled_s or self.missed <= self._allowed / 2:
            return ""
        return self._rising(progress.elapsed_s)

    def _take(self, batch: Batch) -> None:
        table = batch.table()
        where = np.searchsorted(self._requests, table["request"].astype(np.int64))
        ttft_s, tbt_s = ttfts_s(table), np.array(tbts_s(batch))
        # NaN fails the first test and passes the second: a single token has no gaps.
        good = (table["status"] == FINISHED) & (ttft_s <= self._ttft_bound[where])
        good &= ~(tbt_s > self._tbt_bound[where])
        arrival_s = table["arrival_s"]
        inside = (arrival_s >= self._window_s[0]) & (arrival_s < self._window_s[1])
        self.missed += int((inside & ~good).sum())
        answered = ~np.isnan(ttft_s)
        shares = ttft_s[answered] / self._ttft_bound[where][answered]
        rows = zip(arrival_s[answered], ttft_s[answered], shares, strict=True)
        self._ttft.extend((float(at), float(took), float(share)) for at, took, share in rows)

    def _rising(self, elapsed_s: float) -> str:
        flight = np.array([one for one in self._in_flight if one[0] >= elapsed_s / 2])
        answers = sorted(one for one in self._ttft if one[0] >= elapsed_s / 2)
        if len(flight) < MIN_POINTS or len(answers) < LATEST:
            return ""
        found = np.array(answers)
        latest = found[-LATEST:]
        if float(np.median(latest[:, 2])) <= 1.0:
            return ""
        if min(slope_t(flight[:, 0], flight[:, 1]), slope_t(found[:, 0], found[:, 1])) < RISING_T:
            return ""
        return (
            f"concurrency and TTFT keep rising: {flight[-1, 1]:.0f} in flight, "
            f"TTFT p50 of the latest {seconds(float(np.median(latest[:, 1])))}"
        )


def slope_t(x: Floats, y: Floats) -> float:
    """Slope of the least-squares line of y over x, in its standard errors; 0 without a spread."""
    dx: npt.NDArray[np.float64] = x - x.mean()
    spread = float((dx * dx).sum())
    # What is equal but for rounding is level.
    if len(x) < 3 or spread <= 0.0 or np.ptp(y) <= 1e-9 * np.abs(y).max():
        return 0.0
    slope = float((dx * (y - y.mean())).sum()) / spread
    rest = y - y.mean() - slope * dx
    error = float(np.sqrt((rest * rest).sum() / (len(x) - 2) / spread))
    # A perfect line has no error: it rises, falls or is flat.
    return slope / error if error > 0.0 else float(np.sign(slope)) * np.inf if slope else 0.0
