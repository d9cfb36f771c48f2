"""How do bytes move between processes of one host? One copy between mapped segments, or none."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from reference_cluster.transports.bytes import (
    Endpoint,
    Range,
    Segment,
    TransportError,
    check_batch,
)
from reference_cluster.transports.threads import run_stoppable

# To wake a thread and be woken takes about 0.1 ms, as long as the copy of this many bytes.
INLINE_BYTES = 1 << 20
# Nobody copies inline for longer than this many bytes without letting the event loop go on.
INLINE_BYTES_IN_A_ROW = 8 << 20
# A copy looks this often whether it was stopped: about a millisecond.
SLICE_BYTES = 4 << 20

Array = np.ndarray[Any, np.dtype[np.uint8]]


class ShmTransport:
    """Peers' segments are attached by name and copied from and to by this process alone."""

    name = "shm"

    def __init__(self, threads: int = 2) -> None:
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="shm")
        self.attached: dict[Endpoint, Segment] = {}
        self.inline_bytes = 0

    async def start(self, segment: Segment) -> Endpoint:
        self.size = segment.size
        self.own = array_of(segment)
        key = segment.incarnation.to_bytes(8)
        return Endpoint(self.name, "", segment.name, segment.size, key)

    async def read(
        self,
        peer: Endpoint,
        remote: Sequence[Range],
        local: Sequence[Range],
        deadline_s: float,
    ) -> None:
        total = check_batch(local, self.size, remote, peer)
        theirs = array_of(self.segment_of(peer))
        work = functools.partial(copy_ranges, theirs, remote, self.own, local)
        await self.copy(work, total, deadline_s, peer)

    async def write(
        self,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        total = check_batch(local, self.size, remote, peer)
        theirs = array_of(self.segment_of(peer))
        work = functools.partial(copy_ranges, self.own, local, theirs, remote)
        await self.copy(work, total, deadline_s, peer)

    def view(self, peer: Endpoint, remote: Range) -> memoryview:
        """The peer's bytes in place, read-only: for who can use them while the peer holds them."""
        segment = self.segment_of(peer)
        check_batch([Range(0, 0)], self.size, [Range(remote.offset + remote.length, 0)], peer)
        return segment.buffer[remote.offset : remote.offset + remote.length].toreadonly()

    def segment_of(self, peer: Endpoint) -> Segment:
        """The peer's segment, as long as its owner lives."""
        segment = self.attached.get(peer)
        if segment is None:
            segment = Segment.attach(peer.segment)
            if segment.incarnation.to_bytes(8) != peer.key or segment.size != peer.size:
                segment.close()
                raise TransportError(f"{peer.segment}: the key is another segment's")
            self.attached[peer] = segment
        if not segment.owner_is_alive():
            self.forget(peer)
            raise TransportError(f"{peer.segment}: its owner has gone", peer_is_gone=True)
        return segment

    async def copy(
        self,
        copy: Callable[[threading.Event], None],
        total: int,
        deadline_s: float,
        peer: Endpoint,
    ) -> None:
        stopped = threading.Event()
        if total > INLINE_BYTES:
            work = functools.partial(copy, stopped)
            await run_stoppable(self.executor, work, stopped.set, deadline_s, peer.segment)
            return
        copy(stopped)
        self.inline_bytes += total
        if self.inline_bytes > INLINE_BYTES_IN_A_ROW:
            self.inline_bytes = 0
            await asyncio.sleep(0)

    def forget(self, peer: Endpoint) -> None:
        """Copies under way end as they would: the memory stays as long as anyone looks at it."""
        segment = self.attached.pop(peer, None)
        if segment is not None:
            segment.close()

    async def close(self) -> None:
        for peer in list(self.attached):
            self.forget(peer)
        self.executor.shutdown(wait=False, cancel_futures=True)


def array_of(segment: Segment) -> Array:
    """numpy copies without the interpreter's lock, and keeps the mapping while it does."""
    return np.frombuffer(segment.buffer, np.uint8)


def copy_ranges(
    source: Array,
    origins: Sequence[Range],
    target: Array,
    places: Sequence[Range],
    stopped: threading.Event,
) -> None:
    for origin, place in zip(origins, places, strict=True):
        for done in range(0, origin.length, SLICE_BYTES):
            if stopped.is_set():
                raise TransportError("the copy was stopped")
            end = min(done + SLICE_BYTES, origin.length)
            begin, at = origin.offset, place.offset
            target[at + done : at + end] = source[begin + done : begin + end]
