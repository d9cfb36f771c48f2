"""When did each token come? Spans of decode steps, kept once an instance and not once a request.

A batch's members join and leave only between spans, so a request's tokens lie in an unbroken range
of its instance's spans: the log stores each span once and each request the range it took part in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from reference_cluster.request import Request


@dataclass(slots=True)
class Span:
    """`steps` decode steps with unchanged members.

    Step j (from 0) takes `first_gap_s + j * growth_s`; the last one ends at `end_s`.
    """

    start_s: float
    steps: int
    first_gap_s: float
    growth_s: float
    end_s: float
    stopped: Sequence[int] = ()  # Members whose answers ended by themselves with the last step.


class SpanLog:
    """All spans of one instance in time order, as columns."""

    def __init__(self) -> None:
        self.start_s = array("d")
        self.steps = array("q")
        self.first_gap_s = array("d")
        self.growth_s = array("d")

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, span: Span) -> None:
        self.start_s.append(span.start_s)
        self.steps.append(span.steps)
        self.first_gap_s.append(span.first_gap_s)
        self.growth_s.append(span.growth_s)


class Membership(NamedTuple):
    """A request took part in the spans [first, past) of `log`."""

    log: SpanLog
    first: int
    past: int


SpanColumns = dict[str, npt.NDArray[np.float64] | npt.NDArray[np.int64]]


def span_columns(requests: Iterable[Request]) -> SpanColumns:
    """One row a (request, span), in order of requests and time: the results schema's span columns.

    Token j of a row is at `start_s + (j + 1) first_gap_s + growth_s j (j + 1) / 2`.
    """
    owners: list[int] = []
    logs: dict[int, SpanLog] = {}
    log_offsets: dict[int, int] = {}
    bounds: list[tuple[int, int, int]] = []
    for request in requests:
        for log, first, past in request.memberships:
            if past > first:
                logs.setdefault(id(log), log)
                owners.append(request.id)
                bounds.append((id(log), first, past))
    offset = 0
    for key, log in logs.items():
        log_offsets[key] = offset
        offset += len(log)
    firsts = np.array([log_offsets[key] + first for key, first, _ in bounds], dtype=np.int64)
    counts = np.array([past - first for _, first, past in bounds], dtype=np.int64)
    # Row r of request i is span firsts[i] + (r - rows before i).
    before = np.cumsum(counts) - counts
    rows = np.arange(counts.sum(), dtype=np.int64) + np.repeat(firsts - before, counts)

    def column(name: str) -> npt.NDArray[np.float64]:
        parts = [np.frombuffer(getattr(log, name), dtype=np.float64) for log in logs.values()]
        return np.concatenate(parts)[rows] if parts else np.empty(0)

    steps = [np.frombuffer(log.steps, dtype=np.int64) for log in logs.values()]
    return {
        "request": np.repeat(np.array(owners, dtype=np.int64), counts),
        "start_s": column("start_s"),
        "steps": np.concatenate(steps)[rows] if steps else np.empty(0, dtype=np.int64),
        "first_gap_s": column("first_gap_s"),
        "growth_s": column("growth_s"),
    }
