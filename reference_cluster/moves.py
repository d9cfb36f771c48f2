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
from typing import Any, Protocol

from reference_cluster.config import ClusterConfig
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
from reference_cluster.messenger import Messenger
from reference_cluster.parts import Parts
from reference_cluster.peers import Peers
from reference_cluster.policies.view import Holder
from reference_cluster.prefill import Queued
from reference_cluster.request import Block, Request
from reference_cluster.rpc import NoAnswerError, Office
from reference_cluster.transports.modelled import ModelledTransport

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


class ModelledMoves:
    """Moves no bytes, but takes as long as the links of this worker's node would.

    A link is shared by what this worker sends and fetches; what others send to the same peer is
    not seen here.
    """

    def __init__(self, worker: Desk) -> None:
        parts, config = worker.parts, worker.config
        self.id, self.groups = worker.id, config.prefill_groups
        link = config.network.link_bytes_per_s or parts.profile.link_bytes_per_s
        self.transport = ModelledTransport(self.groups + config.decode_instances, link)
        for id in range(self.groups):
            self.transport.widen(id, config.prefill.nodes_per_group)
        self.messenger = Messenger(self.transport, parts.cost, config.prefill.layerwise)

    async def fetch(self, tokens: int, holder: int) -> None:
        done = asyncio.get_running_loop().create_future()
        flow = self.messenger.fetch(tokens, holder, self.id, lambda: done.set_result(None))
        try:
            await done
        except asyncio.CancelledError:
            flow.cancel()
            raise

    async def stream(self, request: Request, prefill_s: float, prefilled: asyncio.Event) -> None:
        """Returns when the prefill has ended and all its KV is there."""
        arrived = asyncio.Event()
        node = self.groups + number(request.decode)
        handover = self.messenger.hand_over(request, self.id, node, prefill_s, arrived.set)
        try:
            await prefilled.wait()
            handover.prefilled()
            await arrived.wait()
        except asyncio.CancelledError:
            handover.cancel()
            raise


class Stream:
    """One hand-over under way, as the prefill instance sees it."""

    def __init__(self) -> None:
        self.is_prefilled = asyncio.Event()
        self.task: asyncio.Task[None]

    def prefilled(self) -> None:
        self.is_prefilled.set()

    def cancel(self) -> None:
        self.task.cancel()


@dataclass(slots=True)
class Lent:
    """Blocks pinned for a peer that reads them."""

    identity: bytes
    blocks: Sequence[Block]
    depth: int
    expiry: asyncio.TimerHandle


class PrefillEnd:
    """Of a prefill worker: fetches, what it lends, and its streams to decode workers."""

    def __init__(self, worker: Desk, group: asyncio.TaskGroup) -> None:
        self.worker = worker
        self.group = group
        self.deadline_s = worker.config.failure.transfer_deadline_s
        self.moves = ModelledMoves(worker)
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
        fetched = await self.fetch_from(f"prefill-{best.id}", wanted, depth)
        block_tokens = self.worker.config.block_tokens
        tokens = min(best.tokens, (depth + fetched) * block_tokens) - depth * block_tokens
        request.fetched_tokens = max(0, tokens)
        self.worker.instance.fetched(queued, depth + fetched)

    async def fetch_from(self, holder: str, blocks: Sequence[Any], depth: int) -> int:
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
                await asyncio.sleep(max(0.0, held.ready_s - self.worker.loop.time()))
                tokens = held.count * self.worker.config.block_tokens
                await self.moves.fetch(tokens, number(holder))
                return held.count
        except (NoAnswerError, TimeoutError) as error:
            log.warning("fetch from %s: %s", holder, error or "too slow")
            self.failed_fetches += 1
            return 0
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
        instance, key = self.worker.instance, (identity, message.ask)
        count, ready_s = instance.hold(message.blocks)
        instance.lending += 1
        # The reader gives up at its deadline; twice that is never too early to let go.
        expiry = self.worker.loop.call_later(2 * self.deadline_s, self.let_go, key)
        self.lent[key] = Lent(identity, message.blocks[:count], message.depth, expiry)
        self.worker.office.post(identity, Held(message.ask, count, ready_s, []))

    def let_go(self, key: tuple[bytes, int]) -> None:
        lent = self.lent.pop(key, None)
        if lent is not None:
            lent.expiry.cancel()
            self.worker.instance.pool.unpin(lent.blocks, lent.depth)
            self.worker.instance.lending -= 1

    # ---- handing over ------------------------------------------------------------------------

    def hand_over(self, request: Request, prefill_s: float) -> Stream:
        self.streams[request.id] = stream = Stream()
        sending = self.sending(request, prefill_s, stream)
        stream.task = self.group.create_task(sending, name=f"stream-{request.id}")
        return stream

    async def sending(self, request: Request, prefill_s: float, stream: Stream) -> None:
        peers, decode = self.worker.peers, request.decode
        assert decode is not None
        is_there = False
        try:
            work = work_of(request)
            await peers.ask(decode, lambda ask: Prepare(ask, work), self.deadline_s)
            await self.moves.stream(request, prefill_s, stream.is_prefilled)
            is_there = True
            peers.tell(decode, Arrived(request.id, stamps_of(request)))
        except NoAnswerError as error:
            self.worker.tell(Ended(request.id, "failed", f"hand-over to {error}"))
        finally:
            if not is_there:
                peers.tell(decode, Abandoned(request.id))
            del self.streams[request.id]
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
        fetched = await self.fetch_from(message.holder, message.blocks, 0)
        pool = self.worker.instance.pool
        stored = pool.store_pinned(message.blocks[:fetched])
        pool.unpin(message.blocks[:stored])
        self.worker.tell(Copied(message.ask, stored))

    def counts(self) -> dict[str, float]:
        return {"failed_fetches": self.failed_fetches, "lent": len(self.lent)}

    def problem(self) -> str:
        return ""


class DecodeEnd:
    """Of a decode worker: what is on its way here."""

    def __init__(self, worker: Desk, on_arrived: Callable[[Request], None]) -> None:
        self.worker = worker
        self.on_arrived = on_arrived
        self.coming: dict[int, bytes] = {}  # Who sends the KV of a request.

    def asked(self, identity: bytes, message: Message) -> None:
        match message:
            case Prepare():
                self.prepare(identity, message)
            case Arrived():
                self.arrived(message)
            case Abandoned():
                self.coming.pop(message.id, None)
                self.worker.requests.pop(message.id, None)

    def prepare(self, identity: bytes, message: Prepare) -> None:
        request = request_of(message.work)
        self.worker.requests[request.id] = request
        self.coming[request.id] = identity
        self.worker.office.post(identity, Prepared(message.ask, []))

    def arrived(self, message: Arrived) -> None:
        self.coming.pop(message.id, None)
        request = self.worker.requests.get(message.id)
        if request is not None:
            stamp(request, message.stamps)
            self.on_arrived(request)

    def cancel(self, request: Request) -> None:
        """Its sender stops by itself and says so."""

    def gone(self, peer: Peer) -> None:
        identity = f"{peer.name}.{peer.pid}".encode()
        for id in [id for id, sender in self.coming.items() if sender == identity]:
            del self.coming[id]
            self.worker.requests.pop(id, None)

    def counts(self) -> dict[str, float]:
        return {"coming": len(self.coming)}

    def problem(self) -> str:
        return ""


def number(name: str | None) -> int:
    """The id in an instance's name, `decode-3`."""
    assert name is not None
    return int(name.rsplit("-", 1)[1])
