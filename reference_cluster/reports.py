"""How old is what the Conductor knows of the instances' loads? As old as their last reports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from reference_cluster.cost_model import CostModel
from reference_cluster.policies.scheduling import Placement
from reference_cluster.policies.view import DecodeView, PrefillView
from reference_cluster.request import Request


class Queueing(Protocol):
    """An instance that can say how long its queue is."""

    def queue_s(self, now_s: float) -> float: ...


class Decoding(Protocol):
    """An instance that can say what it decodes and expects."""

    def decode_view(self, now_s: float) -> DecodeView: ...


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
        is_colocated: bool,
    ) -> None:
        self.every_s = every_s
        self.cost = cost
        self.prefill, self.decode = prefill, decode
        self.is_colocated = is_colocated
        now_s = asyncio.get_running_loop().time()
        self.queues_s = [one.queue_s(now_s) for one in prefill]
        self.views = [one.decode_view(now_s) for one in decode]
        # An instance that prefills and one that decodes report together, as a colocated one does.
        self.seen_at_s = [now_s] * max(len(prefill), len(decode))

    async def run(self) -> None:
        """Take reports for ever, one instance after the other."""
        count = len(self.seen_at_s)
        while True:
            for id in range(count):
                await asyncio.sleep(self.every_s / count)
                self.take(id, asyncio.get_running_loop().time())

    def take(self, id: int, now_s: float) -> None:
        """The instances of this number report; what was placed there is in it."""
        self.seen_at_s[id] = now_s
        if id < len(self.prefill):
            self.queues_s[id] = self.prefill[id].queue_s(now_s)
        if id < len(self.decode):
            self.views[id] = self.decode[id].decode_view(now_s)

    def put_in(self, prefill: list[PrefillView]) -> list[DecodeView]:
        """Write the reported loads over those of this moment; returns the decode views reported."""
        for view in prefill:
            view.queue_s = self.queues_s[view.id]
            if self.is_colocated:
                decode = self.views[view.id]
                view.context_tokens = decode.context_tokens + decode.expected_tokens
        return self.views

    def placed(self, request: Request, placement: Placement) -> None:
        """Algorithm 1, last step: the Conductor updates what it knows of the chosen instances."""
        prefill_s = self.cost.occupied_s(request.input_tokens, placement.reused_tokens)
        self.queues_s[placement.prefill] += prefill_s
        view = self.views[placement.decode]
        view.expected += 1
        view.expected_tokens += request.input_tokens
        view.free_tokens -= request.kv_tokens
