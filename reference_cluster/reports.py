"""How old is what the Conductor knows of the instances' loads? As old as their last reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from reference_cluster.cost_model import CostModel
from reference_cluster.policies.scheduling import Placement
from reference_cluster.policies.view import DecodeView, DecodeViews, Floats
from reference_cluster.request import Request

LoadChanged = Callable[[], object]
# Batch, context at its span's start, that start (infinite: none is under way), steps until the span
# ends, expected requests and their tokens, free tokens.
BatchLoad = tuple[int, int, float, int, int, int, int]


class Queueing(Protocol):
    """An instance that can say how long its queue is."""

    load_changed: LoadChanged  # It calls this whenever `queue_load` has changed.

    def queue_s(self, now_s: float) -> float: ...

    def queue_load(self) -> tuple[float, float]:
        """Seconds of work that wait, and until when it is busy with what runs."""


class Decoding(Protocol):
    """An instance that can say what it decodes and expects."""

    load_changed: LoadChanged  # It calls this whenever `decode_load` has changed.

    def decode_view(self, now_s: float) -> DecodeView: ...

    def decode_load(self) -> BatchLoad: ...


class Loads:
    """Every load as it is now, in columns that only those instances are asked for whose load has
    changed since."""

    def __init__(
        self, cost: CostModel, prefill: Sequence[Queueing], decode: Sequence[Decoding]
    ) -> None:
        self.cost = cost
        self.prefill, self.decode = prefill, decode
        self.changed = dict.fromkeys(range(max(len(prefill), len(decode))))
        self.backlog_s = np.zeros(len(prefill))
        self.busy_until_s = np.zeros(len(prefill))
        self.span_start_s = np.zeros(len(decode))
        self.counts = np.zeros((6, len(decode)), dtype=np.int64)
        for id in range(len(self.changed)):
            self.follow(id, 0.0)

    def follow(self, id: int, now_s: float) -> None:
        """The instances of this number tell when their loads have changed; they have now."""
        self.changed[id] = None
        for instances in (self.prefill, self.decode):
            if id < len(instances):
                instances[id].load_changed = partial(self.changed.setdefault, id)

    def ask(self) -> None:
        """The instances of each number whose load has changed."""
        for id in self.changed:
            if id < len(self.prefill):
                self.backlog_s[id], self.busy_until_s[id] = self.prefill[id].queue_load()
            if id < len(self.decode):
                load = self.decode[id].decode_load()
                self.span_start_s[id] = load[2]
                self.counts[:, id] = load[:2] + load[3:]
        self.changed.clear()

    def queues_s(self, now_s: float) -> Floats:
        """Predicted time until a request that comes now could start, by instance."""
        self.ask()
        return self.backlog_s + np.maximum(self.busy_until_s - now_s, 0.0)

    def decoding(self, now_s: float) -> DecodeViews:
        self.ask()
        size, context, until_leave, expected, expected_tokens, free_tokens = self.counts
        elapsed_s = now_s - self.span_start_s
        running = np.flatnonzero(elapsed_s > 0.0)
        if len(running):
            batch, before = size[running], context[running]
            done = self.cost.whole_steps(batch, before, elapsed_s[running])
            context = context.copy()
            context[running] = before + batch * np.minimum(done, until_leave[running])
        return DecodeViews(size, context, expected, expected_tokens, free_tokens)

    def placed(self, request: Request, placement: Placement) -> None:
        """The instances say it themselves."""


def nobody() -> None:
    """Nobody follows an instance's load."""


class LoadReports:
    """Every instance reports once in `every_s` seconds, at moments spread evenly. In between the
    Conductor adds what it places itself, and knows nothing of what is done meanwhile.

    What an instance holds of a prefix is no load: that is in the Conductor's own index at once.
    """

    def __init__(
        self,
        every_s: float,
        cost: CostModel,
        prefill: Sequence[Queueing],
        decode: Sequence[Decoding],
    ) -> None:
        self.every_s = every_s
        self.cost = cost
        self.prefill, self.decode = prefill, decode
        self.queued_s = np.zeros(len(prefill))
        self.counts = np.zeros((5, len(decode)), dtype=np.int64)
        now_s = asyncio.get_running_loop().time()
        # An instance that prefills and one that decodes report together, as a colocated one does.
        self.seen_at_s = [now_s] * max(len(prefill), len(decode))
        for id in range(len(self.seen_at_s)):
            self.take(id, now_s)

    async def run(self) -> None:
        """Take reports for ever, one instance after the other."""
        count = len(self.seen_at_s)
        while True:
            for id in range(count):
                await asyncio.sleep(self.every_s / count)
                self.take(id, asyncio.get_running_loop().time())

    def follow(self, id: int, now_s: float) -> None:
        """That an instance was lost or is back is known at once."""
        self.take(id, now_s)

    def take(self, id: int, now_s: float) -> None:
        """The instances of this number report; what was placed there is in it."""
        self.seen_at_s[id] = now_s
        if id < len(self.prefill):
            self.queued_s[id] = self.prefill[id].queue_s(now_s)
        if id < len(self.decode):
            one = self.decode[id].decode_view(now_s)
            counts = one.batch, one.context_tokens, one.expected, one.expected_tokens
            self.counts[:, id] = *counts, one.free_tokens

    def queues_s(self, now_s: float) -> Floats:
        return self.queued_s.copy()

    def decoding(self, now_s: float) -> DecodeViews:
        batch, context, expected, expected_tokens, free_tokens = self.counts.copy()
        return DecodeViews(batch, context, expected, expected_tokens, free_tokens)

    def placed(self, request: Request, placement: Placement) -> None:
        """Algorithm 1, last step: the Conductor updates what it knows of the chosen instances."""
        prefill_s = self.cost.occupied_s(request.input_tokens, placement.reused_tokens)
        self.queued_s[placement.prefill] += prefill_s
        _, _, expected, expected_tokens, free_tokens = self.counts
        expected[placement.decode] += 1
        expected_tokens[placement.decode] += request.input_tokens
        free_tokens[placement.decode] -= request.kv_tokens
