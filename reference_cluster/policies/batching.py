"""Who computes together? Chunks of prompts, and decode batches whose members come and go."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from reference_cluster.cost_model import CostModel
from reference_cluster.request import Request
from reference_cluster.spans import Membership, Span, SpanLog


@dataclass(frozen=True, slots=True)
class Chunk:
    """The prompt tokens [start, end) of a request; the first chunk begins after what is reused."""

    request: Request
    start: int
    end: int
    is_first: bool

    @property
    def is_all(self) -> bool:
        """There is no other chunk of this prompt."""
        return self.is_first and self.end == self.request.input_tokens


def chunks(request: Request, chunk_tokens: int) -> Iterator[Chunk]:
    """The uncached rest of a prompt, in order; the caller advances `prefilled_tokens`."""
    while request.prefilled_tokens < request.input_tokens:
        start = request.prefilled_tokens
        end = min(request.input_tokens, start + chunk_tokens)
        yield Chunk(request, start, end, is_first=start == request.reused_tokens)


def fill_step(waiting: Iterator[Request], budget_tokens: int) -> list[Chunk]:
    """Chunks of waiting prompts, in order, that fit a step's token budget."""
    filled: list[Chunk] = []
    for request in waiting:
        if budget_tokens <= 0:
            break
        start = request.prefilled_tokens
        end = min(request.input_tokens, start + budget_tokens)
        filled.append(Chunk(request, start, end, is_first=start == request.reused_tokens))
        budget_tokens -= end - start
    return filled


@dataclass(slots=True)
class Member:
    """A request in a batch: it entered after `joined_step` steps, at a span's start."""

    request: Request
    joined_step: int
    first_span: int


class BatchObserver(Protocol):
    """Who is told what happens to a batch, to do the same to a mirror of it."""

    def entered(self, request: Request, start_s: float) -> None: ...

    def spanned(self, span: Span) -> None: ...

    def left(self, request: Request) -> None:
        """Taken out before its end; who has all its tokens leaves with the span."""


class DecodeBatch:
    """Requests that decode together; they join and leave only between spans.

    A member leaves at a known step, so that a span costs the same however large the batch is; or
    earlier, where a span says that its answer has stopped.
    """

    def __init__(self) -> None:
        self.log = SpanLog()
        self.members: dict[int, Member] = {}
        self.listening: dict[int, Request] = {}
        self.leaving: list[tuple[int, int]] = []  # (step, request id), a heap; ids may be gone.
        self.context_tokens = 0  # Tokens whose KV the members hold, at the last span's end.
        self.kv_tokens = 0  # What they may come to hold: reserved.
        self.steps_done = 0
        self.observer: BatchObserver | None = None
        self.span_start_s: float | None = None  # Set while a span of decode steps is under way.

    def context_tokens_at(self, now_s: float, cost: CostModel) -> int:
        """The context now: what it was when the span began and what its steps have added since."""
        if self.span_start_s is None or not self.members:
            return self.context_tokens
        size, elapsed_s = len(self.members), now_s - self.span_start_s
        if elapsed_s <= 0.0:
            return self.context_tokens
        done = cost.whole_steps_within(size, self.context_tokens, elapsed_s)
        return self.context_tokens + size * min(done, self.steps_until_leave)

    def load(self) -> tuple[int, int, float, int]:
        """What `context_tokens_at` is made of: members, context at the span's start, that start
        (infinite: no span is under way), and steps until the first member leaves."""
        if self.span_start_s is None or not self.members:
            return len(self.members), self.context_tokens, float("inf"), 0
        return len(self.members), self.context_tokens, self.span_start_s, self.steps_until_leave

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def steps_until_leave(self) -> int:
        """Steps until the first member has all its tokens."""
        while self.leaving[0][1] not in self.members:
            heapq.heappop(self.leaving)
        return self.leaving[0][0] - self.steps_done

    def join(self, request: Request, start_s: float) -> None:
        """Take part from the span on that begins now, at `start_s`."""
        assert request.output_tokens > request.produced_tokens
        steps = request.output_tokens - request.produced_tokens
        self.members[request.id] = Member(request, self.steps_done, len(self.log))
        heapq.heappush(self.leaving, (self.steps_done + steps, request.id))
        self.context_tokens += request.input_tokens + request.produced_tokens - 1
        self.kv_tokens += request.kv_tokens
        if request.sink is not None:
            self.listening[request.id] = request
        stamps = request.timeline
        if stamps.decode_start_s is None:
            # A live loop wakes late: its span may begin, on paper, before the request was here.
            stamps.decode_start_s = max(start_s, stamps.first_token_s or start_s)
        if self.observer is not None:
            self.observer.entered(request, start_s)

    def apply(self, span: Span) -> list[Request]:
        """Account for a span; returns the requests whose answers are complete, taken out."""
        if self.observer is not None:
            self.observer.spanned(span)
        self.log.append(span)
        self.span_start_s = None
        self.steps_done += span.steps
        self.context_tokens += span.steps * len(self.members)
        for request in self.listening.values():
            if request.sink is not None:
                request.sink.tokens(span.steps)
        finished = []
        for request in [self.members[id].request for id in span.stopped if id in self.members]:
            request.has_stopped = True
            self.take_out(request)
            finished.append(request)
        while self.leaving and self.leaving[0][0] <= self.steps_done:
            member = self.members.get(heapq.heappop(self.leaving)[1])
            if member is not None:
                self.take_out(member.request)
                finished.append(member.request)
        return finished

    def remove(self, request: Request) -> None:
        """Leave between spans before the end."""
        if self.observer is not None:
            self.observer.left(request)
        self.take_out(request)

    def take_out(self, request: Request) -> None:
        member = self.members.pop(request.id)
        self.listening.pop(request.id, None)
        request.produced_tokens += self.steps_done - member.joined_step
        request.memberships.append(Membership(self.log, member.first_span, len(self.log)))
        self.context_tokens -= request.input_tokens + request.produced_tokens - 1
        self.kv_tokens -= request.kv_tokens
