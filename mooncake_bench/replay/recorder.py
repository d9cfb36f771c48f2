"""What did the client see of each request? Columns laid out before the start, no object a token."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

FINISHED, REJECTED, FAILED = 1, 2, 3
STATUSES = ("", "finished", "rejected", "failed")

SERVER_STAMPS = ("placed_s", "fetched_s", "prefill_start_s", "prefill_end_s", "transferred_s")
SERVER_NUMBERS = ("fetched_tokens", "prefill_busy_s", "predicted_ttft_s", "predicted_tbt_s")
COLUMNS = (
    "request",
    "arrival_s",  # intended
    "status",  # an index into STATUSES; 0: never sent
    "http_status",
    "sent_s",
    "first_token_s",
    "finished_s",
    "received_tokens",  # token events seen
    "usage_tokens",  # completion tokens by the server's usage
    "prompt_tokens",
    "reused_tokens",
    *SERVER_STAMPS,
    "decode_start_s",
    *SERVER_NUMBERS,
)
ROW = np.dtype([(name, np.float64) for name in COLUMNS])
"""A record as it travels; seconds are from the run's start, NaN is null, integers are exact."""


@dataclass(slots=True)
class Verdict:
    """How a request ended: recorder status, reason, and what the server said of it."""

    row: int
    status: int
    at: float
    """Seconds of `time.perf_counter`, as all times here."""
    reason: str = ""
    http_status: int = 0
    times: array[float] = field(default_factory=lambda: array("d"))
    usage: dict[str, Any] = field(default_factory=dict)
    timeline: dict[str, Any] = field(default_factory=dict)


class Batch(msgspec.Struct, frozen=True):
    """Finished records on their way: `rows` of ROW, texts beside them, token times of all.

    `times` holds float64 seconds: the token times of the first row, of the second, and so on,
    `received_tokens` each.
    """

    rows: bytes
    reasons: list[str]
    prefills: list[str | None]
    decodes: list[str | None]
    times: bytes

    def table(self) -> npt.NDArray[Any]:
        return np.frombuffer(self.rows, dtype=ROW)


class Recorder:
    """The columns of one engine; rows are positions in its plan."""

    def __init__(self, requests: npt.NDArray[np.int64], due_s: npt.NDArray[np.float64]) -> None:
        self.origin = 0.0
        """The start of the run on the clock of the stamps; records count from it."""
        self._table = np.full(len(requests), np.nan, dtype=ROW)
        self._table["request"] = requests
        self._table["arrival_s"] = due_s
        self._table["status"] = 0
        self._table["received_tokens"] = 0
        # Views: assigning into them is several times cheaper than into the table.
        self._columns = {name: self._table[name] for name in COLUMNS}
        self._times: dict[int, array[float]] = {}
        self._texts: dict[int, tuple[str, str | None, str | None]] = {}
        self._fresh: list[int] = []
        self.tokens = 0
        self.counts = [0, 0, 0, 0]
        """Settled requests by status."""

    def sent(self, row: int, at: float) -> None:
        self._columns["sent_s"][row] = at - self.origin

    def settle(self, verdict: Verdict) -> None:
        """Close the record: every row is settled at most once."""
        columns, row = self._columns, verdict.row
        assert columns["status"][row] == 0
        columns["status"][row] = verdict.status
        columns["finished_s"][row] = max(verdict.at - self.origin, 0.0)
        if verdict.http_status:
            columns["http_status"][row] = verdict.http_status
        if times := verdict.times:
            columns["first_token_s"][row] = times[0] - self.origin
            columns["received_tokens"][row] = len(times)
            self._times[row] = times
            self.tokens += len(times)
        if verdict.usage:
            self._take_usage(row, verdict.usage)
        timeline = verdict.timeline
        if timeline:
            self._take_timeline(row, timeline)
        self._texts[row] = (verdict.reason, _name(timeline, "prefill"), _name(timeline, "decode"))
        self.counts[verdict.status] += 1
        self._fresh.append(row)

    def pending(self) -> npt.NDArray[np.int64]:
        """Positions of the rows that are not settled."""
        return np.flatnonzero(self._columns["status"] == 0)

    def drain(self) -> Batch | None:
        """The records settled since the last drain, which are forgotten here."""
        rows, self._fresh = self._fresh, []
        if not rows:
            return None
        texts = [self._texts.pop(row) for row in rows]
        times = array("d")
        for row in rows:
            times.extend(self._times.pop(row, ()))
        return Batch(
            rows=self._table[rows].tobytes(),
            reasons=[text[0] for text in texts],
            prefills=[text[1] for text in texts],
            decodes=[text[2] for text in texts],
            times=(np.frombuffer(times, dtype=np.float64) - self.origin).tobytes(),
        )

    def _take_usage(self, row: int, usage: dict[str, Any]) -> None:
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        self._columns["usage_tokens"][row] = _number(usage.get("completion_tokens"))
        self._columns["prompt_tokens"][row] = _number(usage.get("prompt_tokens"))
        self._columns["reused_tokens"][row] = _number(cached)

    def _take_timeline(self, row: int, timeline: dict[str, Any]) -> None:
        """The server's stamps count from its receipt: put them on our clock, and in order."""
        columns = self._columns
        sent_s = earliest_s = float(columns["sent_s"][row])
        first_s, finished_s = columns["first_token_s"][row], float(columns["finished_s"][row])
        latest_s = finished_s if np.isnan(first_s) else float(first_s)
        for name in SERVER_STAMPS:
            stamp_s = sent_s + _number(timeline.get(name))
            if stamp_s == stamp_s:
                earliest_s = min(max(earliest_s, stamp_s), latest_s)
                columns[name][row] = earliest_s
        decode_s = sent_s + _number(timeline.get("decode_start_s"))
        if decode_s == decode_s:
            columns["decode_start_s"][row] = min(max(latest_s, decode_s), finished_s)
        for name in SERVER_NUMBERS:
            columns[name][row] = _number(timeline.get(name))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _name(timeline: dict[str, Any], key: str) -> str | None:
    value = timeline.get(key)
    return value[:64] if isinstance(value, str) else None
