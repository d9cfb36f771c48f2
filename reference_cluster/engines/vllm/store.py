"""Where does a worker of vLLM keep blocks of KV, for itself and for others, and what is in a slot?

A slot begins with a header that names its block, and ends with the block's bytes. Whoever reads a
slot checks both, so that nobody has to promise a reader that a block will stay: one that has made
room for another meanwhile, or was half written, is seen to be gone and is computed anew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal
from zlib import crc32

import msgspec

from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.request import Block
from reference_cluster.transports.bytes import Endpoint, Range

HEADER = struct.Struct("<8sQI")  # Namespace, key, CRC-32 of the payload.
HEADER_BYTES = 64  # The payload begins at a cache line.


Change = Callable[[Literal["stored", "removed"], Mapping[Block, int]], None]


def ignore(change: str, slots: Mapping[Block, int]) -> None:
    """Nobody follows what is stored."""


class Offer(msgspec.Struct, frozen=True):
    """Where a prompt's leading blocks lie, in order. It travels in `kv_transfer_params["pool"]`."""

    endpoint: Endpoint
    slots: list[int]


class Index:
    """Which block lies in which slot; the longest unused make room. The scheduler's half."""

    def __init__(self, slots: int) -> None:
        self.pool = BlockPool(slots, self.stored, self.evicted)
        self.slots: dict[Block, int] = {}
        self.free = list(range(slots - 1, -1, -1))
        self.filling: dict[Block, None] = {}  # Their bytes are still on their way.
        self.on_change: Change = ignore

    def room(self) -> int:
        """How many blocks could be taken in now."""
        return self.pool.free + len(self.pool.idle)

    def hold(self, blocks: Sequence[Block]) -> list[int]:
        """Slots of as many leading blocks as fit, new ones made where needed; until `release`."""
        held = self.pool.store_pinned(blocks)
        return [self.slots[block] for block in blocks[:held]]

    def release(self, blocks: Sequence[Block]) -> None:
        self.pool.unpin(blocks)

    def drop(self, block: Block) -> None:
        """Its bytes turned out to be gone."""
        if block in self.pool.idle:
            self.pool.discard(block)
            self.evicted((block,))

    def stored(self, blocks: Sequence[Block]) -> None:
        taken = {block: self.free.pop() for block in blocks}
        self.slots |= taken
        self.on_change("stored", taken)

    def evicted(self, blocks: Sequence[Block]) -> None:
        left = {block: self.slots.pop(block) for block in blocks}
        self.free.extend(left.values())
        self.on_change("removed", left)

    def check_integrity(self) -> None:
        """Raise AssertionError where pool and slots tell different things."""
        self.pool.check_integrity()
        assert len(self.slots) == self.pool.used, f"{len(self.slots)} slots, {self.pool!r}"
        assert len(self.slots) + len(self.free) == self.pool.capacity


class Slots:
    """The bytes of the slots: the worker's half. `namespace` (8 bytes) tells models apart."""

    def __init__(self, buffer: memoryview, namespace: bytes, payload_bytes: int) -> None:
        assert len(namespace) == 8
        self.buffer = buffer
        self.namespace = namespace
        self.payload_bytes = payload_bytes
        self.slot_bytes = HEADER_BYTES + payload_bytes
        self.total = len(buffer) // self.slot_bytes

    def range_of(self, slot: int) -> Range:
        """Header and payload, as transports name them."""
        return Range(slot * self.slot_bytes, self.slot_bytes)

    def payload(self, slot: int) -> memoryview:
        start = slot * self.slot_bytes + HEADER_BYTES
        return self.buffer[start : start + self.payload_bytes]

    def put(self, slot: int, key: int, parts: Iterable[memoryview]) -> None:
        """Write the parts, one after the other; what a reader sees meanwhile is nobody's block."""
        start = slot * self.slot_bytes
        self.buffer[start : start + HEADER.size] = bytes(HEADER.size)
        payload, at = self.payload(slot), 0
        for part in parts:
            payload[at : at + len(part)] = part
            at += len(part)
        assert at == self.payload_bytes, f"{at} of {self.payload_bytes} bytes"
        HEADER.pack_into(self.buffer, start, self.namespace, key, crc32(payload))

    def get(self, slot: int, key: int) -> memoryview | None:
        """The block's bytes; None where they are another's, or not whole."""
        payload = self.payload(slot)
        found = HEADER.unpack_from(self.buffer, slot * self.slot_bytes)
        return payload if found == (self.namespace, key, crc32(payload)) else None
