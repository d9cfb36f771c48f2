"""What carries KV from one worker to another: modelled time alone, or real bytes layer by layer?

Both follow the same protocol between the workers (`moves.py`); they differ in what happens between
its messages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reference_cluster.config import ClusterConfig
from reference_cluster.kvpool.memory import PoolBytes
from reference_cluster.kvpool.ssd_file import FileTier
from reference_cluster.messages import Held, Prepared
from reference_cluster.messenger import Messenger
from reference_cluster.parts import Parts
from reference_cluster.policies.batching import Chunk
from reference_cluster.request import Block, Request
from reference_cluster.transports.bytes import Endpoint, Range
from reference_cluster.transports.modelled import ModelledTransport
from reference_cluster.worker_memory import Sums, WorkerMemory

COUNTED = (
    "sent_bytes",
    "stream_busy_s",  # Spent on writing to decode workers.
    "stream_tail_s",  # From the ends of prefills until all was there: what was not hidden.
    "fetched_bytes",
    "fetch_s",
    "verified_blocks",
    "mismatched_blocks",
)
BATCH_BYTES_MAX = 8 << 20  # Of one write or read: others get their turn, and a cancel acts.


class Stream:
    """One hand-over under way, as the prefill instance sees it."""

    def __init__(self) -> None:
        self.is_prefilled = asyncio.Event()
        self.changed = asyncio.Event()
        self.prefilled_s = 0.0
        self.task: asyncio.Task[None]

    def prefilled(self) -> None:
        self.prefilled_s = asyncio.get_running_loop().time()
        self.is_prefilled.set()
        self.changed.set()

    def cancel(self) -> None:
        self.task.cancel()


Brought = dict[Block, int]  # Blocks and the slots their bytes are in; none where nothing has bytes.


class Carrier(Protocol):
    """What a prefill worker moves KV with."""

    has_bytes: bool
    sources: dict[int, Brought]  # For `keep`: where the bytes of a request's blocks are.
    counts: dict[str, float]

    def begin(self, request: Request, pinned: int, stream: Stream | None) -> bool:
        """A prefill begins, `pinned` blocks of it are here. False: there is no memory for it."""

    def end(self, request: Request) -> None:
        """A prefill has ended, and what the pool takes of it is in the pool."""

    async def stream(
        self, request: Request, peer: Endpoint | None, prefill_s: float, room: Prepared
    ) -> None:
        """Send the KV while it is computed; returns when the prefill has ended and all is there."""

    async def fetch(
        self, holder: int, peer: Endpoint | None, blocks: Sequence[Block], held: Held
    ) -> tuple[int, Brought]:
        """How many leading blocks came, and where they are until `keep` and `drop`."""

    def keep(self, request: Request, blocks: Sequence[Block]) -> int:
        """The pool takes them in: `PrefillInstance.take_in`."""

    def put(self, blocks: Sequence[Block], brought: Brought) -> int:
        """The pool takes them in, pinned; how many leading ones found room."""

    def drop(self, brought: Brought) -> None:
        """Nobody needs these slots any more, but who else has them."""

    def released(self, request: Request) -> None:
        """Its stream has ended, one way or the other."""

    def check_integrity(self, is_idle: bool) -> None: ...

    def lend(self, blocks: Sequence[Block]) -> tuple[list[int], list[Range]]:
        """Slots and ranges of blocks that a peer will read; `returned` gives the slots back."""

    async def lent_sums(self, slots: Sequence[int]) -> Sums:
        """By which the peer can verify what it has read."""

    async def sent_sums(self, request: Request) -> Sums:
        """By which the decode worker can verify what has been streamed."""

    def returned(self, slots: Sequence[int]) -> None: ...


class ModelledCarrier:
    """Moves no bytes, but takes as long as the links of this worker's node would.

    A link is shared by what this worker sends and fetches; what others send to the same peer is
    not seen here.
    """

    has_bytes = False

    def __init__(self, id: int, parts: Parts, instance: Any) -> None:
        config = parts.config
        self.id, self.groups = id, config.prefill_groups
        self.block_tokens = config.block_tokens
        self.instance = instance
        link = config.network.link_bytes_per_s or parts.profile.link_bytes_per_s
        transport = ModelledTransport(self.groups + config.decode_instances, link)
        for node in range(self.groups):
            transport.widen(node, config.prefill.nodes_per_group)
        self.messenger = Messenger(transport, parts.cost, config.prefill.layerwise)
        self.streams: dict[int, Stream] = {}
        self.sources: dict[int, Brought] = {}
        self.counts: dict[str, float] = {}

    def begin(self, request: Request, pinned: int, stream: Stream | None) -> bool:
        if stream is not None:
            self.streams[request.id] = stream
        return True

    def end(self, request: Request) -> None:
        self.sources.pop(request.id, None)

    async def stream(
        self, request: Request, peer: Endpoint | None, prefill_s: float, room: Prepared
    ) -> None:
        arrived = asyncio.Event()
        stream = self.streams[request.id]
        node = self.groups + int((request.decode or "").rsplit("-", 1)[1])
        handover = self.messenger.hand_over(request, self.id, node, prefill_s, arrived.set)
        try:
            await stream.is_prefilled.wait()
            handover.prefilled()
            await arrived.wait()
        except asyncio.CancelledError:
            handover.cancel()
            raise

    async def fetch(
        self, holder: int, peer: Endpoint | None, blocks: Sequence[Block], held: Held
    ) -> tuple[int, Brought]:
        done = asyncio.get_running_loop().create_future()
        tokens = held.count * self.block_tokens
        flow = self.messenger.fetch(tokens, holder, self.id, lambda: done.set_result(None))
        try:
            await done
        except asyncio.CancelledError:
            flow.cancel()
            raise
        return held.count, {}

    def keep(self, request: Request, blocks: Sequence[Block]) -> int:
        stored: int = self.instance.take_in(request, blocks)
        return stored

    def put(self, blocks: Sequence[Block], brought: Brought) -> int:
        stored: int = self.instance.pool.store_pinned(blocks)
        return stored

    def drop(self, brought: Brought) -> None:
        """Nothing was brought."""

    def released(self, request: Request) -> None:
        self.streams.pop(request.id, None)

    def check_integrity(self, is_idle: bool) -> None:
        """There is nothing that could be wrong."""

    def lend(self, blocks: Sequence[Block]) -> tuple[list[int], list[Range]]:
        return [], []

    async def lent_sums(self, slots: Sequence[int]) -> Sums:
        return []

    async def sent_sums(self, request: Request) -> Sums:
        return []

    def returned(self, slots: Sequence[int]) -> None:
        """Nothing was lent."""


@dataclass(slots=True)
class Chain:
    """A prompt's blocks while it is computed and sent: their slots, and how much of each exists."""

    slots: list[int]
    layers: list[int]  # So many leading layers of each block exist.
    stream: Stream | None


