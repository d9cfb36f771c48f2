"""What does the Conductor know of instances that are vLLM servers? Its own books of what it sent.

They are those of our instances (`PrefillLoad`, `DecodeLoad`, `ColocatedLoad`), kept by what is sent
and what comes back: a server computes prompts in order of arrival, about as fast as the profile
says, and every token that comes is counted. `begin` sends a request on its way, `stop` ends that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from reference_cluster.colocated import ColocatedLoad
from reference_cluster.decode import DecodeLoad
from reference_cluster.parts import Parts
from reference_cluster.policies.batching import DecodeBatch
from reference_cluster.policies.scheduling import Placement
from reference_cluster.prefill import PrefillLoad
from reference_cluster.remote import MirroredPool
from reference_cluster.request import Request

Begin = Callable[[Request, Placement], None]
Stop = Callable[[Request], None]


class Streams(DecodeBatch):
    """A batch whose members gain tokens one by one, as a server sends them."""

    def grow(self, request: Request, tokens: list[int]) -> None:
        request.output += tokens
        request.produced_tokens += len(tokens)
        self.context_tokens += len(tokens)
        if request.sink is not None:
            request.sink.tokens(len(tokens))

    def take_out(self, request: Request) -> None:
        super().take_out(request)
        self.leaving.clear()  # Nobody leaves at a step that is known.


class ProxiedPrefill(PrefillLoad):
    """A vLLM server that computes prompts."""

    def __init__(self, id: int, parts: Parts, begin: Begin, stop: Stop) -> None:
        super().__init__(id, parts.cost, parts.config.block_tokens)
        self.loop = asyncio.get_running_loop()
        self.begin = begin
        self.stop = stop
        self.pool: MirroredPool = MirroredPool(parts.dram_blocks)
        self.queue: dict[int, float] = {}  # Predicted seconds of what waits, by request.
        self.requests: dict[int, Request] = {}  # Waiting or running.

    def accept(self, request: Request, placement: Placement) -> None:
        predicted_s = self.cost.occupied_s(request.input_tokens, placement.reused_tokens)
        self.requests[request.id] = request
        self.queue[request.id] = predicted_s
        self.backlog_s += predicted_s
        self.promise(request.blocks)
        self.start_next()
        self.begin(request, placement)

    def start_next(self) -> None:
        """By order of arrival: the server does not say when it begins."""
        if self.running is None and self.queue:
            id, predicted_s = next(iter(self.queue.items()))
            self.unqueue(id)
            self.running, self.running_end_s = id, self.loop.time() + predicted_s
            self.requests[id].timeline.prefill_start_s = self.loop.time()
        self.load_changed()

    def unqueue(self, id: int) -> None:
        self.backlog_s -= self.queue.pop(id, 0.0)
        if not self.queue:
            self.backlog_s = 0.0  # No rounding residue.

    def leave(self, request: Request) -> None:
        """Prefilled, or nobody wants it any more."""
        if self.requests.pop(request.id, None) is None:
            return
        self.forget_promises(request.blocks)
        self.unqueue(request.id)
        if self.running == request.id:
            self.running = None
        self.start_next()

    def cancel(self, request: Request) -> None:
        self.leave(request)
        self.stop(request)


class ProxiedDecode(DecodeLoad):
    """A vLLM server that decodes."""

    def __init__(self, id: int, parts: Parts, stop: Stop) -> None:
        super().__init__(id, parts.cost, parts.capacity_tokens)
        self.stop = stop
        self.batch: Streams = Streams()

    def grow(self, request: Request, tokens: list[int], now_s: float) -> None:
        """Tokens have come; with the first of them it decodes."""
        if request.id not in self.batch.members:
            self.batch.join(request, now_s)
            self.forget(request)
        self.batch.grow(request, tokens)
        self.load_changed()

    def leave(self, request: Request) -> None:
        self.forget(request)
        if request.id in self.batch.members:
            self.batch.remove(request)
        self.load_changed()

    def cancel(self, request: Request) -> None:
        self.leave(request)
        self.stop(request)


class ProxiedColocated(ColocatedLoad):
    """A vLLM server that does both."""

    def __init__(self, id: int, parts: Parts, begin: Begin, stop: Stop) -> None:
        block_tokens = parts.config.block_tokens
        super().__init__(id, parts.cost, block_tokens, parts.capacity_tokens // block_tokens)
        self.loop = asyncio.get_running_loop()
        self.begin = begin
        self.stop = stop
        self.batch: Streams = Streams()
        self.pool: MirroredPool = MirroredPool(self.capacity_blocks)

    @property
    def running_blocks(self) -> int:
        decoding = [member.request for member in self.batch.members.values()]
        return sum(map(self.blocks_needed, [*self.started, *decoding]))

    def accept(self, request: Request, placement: Placement) -> None:
        self.waiting.append(request)
        self.predicted_s[request.id] = self.cost.prefill_s(
            request.input_tokens, placement.reused_tokens
        )
        self.start_next()
        self.begin(request, placement)

    def start_next(self) -> None:
        """By order of arrival: the server does not say when it begins."""
        if not self.started and self.waiting:
            request = self.waiting.popleft()
            self.started.append(request)
            request.timeline.prefill_start_s = self.loop.time()
            self.running_end_s = self.loop.time() + self.predicted_s.pop(request.id)
        self.load_changed()

    def grow(self, request: Request, tokens: list[int], now_s: float) -> None:
        """Tokens have come; with the first of them its prompt is done."""
        if request.id not in self.batch.members:
            self.take_out(request)
            self.batch.join(request, now_s)
            self.start_next()
        self.batch.grow(request, tokens)
        self.load_changed()

    def take_out(self, request: Request) -> None:
        """Of what waits or computes its prompt."""
        if request in self.started:
            self.started.remove(request)
            self.running_end_s = 0.0
        elif request in self.waiting:
            self.waiting.remove(request)
            del self.predicted_s[request.id]

    def leave(self, request: Request) -> None:
        self.take_out(request)
        if request.id in self.batch.members:
            self.batch.remove(request)
        self.start_next()

    def cancel(self, request: Request) -> None:
        self.leave(request)
        self.stop(request)
