"""How does the replay stand right now? Figures for a live page; the records are the result."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_bench.replay.recorder import FINISHED, STATUSES, Batch
from mooncake_bench.slo import Slo

RECENT = 500


def ttfts_s(table: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """First token minus intended arrival, seconds; NaN where there was none."""
    value: npt.NDArray[np.float64] = table["first_token_s"] - table["arrival_s"]
    return value


def tbts_s(batch: Batch) -> list[float]:
    """TBT of each request of the batch: the mean of its longest 10 % gaps; NaN without gaps."""
    counts = batch.table()["received_tokens"].astype(np.int64)
    times = np.frombuffer(batch.times, dtype=np.float64)
    values = []
    for own in np.split(times, np.cumsum(counts)[:-1]):
        gaps = np.sort(np.diff(own))[::-1]
        longest = gaps[: -(-len(gaps) // 10)]
        values.append(float(longest.mean()) if len(longest) else float("nan"))
    return values


class LiveView:
    """Sums of all batches and the latencies of the last finished requests."""

    def __init__(self, slo: Slo, planned: int) -> None:
        self._slo = slo
        self.planned = planned
        self.counts = [0, 0, 0, 0]
        self.attained = 0
        self.tokens = 0
        self._ttft_s: deque[float] = deque(maxlen=RECENT)
        self._tbt_s: deque[float] = deque(maxlen=RECENT)

    def add(self, batch: Batch) -> None:
        """Take the batch into account."""
        table = batch.table()
        self.tokens += int(table["received_tokens"].sum())
        status = table["status"].astype(np.int64)
        for one, ttft_s, tbt_s in zip(status, ttfts_s(table), tbts_s(batch), strict=True):
            self.counts[one] += 1
            if one != FINISHED:
                continue
            if ttft_s == ttft_s:
                self._ttft_s.append(float(ttft_s))
            if tbt_s == tbt_s:
                self._tbt_s.append(tbt_s)
            # NaN fails the first test and passes the second: a single token has no gaps.
            self.attained += ttft_s <= self._slo.ttft_s and not tbt_s > self._slo.tbt_s

    def snapshot(self, elapsed_s: float) -> dict[str, Any]:
        """Plain JSON: counts, attainment and goodput so far, recent TTFT and TBT in seconds."""
        settled = sum(self.counts)
        return {
            "elapsed_s": round(elapsed_s, 1),
            "planned": self.planned,
            **{name: self.counts[status] for status, name in enumerate(STATUSES) if name},
            "output_tokens": self.tokens,
            "attainment": self.attained / settled if settled else None,
            "goodput_rps": self.attained / elapsed_s if elapsed_s > 0 else None,
            "recent_ttft_s": _quantiles(self._ttft_s),
            "recent_tbt_s": _quantiles(self._tbt_s),
        }


def _quantiles(values: deque[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.quantile(np.array(values), (0.5, 0.9, 0.99)).tolist()
    return {"p50": p50, "p90": p90, "p99": p99}
