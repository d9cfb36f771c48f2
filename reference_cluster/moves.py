"""How does KV get from worker to worker, and who may read or write whose memory meanwhile?

A fetch: the reader asks the holder to hold (pin), reads, and lets go. A hand-over: the sender asks
the decode worker to prepare room, writes layer by layer while the prefill runs, and says when all
has arrived. Every question and every transfer has a deadline; whoever waits for a peer that is no
member any more is told at once, and what was held for it is free again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from reference_cluster.carriers import Brought, Carrier, Room, Stream
from reference_cluster.config import ClusterConfig
from reference_cluster.errors import ClusterError
from reference_cluster.messages import (
    Abandoned,
    Arrived,
    Copied,
    Copy,
    Ended,
    Held,
    Hold,
    LetGo,
    Message,
    Peer,
    Prepare,
    Prepared,
    request_of,
    stamp,
    stamps_of,
    work_of,
)
from reference_cluster.parts import Parts
from reference_cluster.peers import Peers
from reference_cluster.policies.view import Holder
from reference_cluster.prefill import Queued
from reference_cluster.request import Block, Request
from reference_cluster.rpc import Office
from reference_cluster.transports.bytes import Range
from reference_cluster.worker_memory import Sums, WorkerMemory

QUIET_S = 1.0  # After it a peer that gave up or died has no bytes under way any more.
log = logging.getLogger(__name__)


class Desk(Protocol):
    """What moves need of the worker that they are made for (`worker.py:Worker`)."""

    id: int
    config: ClusterConfig
    parts: Parts
    loop: asyncio.AbstractEventLoop
    peers: Peers
    office: Office
    requests: dict[int, Request]
    instance: Any

    def tell(self, message: Message) -> None:
        """To the Conductor."""


@dataclass(slots=True)
class Lent:
    """Blocks pinned for a peer that reads them."""

    identity: bytes
    blocks: Sequence[Block]
    depth: int
    slots: list[int]
    expiry: asyncio.TimerHandle


class PrefillEnd:
    """Of a prefill worker: fetches, what it lends, and its streams to decode workers."""

    def __init__(self, worker: Desk, group: asyncio.TaskGroup, carrier: Carrier) -> None:
        self.worker = worker
        self.group = group
        self.carrier = carrier
        self.deadline_s = worker.config.failure.transfer_deadline_s
        self.lent: dict[tuple[bytes, int], Lent] = {}
        self.streams: dict[int, Stream] = {}
        self.failed_fetches = 0

    # ---- fetching ----------------------------------------------------------------------------

    def fetch(self, queued: Queued, best: Holder) -> None:
        """Copy the holder's longer prefix and keep it here too: the replication of hot blocks."""
        self.group.create_task(self.fetching(queued, best), name=f"fetch-{queued.request.id}")

    async def fetching(self, queued: Queued, best: Holder) -> None:
        request, depth = queued.request, queued.pinned
        wanted = request.blocks[depth : best.blocks]
        fetched, brought = await self.fetch_from(f"prefill-{best.id}", wanted, depth)
        block_tokens = self.worker.config.block_tokens
        tokens = min(best.tokens, (depth + fetched) * block_tokens) - depth * block_tokens
        request.fetched_tokens = max(0, tokens)
        self.carrier.sources[request.id] = brought
        self.worker.instance.fetched(queued, depth + fetched)
        self.carrier.drop(self.carrier.sources.pop(request.id))

    async def fetch_from(
        self, holder: str, blocks: Sequence[Any], depth: int
    ) -> tuple[int, Brought]:
        """How many leading blocks came; none where the holder has gone or is too slow: whoever
        wanted them computes them."""
        peers, asked = self.worker.peers, 0

        def hold(ask: int) -> Message:
            nonlocal asked
            asked = ask
            return Hold(ask, tuple(blocks), depth)

        try:
            async with asyncio.timeout(self.deadline_s):
                held: Held = await peers.ask(holder, hold, self.deadline_s)
                peer = peers.members[holder].endpoint
                return await self.carrier.fetch(number(holder), peer, blocks, held)
        except (ClusterError, KeyError, TimeoutError) as error:
            log.info("fetch from %s: %s", holder, error or "too slow")
            self.failed_fetches += 1
            return 0, {}
        finally:
            peers.tell(holder, LetGo(asked))

    # ---- lending -----------------------------------------------------------------------------

    def asked(self, identity: bytes, message: Message) -> None:
        match message:
            case Hold():
                self.hold(identity, message)
            case LetGo():
                self.let_go((identity, message.ask))

    def hold(self, identity: bytes, message: Hold) -> None:
        """Pin, and answer when all of it is in DRAM."""
        instance, key = self.worker.instance, (identity, message.ask)
        count, ready_s = instance.hold(message.blocks)
        instance.lending += 1
        # The reader gives up at its deadline; twice that is never too early to let go.
        expiry = self.worker.loop.call_later(2 * self.deadline_s, self.let_go, key)
        blocks = message.blocks[:count]
        self.lent[key] = Lent(identity, blocks, message.depth, [], expiry)
        ssd = instance.ssd
        if ssd is not None and ssd.are_awaited(blocks, ready_s, self.worker.loop.time()):
            ssd.when_read(blocks, ready_s, partial(self.lend, key))
        else:
            self.lend(key)

    def lend(self, key: tuple[bytes, int]) -> None:
        self.group.create_task(self.lending(key), name=f"lend-{key[1]}")

    async def lending(self, key: tuple[bytes, int]) -> None:
        lent = self.lent.get(key)
        if lent is None:
            return
        lent.slots, ranges = self.carrier.lend(lent.blocks)
        count = len(ranges) if self.carrier.has_bytes else len(lent.blocks)
        sums = await self.carrier.lent_sums(lent.slots)
        if key in self.lent:  # It may have been let go meanwhile.
            self.worker.office.post(lent.identity, Held(key[1], count, ranges, sums))

    def let_go(self, key: tuple[bytes, int]) -> None:
        lent = self.lent.pop(key, None)
        if lent is not None:
            lent.expiry.cancel()
            self.carrier.returned(lent.slots)
            self.worker.instance.pool.unpin(lent.blocks, lent.depth)
            self.worker.instance.lending -= 1

    # ---- handing over ------------------------------------------------------------------------

    def hand_over(self, request: Request, prefill_s: float) -> Stream | None:
        """The prefill begins: its KV starts to leave, unless none is needed or it has no room."""
        stream = Stream() if request.output_tokens > 1 else None
        running = self.worker.instance.running
        if not self.carrier.begin(request, running.pinned, stream):
            self.worker.tell(Ended(request.id, "failed", "no-memory", is_retried=True))
            request.is_cancelled = True
            return None
        if stream is None:
            return None
        self.streams[request.id] = stream
        sending = self.sending(request, prefill_s, stream)
        stream.task = self.group.create_task(sending, name=f"stream-{request.id}")
        return stream

    async def sending(self, request: Request, prefill_s: float, stream: Stream) -> None:
        peers, decode = self.worker.peers, request.decode
        assert decode is not None
        is_there = False
        try:
            work = msgspec.structs.replace(work_of(request), prompt=())
            room = await peers.ask(decode, lambda ask: Prepare(ask, work), self.deadline_s)
            peer = peers.members[decode].endpoint
            await self.carrier.stream(request, peer, prefill_s, room)
            sums = await self.carrier.sent_sums(request)
            is_there = True
            peers.tell(decode, Arrived(request.id, stamps_of(request), sums))
        except (ClusterError, KeyError) as error:
            log.info("hand-over of request %d to %s: %s", request.id, decode, error)
            self.worker.tell(Ended(request.id, "failed", "hand-over", is_retried=True))
        finally:
            if not is_there:
                peers.tell(decode, Abandoned(request.id))
            self.carrier.released(request)
            del self.streams[request.id]
            # Where it broke before the prefill's end, the Conductor may still stop that.
            if stream.is_prefilled.is_set() or request.is_cancelled:
                self.worker.requests.pop(request.id, None)

    def cancel(self, request: Request) -> None:
        """A prefill under way goes on to the end of its chunk and cancels its stream then."""
        stream = self.streams.get(request.id)
        if stream is not None and stream.is_prefilled.is_set():
            stream.cancel()

    def gone(self, peer: Peer) -> None:
        """What it held here is free. Questions to it have been answered with regret."""
        identity = f"{peer.name}.{peer.pid}".encode()
        for key in [key for key, lent in self.lent.items() if lent.identity == identity]:
            self.let_go(key)

    # ---- replication -------------------------------------------------------------------------

    def work(self, message: Message) -> None:
        if isinstance(message, Copy):
            self.group.create_task(self.copying(message), name=f"copy-{message.ask}")

    async def copying(self, message: Copy) -> None:
        """Keep what came, for as long as it is used."""
        fetched, brought = await self.fetch_from(message.holder, message.blocks, 0)
        stored = self.carrier.put(message.blocks[:fetched], brought)
        self.worker.instance.pool.unpin(message.blocks[:stored])
        self.carrier.drop(brought)
        self.worker.tell(Copied(message.ask, stored))

    def counts(self) -> dict[str, float]:
        counts = {"failed_fetches": self.failed_fetches, "lent": len(self.lent)}
        return {**counts, **self.carrier.counts, "streams": len(self.streams)}

    def check_integrity(self) -> None:
        """Raise AssertionError where slots, pool and what is lent do not agree."""
        self.carrier.check_integrity(not (self.lent or self.streams or self.worker.requests))


