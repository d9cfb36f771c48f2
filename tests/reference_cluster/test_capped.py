"""Is a rate kept, and shared fairly? In virtual time, 1 MB/s, turns of 0.1 MB."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence

import pytest

from reference_cluster.transports.bytes import Endpoint, Range, Segment, TransportError
from reference_cluster.transports.capped import CappedTransport
from reference_cluster.virtual_time import run_virtual

MB = 1_000_000
SIZE = 100 * MB
PEER = Endpoint("none", "", "mcb-peer", SIZE)


class TakesTime:
    """A transport of another speed, with nothing to move."""

    name = "none"

    def __init__(self, seconds_per_byte: float = 0.0) -> None:
        self.seconds_per_byte = seconds_per_byte
        self.moved: list[tuple[Range, Range]] = []

    async def start(self, segment: Segment) -> Endpoint:
        return PEER

    async def read(
        self, peer: Endpoint, remote: Sequence[Range], local: Sequence[Range], deadline_s: float
    ) -> None:
        await asyncio.sleep(sum(one.length for one in local) * self.seconds_per_byte)
        self.moved += zip(local, remote, strict=True)

    async def write(
        self, peer: Endpoint, local: Sequence[Range], remote: Sequence[Range], deadline_s: float
    ) -> None:
        await self.read(peer, remote, local, deadline_s)

    def forget(self, peer: Endpoint) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def segment() -> Iterator[Segment]:
    one = Segment.create(SIZE // 100, "mcb-capped-")
    one.size = SIZE  # Nobody touches its bytes here.
    yield one
    one.close()


def read(transport: CappedTransport, megabytes: float, deadline_s: float = 1e3) -> Coroutine:
    whole = [Range(0, int(megabytes * MB))]
    return transport.read(PEER, whole, whole, deadline_s)


def write(transport: CappedTransport, megabytes: float) -> Coroutine:
    whole = [Range(0, int(megabytes * MB))]
    return transport.write(PEER, whole, whole, 1e3)


async def ends(transport: CappedTransport, *moves: Coroutine) -> list[float]:
    """When each of the moves ends that begin together."""
    loop = asyncio.get_running_loop()

    async def end(move: Coroutine) -> float:
        await move
        return loop.time()

    return list(await asyncio.gather(*(end(move) for move in moves)))


async def capped(segment: Segment, inner: TakesTime) -> CappedTransport:
    transport = CappedTransport(inner, MB, slice_bytes=MB // 10)
    await transport.start(segment)
    return transport


def test_a_transfer_takes_its_bytes_over_the_rate(segment: Segment) -> None:
    """10 MB at 1 MB/s: 10 s, and every byte once, in order."""
    inner = TakesTime()

    async def main() -> list[float]:
        transport = await capped(segment, inner)
        return await ends(transport, read(transport, 10))

    assert run_virtual(main()) == pytest.approx([10.0])
    assert inner.moved == [(Range(i * MB // 10, MB // 10),) * 2 for i in range(100)]


def test_two_alike_share_alike(segment: Segment) -> None:
    """Two of 10 MB together: the link is busy 20 s, and they end a turn (0.1 s) apart."""

    async def main() -> list[float]:
        transport = await capped(segment, TakesTime())
        return await ends(transport, read(transport, 10), read(transport, 10))

    assert run_virtual(main()) == pytest.approx([19.9, 20.0])


def test_a_small_one_does_not_wait_for_a_large_one(segment: Segment) -> None:
    """1 MB beside 10 MB takes 2 s, half the rate; the large one loses just that."""

    async def main() -> list[float]:
        transport = await capped(segment, TakesTime())
        return await ends(transport, read(transport, 10), read(transport, 1))

    assert run_virtual(main()) == pytest.approx([11.0, 2.0])


def test_reads_and_writes_have_a_link_each(segment: Segment) -> None:
    """A card sends and receives at once."""

    async def main() -> list[float]:
        transport = await capped(segment, TakesTime())
        return await ends(transport, read(transport, 5), write(transport, 5))

    assert run_virtual(main()) == pytest.approx([5.0, 5.0])


def test_a_slower_transport_is_not_slowed_further(segment: Segment) -> None:
    """At 2 s a MB below a cap of 1 MB/s, 5 MB take 10 s."""

    async def main() -> list[float]:
        transport = await capped(segment, TakesTime(2 / MB))
        return await ends(transport, read(transport, 5))

    assert run_virtual(main()) == pytest.approx([10.0])


def test_the_deadline_holds_for_the_waiting_too(segment: Segment) -> None:
    """10 MB at 1 MB/s within 5 s: an error at 5 s, and the link is free for the next."""

    async def main() -> list[float]:
        transport = await capped(segment, TakesTime())
        loop = asyncio.get_running_loop()
        with pytest.raises(TransportError, match=r"not done within 5\.05 s"):
            await read(transport, 10, deadline_s=5.05)
        failed_s = loop.time()
        return [failed_s, *await ends(transport, read(transport, 1))]

    failed_s, next_s = run_virtual(main())
    assert failed_s == pytest.approx(5.05)
    assert next_s == pytest.approx(6.1)  # The turn that was under way ends at 5.1 s.


def test_who_is_cancelled_leaves_the_link_to_the_others(segment: Segment) -> None:
    """Two of 4 MB share 2 s, 1 MB each; then one goes, and the other's 3 MB take 3 s."""

    async def main() -> float:
        transport = await capped(segment, TakesTime())
        loop = asyncio.get_running_loop()
        one = asyncio.create_task(read(transport, 4))
        other = asyncio.create_task(read(transport, 4))
        await asyncio.sleep(2.0)
        one.cancel()
        await other
        return loop.time()

    assert run_virtual(main()) == pytest.approx(5.0, abs=0.11)


def test_bad_ranges_move_nothing(segment: Segment) -> None:
    """The whole batch is looked at before its first slice."""
    inner = TakesTime()

    async def main() -> None:
        transport = await capped(segment, inner)
        here, there = [Range(0, MB), Range(0, 8)], [Range(0, MB), Range(SIZE, 8)]
        with pytest.raises(TransportError, match="outside"):
            await transport.read(PEER, there, here, 1e3)

    run_virtual(main())
    assert inner.moved == []
