"""What does a decode instance do? It runs decode steps for ever over requests whose KV is here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from reference_cluster.cost_model import CostModel
from reference_cluster.engines.base import Engine
from reference_cluster.policies.batching import DecodeBatch
from reference_cluster.policies.view import LOST_TOKENS, DecodeView
from reference_cluster.reports import BatchLoad, LoadChanged, nobody
from reference_cluster.request import Request


class DecodeLoad:
    """What decodes and is expected on a decode instance: its own books, and those of its mirror."""

    def __init__(self, id: int, cost: CostModel, capacity_tokens: int) -> None:
        self.id = id
        self.name = f"decode-{id}"
        self.cost = cost
        self.capacity_tokens = capacity_tokens
        self.is_shunned = False  # Nobody is to be placed here.
        self.batch = DecodeBatch()
        self.waiting: deque[Request] = deque()
        self.expected: dict[int, Request] = {}  # Placed here, not yet in the batch.
        self.expected_tokens = 0
        self.expected_kv_tokens = 0
        self.load_changed: LoadChanged = nobody  # Who follows the load.

    def decode_view(self, now_s: float) -> DecodeView:
        return DecodeView(
            self.id,
            self.name,
            self.batch.size,
            self.batch.context_tokens_at(now_s, self.cost),
            len(self.expected),
            self.expected_tokens,
            self.free_tokens,
        )

    def decode_load(self) -> BatchLoad:
        """What `decode_view` is made of at any time."""
        return *self.batch.load(), len(self.expected), self.expected_tokens, self.free_tokens

    @property
    def free_tokens(self) -> int:
        """Of device memory, what neither running nor expected requests will need."""
        if self.is_shunned:
            return LOST_TOKENS
        return self.capacity_tokens - self.batch.kv_tokens - self.expected_kv_tokens

    def detach(self) -> None:
        """It is lost: whatever still happens to it concerns nobody."""
        self.load_changed = nobody

    def expect(self, request: Request) -> None:
        """The Conductor has placed a request here; it is still to be prefilled."""
        self.expected[request.id] = request
        self.expected_tokens += request.input_tokens
        self.expected_kv_tokens += request.kv_tokens
        self.load_changed()

    def forget(self, request: Request) -> None:
        """An expected request joins now, or will never come."""
        if self.expected.pop(request.id, None) is not None:
            self.expected_tokens -= request.input_tokens
            self.expected_kv_tokens -= request.kv_tokens
            self.load_changed()


class DecodeInstance(DecodeLoad):
    """A model replica that only decodes; joins and departures happen only between steps."""

    def __init__(
        self,
        id: int,
        cost: CostModel,
        engine: Engine,
        capacity_tokens: int,
        batch_max: int,
        tbt_slo_s: float | None,
        on_end: Callable[[Request], None],
    ) -> None:
        super().__init__(id, cost, capacity_tokens)
        self.engine = engine
        self.batch_max = batch_max
        self.tbt_slo_s = tbt_slo_s  # None: whoever arrives is served.
        self.on_end = on_end
        self.loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()

    def join(self, request: Request) -> None:
        """The request's KV is here. The local scheduler checks its TBT once more."""
        now_s = self.loop.time()
        if self.is_too_busy(request, now_s):
            self.forget(request)
            request.status, request.reason = "rejected", "tbt-at-decode"
            self.on_end(request)
            return
        request.timeline.first_token_s = now_s
        request.produced_tokens = 1
        if request.sink is not None:
            request.sink.tokens(1)
        if request.has_stopped:  # What was to come has no place in the batch.
            self.forget(request)
            self.finish(request, now_s)
            return
        self.waiting.append(request)
        self.changed.set()

    def is_too_busy(self, request: Request, now_s: float) -> bool:
        if self.tbt_slo_s is None:
            return False
        waiting_tokens = sum(one.input_tokens for one in self.waiting)
        context_tokens = self.batch.context_tokens_at(now_s, self.cost) + waiting_tokens
        context_tokens += request.input_tokens
        batch = self.batch.size + len(self.waiting) + 1
        return self.cost.step_s(batch, context_tokens) > self.tbt_slo_s

    async def run(self) -> None:
        """Decode for ever."""
        free_s = self.loop.time()
        while True:
            self.remove_cancelled()
            self.admit_waiting(free_s)
            self.changed.clear()
            self.load_changed()
            if not self.batch.size:
                await self.changed.wait()
                free_s = self.loop.time()
                continue
            self.batch.span_start_s = free_s
            # A torch engine returns after one step, a modelled one when something changes.
            span = await self.engine.decode(free_s, self.batch, self.changed)
            free_s = span.end_s
            self.load_changed()
            for request in self.batch.apply(span):
                if not request.is_cancelled:
                    self.finish(request, span.end_s)

    def finish(self, request: Request, end_s: float) -> None:
        request.status = "finished"
        request.timeline.finished_s = end_s
        self.on_end(request)

    def admit_waiting(self, start_s: float) -> None:
        """First come, first served, while batch and memory have room."""
        while self.waiting and self.batch.size < self.batch_max:
            request = self.waiting[0]
            if self.batch.kv_tokens + request.kv_tokens > self.capacity_tokens:
                return
            self.batch.join(request, start_s)
            self.forget(request)
            self.waiting.popleft()

    def remove_cancelled(self) -> None:
        for member in [one for one in self.batch.members.values() if one.request.is_cancelled]:
            self.batch.remove(member.request)

    def cancel(self, request: Request) -> None:
        """The client has gone: leave at the next step boundary (`is_cancelled` is set)."""
        self.forget(request)
        if request in self.waiting:
            self.waiting.remove(request)
        self.changed.set()

    def check_integrity(self) -> None:
        batch = self.batch
        kv_tokens = sum(member.request.kv_tokens for member in batch.members.values())
        assert batch.kv_tokens == kv_tokens, f"{self.name} {batch.kv_tokens} != {kv_tokens}"
        assert batch.kv_tokens <= self.capacity_tokens, f"{self.name} is over its memory"
        expected = sum(request.kv_tokens for request in self.expected.values())
        assert self.expected_kv_tokens == expected, f"{self.name} expects {expected}"
