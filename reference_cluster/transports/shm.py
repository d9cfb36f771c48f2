"""How do bytes move between processes of one host? One copy between mapped segments, or none."""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Sequence
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

# Half a millisecond of copying; to wake a thread and be woken by it takes 0.1 ms of that.
INLINE_BYTES = 4 << 20
# Nobody copies inline for longer than this many bytes without letting the event loop go on.
INLINE_BYTES_IN_A_ROW = 8 << 20
# Between copies of this many bytes, some 30 ms each, a thread looks whether it was stopped. Smaller
# ones are slower: the C library copies past the caches only what is larger than most of them.
SLICE_BYTES = 256 << 20

Array = np.ndarray[Any, np.dtype[np.uint8]]


class ShmTransport:
    """Peers' segments are attached by name and copied from and to by this process alone."""

    name = "shm"

    def __init__(self, threads: int = 2) -> None:
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="shm")
        self.attached: dict[Endpoint, Attached] = {}
        self.inline_bytes = 0

    async def start(self, segment: Segment) -> Endpoint:
        self.size = segment.size
        self.own = array_of(segment)
        key = segment.incarnation.to_bytes(8)
        return Endpoint(self.name, f"process {os.getpid()}", segment.name, segment.size, key)

    async def read(
        self,
        peer: Endpoint,
        remote: Sequence[Range],
        local: Sequence[Range],
        deadline_s: float,
    ) -> None:
        total = check_batch(local, self.size, remote, peer)
        theirs = self.attach(peer).array
        if total <= INLINE_BYTES:
            copy(theirs, remote, self.own, local)
            await self.let_others_go_on(total)
        else:
            await self.copy_in_thread(theirs, remote, self.own, local, deadline_s, peer)

    async def write(
        self,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        total = check_batch(local, self.size, remote, peer)
        theirs = self.attach(peer).array
        if total <= INLINE_BYTES:
            copy(self.own, local, theirs, remote)
            await self.let_others_go_on(total)
        else:
            await self.copy_in_thread(self.own, local, theirs, remote, deadline_s, peer)

    def view(self, peer: Endpoint, remote: Range) -> memoryview:
        """The peer's bytes in place, read-only: for who can use them while the peer holds them."""
        check_batch([Range(0, remote.length)], remote.length, [remote], peer)
        buffer = self.attach(peer).segment.buffer
        return buffer[remote.offset : remote.offset + remote.length].toreadonly()

    def attach(self, peer: Endpoint) -> Attached:
        """The peer's segment, as long as its owner lives."""
        attached = self.attached.get(peer)
        if attached is None:
            attached = self.attached[peer] = Attached(peer)
        if attached.owner_has_gone():
            self.forget(peer)
            raise TransportError(f"{peer.segment}: its owner has gone", peer_is_gone=True)
        return attached

    async def let_others_go_on(self, total: int) -> None:
        self.inline_bytes += total
        if self.inline_bytes > INLINE_BYTES_IN_A_ROW:
            self.inline_bytes = 0
            await asyncio.sleep(0)

    async def copy_in_thread(
        self,
        source: Array,
        origins: Sequence[Range],
        target: Array,
        places: Sequence[Range],
        deadline_s: float,
        peer: Endpoint,
    ) -> None:
        stopped = threading.Event()

        def work() -> None:
            for origin, place in zip(origins, places, strict=True):
                for done in range(0, origin.length, SLICE_BYTES):
                    if stopped.is_set():
                        raise TransportError("the copy was stopped")
                    length = min(SLICE_BYTES, origin.length - done)
                    part = [Range(origin.offset + done, length)]
                    copy(source, part, target, [Range(place.offset + done, length)])

        await run_stoppable(self.executor, work, stopped.set, deadline_s, peer.segment)

    def forget(self, peer: Endpoint) -> None:
        """Copies under way end as they would: the memory stays as long as anyone looks at it."""
        attached = self.attached.pop(peer, None)
        if attached is not None:
            attached.close()

    async def close(self) -> None:
        for peer in list(self.attached):
            self.forget(peer)
        self.executor.shutdown(wait=False, cancel_futures=True)


class Attached:
    """A peer's memory, and a handle that tells at little cost when the peer's process ends."""

    def __init__(self, peer: Endpoint) -> None:
        try:
            self.process = os.pidfd_open(int(peer.address.removeprefix("process ")))
        except (OSError, ValueError):
            raise TransportError(f"{peer.segment}: no {peer.address}", peer_is_gone=True) from None
        try:
            self.segment = Segment.attach(peer.segment)
        except TransportError:
            os.close(self.process)
            raise
        self.array = array_of(self.segment)
        self.poll = select.poll()
        self.poll.register(self.process, select.POLLIN)
        if self.segment.incarnation.to_bytes(8) != peer.key or self.segment.size != peer.size:
            self.close()
            raise TransportError(f"{peer.segment}: the key is another segment's")
        if not self.segment.owner_is_alive():  # The number may by now be another process's.
            self.close()
            raise TransportError(f"{peer.segment}: its owner has gone", peer_is_gone=True)

    def owner_has_gone(self) -> bool:
        return bool(self.poll.poll(0))

    def close(self) -> None:
        os.close(self.process)
        self.segment.close()


def array_of(segment: Segment) -> Array:
    """numpy copies without the interpreter's lock, and keeps the mapping while it does."""
    return np.frombuffer(segment.buffer, np.uint8)


def copy(source: Array, origins: Sequence[Range], target: Array, places: Sequence[Range]) -> None:
    for origin, place in zip(origins, places, strict=True):
        begin, at, length = origin.offset, place.offset, origin.length
        target[at : at + length] = source[begin : begin + length]
