"""What does the Conductor know of instances in other processes? A mirror of each, fed by messages.

A mirror has the load books of the instance (`PrefillLoad`, `DecodeLoad`, `ColocatedLoad`) and does
to them what the worker reports to have done to its own, so that a view is as exact as in one
process but for the messages under way. Its batch is the instance's own class, fed with the same
events. Whatever comes for a request that has ended here, or for a worker that was lost, is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from reference_cluster.colocated import ColocatedLoad
from reference_cluster.decode import DecodeLoad
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.messages import (
    Beat,
    BlockEvent,
    Cancel,
    Ended,
    Entered,
    FirstToken,
    Left,
    Message,
    Prefilled,
    Resend,
    Serve,
    Spanned,
    Started,
    stamp,
    work_of,
)
from reference_cluster.parts import Parts
from reference_cluster.policies.batching import DecodeBatch
from reference_cluster.policies.scheduling import Placement
from reference_cluster.prefill import PrefillLoad, only_token
from reference_cluster.request import OnEnd, Request
from reference_cluster.spans import Span

Tell = Callable[[Message], None]


@dataclass(slots=True)
class MirroredPool:
    """How full the worker's pool is, by its events and heartbeats."""

    capacity: int
    used: int = 0
    evictions: int = 0

    def beat(self, message: Beat) -> None:
        self.used, self.evictions = message.used_blocks, message.evicted_blocks


class IndexFollower:
    """Keeps the Conductor's index in step with one worker's pool, by its events."""

    def __init__(self, id: int, index: PrefixIndex, tell: Tell) -> None:
        self.id = id
        self.index = index
        self.tell = tell
        self.expected: int | None = None  # The next event's number; None: contents are to come.

    def apply(self, event: BlockEvent) -> None:
        if event.event_type == "cleared":
            self.index.cleared(self.id)
        elif event.event_id != self.expected:
            # Events were lost: nothing of this worker's is known for certain any more.
            if self.expected is not None:
                self.expected = None
                self.tell(Resend())
            return
        elif event.event_type == "stored":
            self.index.stored(self.id, event.seq_hashes)
        else:
            self.index.evicted(self.id, event.seq_hashes)
        self.expected = event.event_id + 1


class RemotePrefill(PrefillLoad):
    """A prefill instance in another process."""

    def __init__(
        self, id: int, parts: Parts, index: PrefixIndex, tell: Tell, on_end: OnEnd
    ) -> None:
        super().__init__(id, parts.cost, parts.config.block_tokens)
        self.tell = tell
        self.on_end = on_end
        self.pool: MirroredPool = MirroredPool(parts.dram_blocks)
        self.follower = IndexFollower(id, index, tell)
        self.queue: dict[int, float] = {}  # Predicted seconds of what waits, by request.
        self.requests: dict[int, Request] = {}  # Waiting or running.

    def accept(self, request: Request, placement: Placement) -> None:
        predicted_s = self.cost.occupied_s(request.input_tokens, placement.reused_tokens)
        self.queue[request.id] = predicted_s
        self.backlog_s += predicted_s
        self.load_changed()
        self.requests[request.id] = request
        self.promise(request.blocks)
        self.tell(Serve(work_of(request), placement))

    @property
    def owned(self) -> Collection[Request]:
        """What the worker must know of, if no message was lost."""
        return [*self.requests.values()]

    def receive(self, message: Message) -> None:
        match message:
            case Started():
                self.started(message)
            case Prefilled():
                self.prefilled(message)
            case BlockEvent():
                self.follower.apply(message)
            case Beat():
                self.pool.beat(message)

    def started(self, message: Started) -> None:
        self.unqueue(message.id)
        self.running, self.running_end_s = message.id, message.running_end_s
        self.load_changed()
        if message.id in self.requests:
            stamp(self.requests[message.id], message.stamps)

    def unqueue(self, id: int) -> None:
        self.backlog_s -= self.queue.pop(id, 0.0)
        if not self.queue:
            self.backlog_s = 0.0  # No rounding residue.
        self.load_changed()

    def prefilled(self, message: Prefilled) -> None:
        if self.running == message.id:
            self.running = None
            self.load_changed()
        request = self.requests.pop(message.id, None)
        if request is None:
            return
        self.forget_promises(request.blocks)
        stamp(request, message.stamps)
        if request.output_tokens == 1:
            request.output += message.stamps.output
            only_token(request)
            self.on_end(request)

    def cancel(self, request: Request) -> None:
        """Out of the books at once; the worker goes on to the end of its chunk."""
        self.unqueue(request.id)
        if self.requests.pop(request.id, None) is not None:
            self.forget_promises(request.blocks)
        self.tell(Cancel(request.id))


def span_of(message: Spanned) -> Span:
    return Span(
        message.start_s,
        message.steps,
        message.first_gap_s,
        message.growth_s,
        message.end_s,
        message.stopped,
    )


def spanned(batch: DecodeBatch, message: Spanned) -> list[Request]:
    """The worker's batch has made steps: so does its mirror."""
    for id, token in message.tokens:
        if id in batch.members:
            batch.members[id].request.output.append(token)
    return batch.apply(span_of(message))


