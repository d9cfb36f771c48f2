"""What did the client see of each request? Columns laid out before the start, no object a token."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

FINISHED, REJECTED, FAILED = 1, 2, 3
STATUSES = ("", "finished", "rejected", "failed")

SERVER_STAMPS = ("placed_s", "fetched_s", "prefill_start_s", "prefill_end_s", "transferred_s")
SERVER_NUMBERS = (
    *("fetched_tokens", "prefill_busy_s", "predicted_ttft_s", "predicted_tbt_s"),
    "prefix_replicas",
)
CHUNKS_MAX = 4096
"""Of one request's prefill: no server is believed more."""
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
    "transfer_start_s",
    *SERVER_NUMBERS,
    "chunks",  # of its prefill; 0 where it was one, or the server tells none
    "attempts",  # sends; more than one where a rejected request was sent again
    "retry_after_s",  # what the last rejection asked for
)
_NUMBER = (int, float)
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
    retry_after_s: float = math.nan
    """What a rejection asked for; NaN where it said nothing."""


class Batch(msgspec.Struct, frozen=True):
    """Finished records on their way: `rows` of ROW, texts beside them, token times of all.

    `times` holds float64 seconds: the token times of the first row, of the second, and so on,
    `received_tokens` each. `pieces` holds the chunks of prefills alike, `chunks` each: float64
    start, end and tokens.
    """

    rows: bytes
    reasons: list[str]
    prefills: list[str | None]
    decodes: list[str | None]
    times: bytes
    pieces: bytes = b""

    def table(self) -> npt.NDArray[Any]:
        return np.frombuffer(self.rows, dtype=ROW)


class Recorder:
    """The columns of one engine; rows are positions in its plan."""

    def __init__(self, requests: npt.NDArray[np.int64], due_s: npt.NDArray[np.float64]) -> None:
        self.origin = 0.0
        """The start of the run on the clock of the stamps; records count from it."""
        # Arrays, not NumPy's: assigning one item is several times cheaper.
        empty = array("d", [math.nan]) * len(requests)
        self._columns = {name: array("d", empty) for name in COLUMNS}
        self._columns["request"] = array("d", requests.astype(np.float64).tobytes())
        self._columns["arrival_s"] = array("d", due_s.tobytes())
        for name in ("status", "received_tokens", "attempts", "chunks"):
            self._columns[name] = array("d", bytes(8 * len(requests)))
        self._arrival_s = self._columns["arrival_s"]
        self._sent_s = self._columns["sent_s"]
        self._attempts = self._columns["attempts"]
        self._times: dict[int, array[float]] = {}
        self._texts: dict[int, tuple[str, str | None, str | None]] = {}
        self._pieces: dict[int, array[float]] = {}
        self._fresh: list[int] = []
        self.tokens = 0
        self.counts = [0, 0, 0, 0]
        """Settled requests by status."""

    def released(self, row: int, at: float) -> None:
        """The row's arrival depended on other answers, and is now known."""
        self._arrival_s[row] = at - self.origin

    def sent(self, row: int, at: float) -> None:
        """One more attempt; the first one's time is kept."""
        if not self._attempts[row]:
            self._sent_s[row] = at - self.origin
        self._attempts[row] += 1.0

    def settle(self, verdict: Verdict) -> None:
        """Close the record: every row is settled at most once."""
        columns, row = self._columns, verdict.row
        assert columns["status"][row] == 0.0
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
        columns["retry_after_s"][row] = verdict.retry_after_s
        if verdict.reason or timeline:
            prefill, decode = _name(timeline, "prefill"), _name(timeline, "decode")
            self._texts[row] = (verdict.reason, prefill, decode)
        self.counts[verdict.status] += 1
        self._fresh.append(row)

    def pending(self) -> npt.NDArray[np.int64]:
        """Positions of the rows that are not settled."""
        return np.flatnonzero(np.frombuffer(self._columns["status"]) == 0.0)

    def drain(self) -> Batch | None:
        """The records settled since the last drain, which are forgotten here."""
        rows, self._fresh = self._fresh, []
        if not rows:
            return None
        texts = [self._texts.pop(row, ("", None, None)) for row in rows]
        table = np.empty(len(rows), dtype=ROW)
        for name, column in self._columns.items():
            table[name] = np.frombuffer(column)[rows]
        times, pieces = array("d"), array("d")
        for row in rows:
            times.extend(self._times.pop(row, ()))
            pieces.extend(self._pieces.pop(row, ()))
        return Batch(
            rows=table.tobytes(),
            reasons=[text[0] for text in texts],
            prefills=[text[1] for text in texts],
            decodes=[text[2] for text in texts],
            times=(np.frombuffer(times, dtype=np.float64) - self.origin).tobytes(),
            pieces=pieces.tobytes(),
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
        sent_s = earliest_s = columns["sent_s"][row]
        first_s, finished_s = columns["first_token_s"][row], columns["finished_s"][row]
        latest_s = finished_s if math.isnan(first_s) else first_s
        for name in SERVER_STAMPS:
            stamp_s = sent_s + _number(timeline.get(name))
            if stamp_s == stamp_s:
                earliest_s = min(max(earliest_s, stamp_s), latest_s)
                columns[name][row] = earliest_s
        decode_s = sent_s + _number(timeline.get("decode_start_s"))
        if decode_s == decode_s:
            columns["decode_start_s"][row] = min(max(latest_s, decode_s), finished_s)
        transfer_s = sent_s + _number(timeline.get("transfer_start_s"))
        if transfer_s == transfer_s:
            columns["transfer_start_s"][row] = min(max(sent_s, transfer_s), latest_s)
        for name in SERVER_NUMBERS:
            columns[name][row] = _number(timeline.get(name))
        if chunks := timeline.get("chunks"):
            self._take_chunks(row, chunks, sent_s, latest_s)

    def _take_chunks(self, row: int, chunks: Any, sent_s: float, latest_s: float) -> None:
        """[start, end, tokens] of each, in seconds since the receipt; nonsense is left out."""
        pieces = array("d")
        for chunk in chunks[:CHUNKS_MAX] if isinstance(chunks, list) else ():
            if not (
                isinstance(chunk, list) and [type(one) in _NUMBER for one in chunk] == [True] * 3
            ):
                return
            start_s, end_s, tokens = chunk
            pieces.extend((min(sent_s + start_s, latest_s), min(sent_s + end_s, latest_s), tokens))
        self._pieces[row] = pieces
        self._columns["chunks"][row] = len(pieces) // 3


def _number(value: Any) -> float:
    return float(value) if isinstance(value, _NUMBER) else math.nan


def _name(timeline: dict[str, Any], key: str) -> str | None:
    value = timeline.get(key)
    return value[:64] if isinstance(value, str) else None
