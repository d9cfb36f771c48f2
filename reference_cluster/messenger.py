"""How does KV get from one node to another, and when? Streams to decode, fetches of prefixes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from reference_cluster.cost_model import CostModel
from reference_cluster.request import Request
from reference_cluster.transports.base import Flow, Transport


class Delivery(Protocol):
    """A request's KV on its way from prefill to decode, as the prefill instance sees it."""

    def prefilled(self) -> None:
        """The last layer of the last chunk exists: nothing holds the rest back."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""


class Handover:
    """One request's KV on its way from prefill to decode: done when both ends have finished."""

    def __init__(self, on_arrived: Callable[[], None]) -> None:
        self.on_arrived = on_arrived
        self.flow: Flow | None = None
        self.is_moved = False
        self.is_prefilled = False

    def moved(self) -> None:
        """The last byte is there. A stream may be ahead of a prefill that ends late (live)."""
        self.flow = None
        self.is_moved = True
        if self.is_prefilled:
            self.on_arrived()

    def prefilled(self) -> None:
        """The last layer of the last chunk exists: nothing holds the rest back."""
        self.is_prefilled = True
        if self.is_moved:
            self.on_arrived()
        elif self.flow is not None:
            self.flow.lift_cap()

    def cancel(self) -> None:
        if self.flow is not None:
            self.flow.cancel()
            self.flow = None


class Messenger:
    """Plans moves of KV between nodes and runs them on a transport."""

    def __init__(self, transport: Transport, cost: CostModel, layerwise: bool) -> None:
        self.transport = transport
        self.cost = cost
        self.layerwise = layerwise
        self.fetched_tokens = 0
        self.streamed_tokens = 0

    def hand_over(
        self,
        request: Request,
        source: int,
        target: int,
        prefill_s: float,
        on_arrived: Callable[[], None],
    ) -> Handover:
        """Called when a prefill of about `prefill_s` begins: its layers are sent as they come.

        Layer by layer, all but the last layer's share of the bytes can leave during the prefill
        (Mooncake, layer-wise prefill). `target` gets the whole prompt's KV.
        """
        handover = Handover(on_arrived)
        size_bytes = self.cost.kv_bytes(request.input_tokens)
        self.streamed_tokens += request.input_tokens
        layers = self.cost.profile.layers
        if self.layerwise:
            cap = size_bytes * (layers - 1) / layers / prefill_s
            request.timeline.transfer_start_s = self.now_s()
            handover.flow = self.transport.start(source, target, size_bytes, handover.moved, cap)
        else:
            handover.flow = Later(self, request, source, target, size_bytes, handover)
        return handover

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def fetch(self, tokens: int, source: int, target: int, on_done: Callable[[], None]) -> Flow:
        """Copy a prefix's KV of `tokens` from one prefill node to another."""
        self.fetched_tokens += tokens
        return self.transport.start(source, target, self.cost.kv_bytes(tokens), on_done)


class Later:
    """A serialised store: the bytes begin to move when the whole prefill is done."""

    def __init__(
        self,
        messenger: Messenger,
        request: Request,
        source: int,
        target: int,
        size_bytes: int,
        handover: Handover,
    ) -> None:
        self.messenger = messenger
        self.request = request
        self.source, self.target, self.size_bytes = source, target, size_bytes
        self.handover = handover

    def lift_cap(self) -> None:
        self.request.timeline.transfer_start_s = self.messenger.now_s()
        self.handover.flow = self.messenger.transport.start(
            self.source, self.target, self.size_bytes, self.handover.moved
        )

    def cancel(self) -> None:
        """Nothing has begun."""
