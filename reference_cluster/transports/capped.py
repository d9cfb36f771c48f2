"""What would a slower network do? Any byte transport, held to a rate that its transfers share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from reference_cluster.transports.bytes import (
    ByteTransport,
    Endpoint,
    Range,
    Segment,
    TransportError,
    check_batch,
    cut,
)

# The turn of one transfer before the next has its own: 0.3 ms at 24 Gbit/s.
SLICE_BYTES = 1 << 20
SLICE_RANGES = 1024
# A transfer that was late (a timer of 1 ms, a busy loop) may make up for so much and no more.
LATE_S = 0.01

Move = Callable[[list[Range], list[Range], float], Awaitable[None]]


class Link:
    """One direction of this process's network card, taken in turns."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.free_at_s = 0.0

    def book(self, from_s: float, size_bytes: int) -> float:
        """When these bytes have passed, if they could begin at `from_s`."""
        self.free_at_s = max(self.free_at_s, from_s) + size_bytes / self.bytes_per_s
        return self.free_at_s


class CappedTransport:
    """Reads share this process's receiving link, writes its sending link, slice by slice in turn.

    The peer's own links are not seen: two processes that read from one peer each have their cap.
    """

    def __init__(
        self, inner: ByteTransport, bytes_per_s: float, slice_bytes: int = SLICE_BYTES
    ) -> None:
        assert bytes_per_s > 0
        self.inner = inner
        self.name = inner.name
        self.slice_bytes = slice_bytes
        self.sending = Link(bytes_per_s)
        self.receiving = Link(bytes_per_s)

    async def start(self, segment: Segment) -> Endpoint:
        self.size = segment.size
        return await self.inner.start(segment)

    async def read(
        self,
        peer: Endpoint,
        remote: Sequence[Range],
        local: Sequence[Range],
        deadline_s: float,
    ) -> None:
        async def move(ours: list[Range], theirs: list[Range], left_s: float) -> None:
            await self.inner.read(peer, theirs, ours, left_s)

        await self.pace(self.receiving, move, peer, local, remote, deadline_s)

    async def write(
        self,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        async def move(ours: list[Range], theirs: list[Range], left_s: float) -> None:
            await self.inner.write(peer, ours, theirs, left_s)

        await self.pace(self.sending, move, peer, local, remote, deadline_s)

    async def pace(
        self,
        link: Link,
        move: Move,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        check_batch(local, self.size, remote, peer)
        loop = asyncio.get_running_loop()
        passed_s = loop.time()
        end_s = passed_s + deadline_s
        for ours, theirs in cut(local, remote, self.slice_bytes, SLICE_RANGES):
            from_s = max(passed_s, loop.time() - LATE_S)
            passed_s = link.book(from_s, sum(one.length for one in ours))
            await move(ours, theirs, end_s - loop.time())
            wait_s = min(passed_s, end_s) - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if passed_s > end_s:
                raise TransportError(f"{peer.segment}: not done within {deadline_s:g} s")

    def forget(self, peer: Endpoint) -> None:
        self.inner.forget(peer)

    async def close(self) -> None:
        await self.inner.close()