def first_token(request: Request, message: FirstToken) -> None:
    stamp(request, message.stamps)
    request.produced_tokens = 1
    request.output += message.stamps.output
    if request.sink is not None:
        request.sink.tokens(1)


def finish_all(requests: list[Request], end_s: float, on_end: OnEnd) -> None:
    """They have left the batch with their last token."""
    for request in requests:
        if not request.is_cancelled:
            request.status = "finished"
            request.timeline.finished_s = end_s
            on_end(request)


def end(request: Request, message: Ended, on_end: OnEnd) -> None:
    """Refused or broken, for good."""
    request.status, request.reason = message.status, message.reason
    request.is_cancelled = True
    on_end(request)


class RemoteDecode(DecodeLoad):
    """A decode instance in another process."""

    def __init__(self, id: int, parts: Parts, tell: Tell, on_end: OnEnd) -> None:
        super().__init__(id, parts.cost, parts.capacity_tokens)
        self.tell = tell
        self.on_end = on_end

    @property
    def owned(self) -> Collection[Request]:
        """What the worker must know of, if no message was lost."""
        decoding = [one.request for one in self.batch.members.values()]
        return [*self.waiting, *(one for one in decoding if not one.is_cancelled)]

    def receive(self, message: Message) -> None:
        self.load_changed()
        match message:
            case FirstToken() if message.id in self.expected:
                request = self.expected[message.id]
                first_token(request, message)
                if request.has_stopped:
                    self.forget(request)
                    finish_all([request], message.stamps.first_token_s or 0.0, self.on_end)
                else:
                    self.waiting.append(request)
            case Entered() if message.id in self.expected:
                request = self.expected[message.id]
                self.waiting.remove(request)
                self.batch.join(request, message.start_s)
                self.forget(request)
            case Spanned():
                finish_all(spanned(self.batch, message), message.end_s, self.on_end)
            case Left() if message.id in self.batch.members:
                self.batch.remove(self.batch.members[message.id].request)
            case Ended() if message.id in self.expected:
                request = self.expected[message.id]
                self.forget(request)
                end(request, message, self.on_end)

    def cancel(self, request: Request) -> None:
        self.forget(request)
        if request in self.waiting:
            self.waiting.remove(request)
        self.tell(Cancel(request.id))


class RemoteColocated(ColocatedLoad):
    """A colocated instance in another process."""

    def __init__(
        self, id: int, parts: Parts, index: PrefixIndex, tell: Tell, on_end: OnEnd
    ) -> None:
        block_tokens = parts.config.block_tokens
        super().__init__(id, parts.cost, block_tokens, parts.capacity_tokens // block_tokens)
        self.tell = tell
        self.on_end = on_end
        self.pool: MirroredPool = MirroredPool(self.capacity_blocks)
        self.follower = IndexFollower(id, index, tell)
        self.held_blocks = 0

    @property
    def running_blocks(self) -> int:
        return self.held_blocks

    def accept(self, request: Request, placement: Placement) -> None:
        self.waiting.append(request)
        request.timeline.fetched_s = request.timeline.placed_s
        self.predicted_s[request.id] = self.cost.prefill_s(
            request.input_tokens, placement.reused_tokens
        )
        self.load_changed()
        self.tell(Serve(work_of(request), placement))

    @property
    def owned(self) -> Collection[Request]:
        """What the worker must know of, if no message was lost."""
        decoding = [one.request for one in self.batch.members.values()]
        started = [*self.waiting, *self.started]
        return [*started, *(one for one in decoding if not one.is_cancelled)]

    def receive(self, message: Message) -> None:
        self.load_changed()
        match message:
            case Started():
                self.begin(message)
            case FirstToken():
                self.first_token(message)
            case Entered():
                request = find(self.started, message.id)
                if request is not None:
                    self.started.remove(request)
                    self.batch.join(request, message.start_s)
            case Spanned():
                self.held_blocks = message.running_blocks
                finish_all(spanned(self.batch, message), message.end_s, self.on_end)
            case Left() if message.id in self.batch.members:
                self.batch.remove(self.batch.members[message.id].request)
            case BlockEvent():
                self.follower.apply(message)
            case Beat():
                self.pool.beat(message)
                self.held_blocks = message.pinned_blocks

    def begin(self, message: Started) -> None:
        request = find(self.waiting, message.id)
        if request is not None:
            self.running_end_s = message.running_end_s
            self.waiting.remove(request)
            del self.predicted_s[request.id]
            stamp(request, message.stamps)
            self.held_blocks += self.blocks_needed(request)
            self.started.append(request)

    def first_token(self, message: FirstToken) -> None:
        request = find(self.started, message.id)
        if request is None:
            return
        first_token(request, message)
        if request.output_tokens == 1 or request.has_stopped:
            self.started.remove(request)
            finish_all([request], message.stamps.first_token_s or 0.0, self.on_end)

    def cancel(self, request: Request) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
            del self.predicted_s[request.id]
        elif request in self.started:
            self.started.remove(request)
        self.load_changed()
        self.tell(Cancel(request.id))


def find(requests: deque[Request], id: int) -> Request | None:
    return next((one for one in requests if one.id == id), None)