class BytesCarrier:
    """Writes, lends, fetches and sends the real bytes of blocks."""

    has_bytes = True

    def __init__(self, config: ClusterConfig, memory: WorkerMemory, instance: Any) -> None:
        self.config = config
        self.memory = memory
        self.instance = instance
        self.pool_bytes = PoolBytes(memory.slots, instance.pool)
        if isinstance(instance.ssd, FileTier):
            instance.ssd.kept = self.pool_bytes
            instance.ssd.recover()
        self.deadline_s = config.failure.transfer_deadline_s
        self.chains: dict[int, Chain] = {}
        self.sources: dict[int, Brought] = {}
        self.computing: Chain | None = None
        self.counts: dict[str, float] = dict.fromkeys(COUNTED, 0)
        instance.engine.attach(memory.segment)
        instance.engine.on_layer = self.write
        self.is_modelled = config.engine.kind == "modelled"

    # ---- computing ---------------------------------------------------------------------------

    def begin(self, request: Request, pinned: int, stream: Stream | None) -> bool:
        slots, layers = self.memory.slots, self.memory.slots.layers
        have = self.pool_bytes.get(request.blocks[:pinned])
        taken = self.take(len(request.blocks) - len(have))
        if taken is None:
            slots.give_back(have)
            return False
        depths = [layers] * len(have) + [0] * len(taken)
        self.computing = Chain(have + taken, depths, stream)
        self.instance.engine.begin(request, self.computing.slots, len(have))
        self.sources[request.id] = dict(zip(request.blocks, have + taken, strict=True))
        if stream is not None:
            slots.hold(self.computing.slots)
            self.chains[request.id] = self.computing
        return True

    def take(self, count: int) -> list[int] | None:
        """Slots for new bytes, of blocks that nobody needs if there are no others."""
        slots, pool = self.memory.slots, self.instance.pool
        while slots.free < count and len(pool.idle):
            pool.make_room(pool.free + count - slots.free)
        return slots.take(count)

    def write(self, chunk: Chunk, layer: int) -> None:
        """The engine has computed a layer of a chunk: of the blocks that end in it."""
        if self.computing is None:
            return
        tokens = self.config.block_tokens
        past = chunk.end // tokens
        if chunk.end == chunk.request.input_tokens:
            past = len(chunk.request.blocks)
        for place in range(chunk.start // tokens, past):
            self.write_one(chunk.request, place, layer)
        if self.computing.stream is not None:
            self.computing.stream.changed.set()

    def write_one(self, request: Request, place: int, layer: int) -> None:
        chain, key = self.computing, request.blocks[place]
        assert chain is not None
        assert isinstance(key, int)
        if chain.layers[place] == layer:
            view = self.memory.slots.view(chain.slots[place], layer)
            if self.is_modelled:  # A real engine has written them itself.
                self.memory.pattern.write(key, layer, view)
            chain.layers[place] = layer + 1

    def end(self, request: Request) -> None:
        self.computing = None
        brought = self.sources.pop(request.id, None)
        if brought is None:
            return
        if not request.is_cancelled:
            # The pool has counted on bytes that were damaged on SSD; here they are anew.
            mended = [block for block in brought if block in self.pool_bytes.unfilled]
            kept = self.put(mended, brought)
            self.instance.pool.unpin(mended[:kept])
        self.drop(brought)

    def keep(self, request: Request, blocks: Sequence[Block]) -> int:
        return self.put(blocks, self.sources.get(request.id, {}))

    def put(self, blocks: Sequence[Block], brought: Brought) -> int:
        slots = [brought[block] for block in blocks if block in brought]
        if len(slots) == len(blocks):
            return self.pool_bytes.put(blocks, slots)
        stored: int = self.instance.pool.store_pinned(blocks)
        return stored

    def drop(self, brought: Brought) -> None:
        self.memory.slots.give_back(list(brought.values()))

    # ---- sending -----------------------------------------------------------------------------

    async def stream(
        self, request: Request, peer: Endpoint | None, prefill_s: float, room: Prepared
    ) -> None:
        assert peer is not None
        chain = self.chains[request.id]
        stream = chain.stream
        assert stream is not None
        sent = [0] * len(chain.slots)
        busy_s = 0.0
        while True:
            stream.changed.clear()
            is_last = stream.is_prefilled.is_set()
            if is_last or self.config.prefill.layerwise:
                for local, remote in self.batches(chain, sent, room.ranges):
                    if request.timeline.transfer_start_s is None:
                        request.timeline.transfer_start_s = asyncio.get_running_loop().time()
                    busy_s += await self.write_to(peer, local, remote)
            if is_last:
                break
            await stream.changed.wait()
        self.counts["stream_busy_s"] += busy_s
        self.counts["stream_tail_s"] += asyncio.get_running_loop().time() - stream.prefilled_s

    def released(self, request: Request) -> None:
        """The stream has ended, one way or the other."""
        chain = self.chains.pop(request.id, None)
        if chain is not None:
            self.memory.slots.give_back(chain.slots)

    def batches(
        self, chain: Chain, sent: list[int], room: Sequence[Range]
    ) -> Iterator[tuple[list[Range], list[Range]]]:
        """What exists and was not sent, as ranges here and there, in batches of decent size."""
        layer_bytes, block_bytes = self.memory.slots.layer_bytes, self.memory.slots.block_bytes
        local: list[Range] = []
        remote: list[Range] = []
        size = 0
        for place, slot in enumerate(chain.slots):
            first, past = sent[place], chain.layers[place]
            if past == first:
                continue
            sent[place] = past
            offset, length = first * layer_bytes, (past - first) * layer_bytes
            local.append(Range(slot * block_bytes + offset, length))
            remote.append(Range(room[place].offset + offset, length))
            size += length
            if size >= BATCH_BYTES_MAX:
                yield local, remote
                local, remote, size = [], [], 0
        if local:
            yield local, remote

    async def write_to(self, peer: Endpoint, local: list[Range], remote: list[Range]) -> float:
        size = sum(one.length for one in local)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await self.memory.transport.write(peer, local, remote, self.deadline_s)
        self.counts["sent_bytes"] += size
        return loop.time() - begun_s

    # ---- fetching and lending ----------------------------------------------------------------

    async def fetch(
        self, holder: int, peer: Endpoint | None, blocks: Sequence[Block], held: Held
    ) -> tuple[int, Brought]:
        assert peer is not None
        count = len(held.ranges)
        slots = self.take(count)
        if not slots:
            return 0, {}
        is_here = False
        try:
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            per_batch = max(1, BATCH_BYTES_MAX // self.memory.slots.block_bytes)
            for first in range(0, count, per_batch):
                some = slots[first : first + per_batch]
                local = [self.memory.slots.range_of(slot) for slot in some]
                remote = held.ranges[first : first + per_batch]
                await self.memory.transport.read(peer, remote, local, self.deadline_s)
            self.counts["fetch_s"] += loop.time() - begun_s
            self.counts["fetched_bytes"] += count * self.memory.slots.block_bytes
            good = await self.verified(blocks[:count], slots, held.sums)
            is_here = True
        finally:
            if not is_here:
                self.memory.slots.give_back(slots)
        self.memory.slots.give_back(slots[good:])
        return good, dict(zip(blocks[:good], slots[:good], strict=True))

    async def verified(self, blocks: Sequence[Block], slots: Sequence[int], sums: Sums) -> int:
        """How many leading blocks are taken for right."""
        damaged = await self.memory.damaged(blocks, slots, sums)
        self.counts["verified_blocks"] = self.memory.verified_blocks
        self.counts["mismatched_blocks"] = self.memory.mismatched_blocks
        return len(blocks) if damaged is None else damaged

    def lend(self, blocks: Sequence[Block]) -> tuple[list[int], list[Range]]:
        slots = self.pool_bytes.get(blocks)
        return slots, [self.memory.slots.range_of(slot) for slot in slots]

    async def lent_sums(self, slots: Sequence[int]) -> Sums:
        return await self.memory.sums(slots)

    async def sent_sums(self, request: Request) -> Sums:
        return await self.memory.sums(self.chains[request.id].slots)

    def returned(self, slots: Sequence[int]) -> None:
        self.memory.slots.give_back(slots)

    def check_integrity(self, is_idle: bool) -> None:
        """Raise AssertionError where slots are lost: idle, the pool is the only user of any."""
        self.pool_bytes.check_integrity()
        used, pooled = self.memory.slots.used, len(self.pool_bytes.slots)
        assert not is_idle or used == pooled, f"{used} slots are in use, {pooled} by the pool"


class Room:
    """A decode worker's memory for KV that is on its way: given out in order of asking."""

    def __init__(self, memory: WorkerMemory) -> None:
        self.memory = memory
        self.waiting: deque[tuple[int, int, Any]] = deque()  # Request, blocks, who is told.
        self.slots: dict[int, list[int]] = {}

    def ask(self, id: int, blocks: int, told: Any) -> None:
        """`told` gets the ranges when there is room."""
        self.waiting.append((id, blocks, told))
        self.serve()

    def serve(self) -> None:
        while self.waiting:
            id, blocks, told = self.waiting[0]
            slots = self.memory.slots.take(blocks)
            if slots is None:
                return
            self.waiting.popleft()
            self.slots[id] = slots
            told([self.memory.slots.range_of(slot) for slot in slots])

    def leave(self, id: int) -> None:
        """This request needs its room no more."""
        self.waiting = deque(one for one in self.waiting if one[0] != id)
        slots = self.slots.pop(id, None)
        if slots is not None:
            self.memory.slots.give_back(slots)
        self.serve()