class DecodeEnd:
    """Of a decode worker: what is on its way here."""

    def __init__(
        self,
        worker: Desk,
        group: asyncio.TaskGroup,
        memory: WorkerMemory | None,
        on_arrived: Callable[[Request], None],
    ) -> None:
        self.worker = worker
        self.group = group
        self.memory = memory
        self.room = Room(memory) if memory is not None else None
        self.on_arrived = on_arrived
        self.coming: dict[int, bytes] = {}  # Who sends the KV of a request.

    def asked(self, identity: bytes, message: Message) -> None:
        match message:
            case Prepare():
                self.prepare(identity, message)
            case Arrived():
                self.arrived(message)
            case Abandoned():
                self.lost(message.id)

    def prepare(self, identity: bytes, message: Prepare) -> None:
        request = request_of(message.work)
        self.worker.requests[request.id] = request
        self.coming[request.id] = identity

        def there_is_room(ranges: list[Range]) -> None:
            self.worker.office.post(identity, Prepared(message.ask, ranges))

        if self.room is None:
            there_is_room([])
        else:
            self.room.ask(request.id, len(request.blocks), there_is_room)

    def arrived(self, message: Arrived) -> None:
        self.coming.pop(message.id, None)
        request = self.worker.requests.get(message.id)
        if request is not None:
            stamp(request, message.stamps)
            request.output += message.stamps.output
        if self.room is None and request is not None:
            self.on_arrived(request)
        elif self.room is not None and request is not None:
            self.group.create_task(
                self.verifying(request, message.sums), name=f"verify-{request.id}"
            )
        elif self.room is not None:
            self.room.leave(message.id)

    async def verifying(self, request: Request, sums: Sums) -> None:
        """Look at the bytes before anybody decodes with them; then they are in device memory."""
        assert self.memory is not None
        assert self.room is not None
        slots = self.room.slots[request.id]
        damaged = await self.memory.damaged(request.blocks, slots, sums)
        if damaged is None:
            await self.worker.instance.engine.take_in(request, slots)
        self.room.leave(request.id)
        if damaged is not None:
            self.worker.requests.pop(request.id, None)
            log.error("request %d: KV of its block %d arrived damaged", request.id, damaged)
            self.worker.tell(Ended(request.id, "failed", "kv-damaged"))
        elif not request.is_cancelled:
            self.on_arrived(request)

    def lost(self, id: int) -> None:
        """No more bytes will come of it; but for a moment those under way still may."""
        self.coming.pop(id, None)
        self.worker.requests.pop(id, None)
        if self.room is not None:
            self.worker.loop.call_later(QUIET_S, self.room.leave, id)

    def cancel(self, request: Request) -> None:
        """Its sender stops by itself and says so."""

    def gone(self, peer: Peer) -> None:
        identity = f"{peer.name}.{peer.pid}".encode()
        for id in [id for id, sender in self.coming.items() if sender == identity]:
            self.lost(id)

    def counts(self) -> dict[str, float]:
        counts: dict[str, float] = {"coming": len(self.coming)}
        if self.memory is not None:
            counts["verified_blocks"] = self.memory.verified_blocks
            counts["mismatched_blocks"] = self.memory.mismatched_blocks
        return counts

    def check_integrity(self) -> None:
        """Raise AssertionError where slots are lost."""
        if self.memory is not None:
            self.memory.slots.check_integrity()
            assert self.room is not None
            mine = sum(map(len, self.room.slots.values()))
            used = self.memory.slots.used
            assert used == mine, f"{used} slots are in use, {mine} of them by somebody"


def number(name: str | None) -> int:
    """The id in an instance's name, `decode-3`."""
    assert name is not None
    return int(name.rsplit("-", 1)[1])
