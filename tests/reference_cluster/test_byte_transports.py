"""Does every byte transport keep the same promises? Each test runs on each of them, two processes.

The peer's segment is mapped here too, so what a transport did is seen in the memory itself.
"""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from reference_cluster.transports.bytes import Endpoint, Range, TransportError, cut
from tests.reference_cluster.byte_peer import (
    MAKERS,
    SIZE,
    Own,
    Peer,
    between_two,
    crc,
    fill,
    other_process,
    own_side,
    why_not,
)

KIB, MIB = 1 << 10, 1 << 20
WHOLE = [Range(0, SIZE)]
NO_KEYS = ("mooncake",)  # Its engine serves whoever knows an address.
DONE_WHEN_SENT = ("mooncake",)  # Now and then its engine takes a small write for done too early.
WRITES_LATE = ("mooncake",)  # Its engine goes on with a read that it gave up.
NO_HELP_NEEDED = ("shm", "rdma")  # A stopped owner's memory is there for who is connected.
NO_CONNECTION = ("shm",)


MARKS = {"rdma": pytest.mark.rdma}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, ())) for name in MAKERS])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = why_not(name)
    if reason is not None:
        pytest.skip(reason)
    return name


async def is_usable(own: Own, peer: Peer) -> bool:
    """Do both directions move the right bytes?"""
    fill(peer.memory, 7)
    await own.transport.read(peer.endpoint, [Range(4096, 4096)], [Range(8192, 4096)], 5.0)
    is_read = own.memory.buffer[8192:12288] == peer.memory.buffer[4096:8192]
    fill(own.memory, 9)
    await own.transport.write(peer.endpoint, [Range(4096, 4096)], [Range(12288, 4096)], 5.0)
    return is_read and own.memory.buffer[4096:8192] == peer.memory.buffer[12288:16384]


def test_a_write_arrives_and_touches_nothing_else(kind: str) -> None:
    """When write returns, the peer has the bytes, and its other bytes are as before."""

    async def script(own: Own, peer: Peer) -> None:
        fill(own.memory, 1)
        expected = bytearray(peer.memory.buffer)
        expected[1_000_001 : 1_000_001 + 300_007] = own.memory.buffer[13 : 13 + 300_007]
        here, there = [Range(13, 300_007)], [Range(1_000_001, 300_007)]
        await own.transport.write(peer.endpoint, here, there, 5.0)
        assert peer.memory.buffer == expected

    between_two(kind, script)


def test_a_read_arrives_and_touches_nothing_else(kind: str) -> None:
    """When read returns, we have the bytes, and our other bytes are as before."""

    async def script(own: Own, peer: Peer) -> None:
        fill(own.memory, 1)
        expected = bytearray(own.memory.buffer)
        expected[13 : 13 + 300_007] = peer.memory.buffer[1_000_001 : 1_000_001 + 300_007]
        there, here = [Range(1_000_001, 300_007)], [Range(13, 300_007)]
        await own.transport.read(peer.endpoint, there, here, 5.0)
        assert own.memory.buffer == expected

    between_two(kind, script)


@pytest.mark.parametrize(("count", "length"), [(64, 64 * KIB), (3000, 1000), (3, 10 * MIB)])
def test_a_batch_pairs_its_ranges(kind: str, count: int, length: int) -> None:
    """Range i of one side goes with range i of the other, whatever their orders."""
    rng = random.Random(count)

    async def script(own: Own, peer: Peer) -> None:
        fill(own.memory, 1)
        places = [Range(i * length, length) for i in range(count)]
        here, there = rng.sample(places, count), rng.sample(places, count)
        await own.transport.read(peer.endpoint, there, here, 10.0)
        assert crc(own.memory, *here) == crc(peer.memory, *there)
        fill(own.memory, 3)
        await own.transport.write(peer.endpoint, here, there, 10.0)
        assert crc(own.memory, *here) == crc(peer.memory, *there)

    between_two(kind, script)


def test_nothing_to_move_is_done_at_once(kind: str) -> None:
    """Empty batches and empty ranges are no error."""

    async def script(own: Own, peer: Peer) -> None:
        before = crc(own.memory), crc(peer.memory)
        await own.transport.read(peer.endpoint, [], [], 5.0)
        empty = [Range(SIZE, 0), Range(0, 0)]
        await own.transport.write(peer.endpoint, empty, empty, 5.0)
        assert (crc(own.memory), crc(peer.memory)) == before

    between_two(kind, script)


OUT_OF_BOUNDS: list[tuple[list[Range], list[Range], str]] = [
    ([Range(SIZE - 10, 11)], [Range(0, 11)], "outside our segment"),
    ([Range(-1, 1)], [Range(0, 1)], "outside our segment"),
    ([Range(0, 11)], [Range(SIZE - 10, 11)], "is outside mcb-"),
    ([Range(0, 1)], [Range(0, 2)], "differ in length"),
    ([Range(0, 1)], [], "1 local ranges for 0"),
]


def test_bounds_are_kept(kind: str) -> None:
    """A range outside its segment is an error of one line, and moves nothing."""

    async def script(own: Own, peer: Peer) -> None:
        before = crc(own.memory), crc(peer.memory)
        for local, remote, message in OUT_OF_BOUNDS:
            for batch in (
                own.transport.write(peer.endpoint, local, remote, 5.0),
                own.transport.read(peer.endpoint, remote, local, 5.0),
            ):
                with pytest.raises(TransportError, match=message) as caught:
                    await batch
                assert not caught.value.peer_is_gone
        assert (crc(own.memory), crc(peer.memory)) == before
        assert await is_usable(own, peer)

    between_two(kind, script)


def test_the_owner_keeps_its_bounds_itself(kind: str) -> None:
    """Who believes that a segment is larger than it is gets an error, not the memory behind it."""
    if kind in NO_KEYS:
        pytest.skip("the engine trusts its peers")

    async def script(own: Own, peer: Peer) -> None:
        larger = msgspec.structs.replace(peer.endpoint, size=2 * SIZE)
        here, there = [Range(0, MIB)], [Range(SIZE - KIB, MIB)]
        with pytest.raises(TransportError):
            await own.transport.read(larger, there, here, 5.0)
        with pytest.raises(TransportError):
            await own.transport.write(larger, here, there, 5.0)
        assert await is_usable(own, peer)

    between_two(kind, script)


def test_a_wrong_key_opens_nothing(kind: str) -> None:
    """Only who was told the segment's key reads or writes it."""
    if kind in NO_KEYS:
        pytest.skip("the engine has no keys")

    async def script(own: Own, peer: Peer) -> None:
        before = crc(own.memory), crc(peer.memory)
        key = bytes(len(peer.endpoint.key))
        wrong = msgspec.structs.replace(peer.endpoint, key=key)
        with pytest.raises(TransportError):
            await own.transport.write(wrong, [Range(0, 8)], [Range(0, 8)], 5.0)
        with pytest.raises(TransportError):
            await own.transport.read(wrong, [Range(0, 8)], [Range(0, 8)], 5.0)
        assert (crc(own.memory), crc(peer.memory)) == before
        assert await is_usable(own, peer)

    between_two(kind, script)


def test_many_transfers_at_once_do_not_mix(kind: str) -> None:
    """Forty batches to one peer, in both directions, each with its own bytes."""

    async def script(own: Own, peer: Peer) -> None:
        length, half = 300 * KIB, SIZE // 2
        fill(own.memory, 1)
        up = [Range(i * length, length) for i in range(20)]
        down = [Range(half + i * length, length) for i in range(20)]
        async with asyncio.TaskGroup() as group:
            for one, other in zip(up, down, strict=True):
                group.create_task(own.transport.write(peer.endpoint, [one], [one], 20.0))
                group.create_task(own.transport.read(peer.endpoint, [other], [other], 20.0))
        assert crc(own.memory, *up, *down) == crc(peer.memory, *up, *down)

    between_two(kind, script)


def test_both_processes_read_each_other_at_once(kind: str) -> None:
    """Each is owner and reader at the same time."""

    async def script(own: Own, peer: Peer) -> None:
        fill(own.memory, 5)
        half = [Range(SIZE // 2, SIZE // 2)]
        peer.ask("read", own.endpoint, SIZE // 2)
        await own.transport.read(peer.endpoint, half, half, 20.0)
        assert await peer.answer() == "done"
        assert own.memory.buffer == peer.memory.buffer

    between_two(kind, script)


def test_the_owners_event_loop_is_not_needed(kind: str) -> None:
    """One-sided: a peer whose loop is busy elsewhere serves all the same."""

    async def script(own: Own, peer: Peer) -> None:
        assert await is_usable(own, peer)
        peer.ask("block", 30)
        assert await peer.answer() == "blocked"
        assert await is_usable(own, peer)

    between_two(kind, script)


@pytest.mark.parametrize("met_before", [True, False])
def test_a_dead_peer_is_told_as_gone(kind: str, met_before: bool) -> None:
    """A killed peer is an error that says so, soon."""

    async def script(own: Own, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        if met_before:
            assert await is_usable(own, peer)
        peer.kill()
        begin_s = loop.time()
        with pytest.raises(TransportError) as caught:
            await own.transport.read(peer.endpoint, [Range(0, MIB)], [Range(0, MIB)], 20.0)
        assert caught.value.peer_is_gone
        assert loop.time() - begin_s < 15.0
        own.transport.forget(peer.endpoint)
        with pytest.raises(TransportError):
            await own.transport.write(peer.endpoint, [Range(0, 8)], [Range(0, 8)], 5.0)

    between_two(kind, script)


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_peer_killed_in_mid_transfer_ends_it(kind: str, what: str) -> None:
    """The batch under way or the next one fails as gone, and others' peers are not touched."""

    async def script(own: Own, peer: Peer) -> None:
        async def without_end() -> None:
            while True:
                if what == "read":
                    await own.transport.read(peer.endpoint, WHOLE, WHOLE, 20.0)
                else:
                    await own.transport.write(peer.endpoint, WHOLE, WHOLE, 20.0)

        task = asyncio.create_task(without_end())
        await asyncio.sleep(0.1)
        assert not task.done()
        await asyncio.to_thread(peer.kill)
        with pytest.raises(TransportError) as caught:
            await task
        assert caught.value.peer_is_gone
        with other_process(kind) as another:
            assert await is_usable(own, another)

    between_two(kind, script)


@pytest.mark.parametrize("size", [SIZE, 64 * KIB])
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_hung_peer_is_left_at_the_deadline(kind: str, what: str, size: int) -> None:
    """A stopped peer costs a batch its deadline; when it goes on, our memory is left alone."""
    if kind in NO_HELP_NEEDED:
        pytest.skip("needs nothing of the peer's process")
    if kind in DONE_WHEN_SENT and what == "write" and size < SIZE:
        pytest.skip("its small writes may be done without the peer")

    async def script(own: Own, peer: Peer) -> None:
        assert await is_usable(own, peer)
        peer.pause()
        move = own.transport.read if what == "read" else own.transport.write
        with pytest.raises(TransportError, match="not done within") as caught:
            await move(peer.endpoint, [Range(0, size)], [Range(0, size)], 0.3)
        assert not caught.value.peer_is_gone
        fill(own.memory, 4)
        before = crc(own.memory)
        peer.go_on()
        await asyncio.sleep(0.1)
        assert crc(own.memory) == before or kind in WRITES_LATE
        assert await is_usable(own, peer)

    between_two(kind, script)


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_small_batch_is_cancelled_too(kind: str, what: str) -> None:
    """Whoever waits for a hung peer can be called off at once, and again when it goes on."""
    if kind in NO_HELP_NEEDED:
        pytest.skip("needs nothing of the peer's process")

    async def script(own: Own, peer: Peer) -> None:
        assert await is_usable(own, peer)
        peer.pause()
        move = own.transport.read if what == "read" else own.transport.write
        task = asyncio.create_task(move(peer.endpoint, [Range(0, 8)], [Range(0, 8)], 30.0))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})
        is_done = kind in DONE_WHEN_SENT and what == "write" and not task.cancelled()
        assert task.cancelled() or (is_done and task.exception() is None)
        peer.go_on()
        assert await is_usable(own, peer)

    between_two(kind, script)


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.004])
def test_a_cancelled_batch_leaves_our_memory_alone(kind: str, delay_s: float) -> None:
    """After the cancellation not one more byte arrives, and the transport goes on."""

    async def script(own: Own, peer: Peer) -> None:
        task = asyncio.create_task(own.transport.read(peer.endpoint, WHOLE, WHOLE, 20.0))
        await asyncio.sleep(delay_s)
        if task.done():
            return  # The machine slept longer than the read took: nothing to cancel.
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        fill(own.memory, 4)
        before = crc(own.memory)
        await asyncio.sleep(0.05)
        assert crc(own.memory) == before
        assert await is_usable(own, peer)

    between_two(kind, script)


def test_a_new_incarnation_is_not_reached_by_the_old_endpoint(kind: str) -> None:
    """A process that was started again has a new endpoint; the old one is refused."""

    async def script(own: Own, peer: Peer) -> None:
        assert await is_usable(own, peer)
        peer.kill()
        with other_process(kind) as successor:
            with pytest.raises(TransportError):
                await own.transport.read(peer.endpoint, [Range(0, 8)], [Range(0, 8)], 5.0)
            own.transport.forget(peer.endpoint)
            assert await is_usable(own, successor)

    between_two(kind, script)


def test_forgetting_a_peer_ends_what_is_under_way(kind: str) -> None:
    """Nobody waits for a peer that was declared dead."""
    if kind in NO_HELP_NEEDED:
        pytest.skip("needs nothing of the peer's process")

    async def script(own: Own, peer: Peer) -> None:
        assert await is_usable(own, peer)
        peer.pause()
        task = asyncio.create_task(own.transport.read(peer.endpoint, WHOLE, WHOLE, 30.0))
        await asyncio.sleep(0.05)
        own.transport.forget(peer.endpoint)
        with pytest.raises(TransportError):
            await task

    between_two(kind, script)


def test_a_transport_that_was_closed_serves_nobody(kind: str) -> None:
    """close() is the end of the segment's being reached, also for who was connected."""
    if kind in NO_CONNECTION:
        pytest.skip("the segment's owner closes that")

    async def main() -> None:
        async with own_side(kind) as one, own_side(kind) as other:
            here = [Range(0, 8)]
            await one.transport.read(other.endpoint, here, here, 5.0)
            await other.transport.close()
            with pytest.raises(TransportError):
                await one.transport.read(other.endpoint, here, here, 5.0)

    asyncio.run(main())


def test_an_endpoint_travels_as_a_message() -> None:
    """What the control plane sends is what the peer gets."""
    endpoint = Endpoint("tcp", "127.0.0.1:1", "mcb-x", 10, b"\x00\xff")
    encoded = msgspec.msgpack.encode(endpoint)
    assert msgspec.msgpack.decode(encoded, type=Endpoint) == endpoint


def test_cut_keeps_order_and_limits() -> None:
    """10 + 5 bytes in parts of at most 6 bytes and 2 ranges: 6, 4 + 2, 3."""
    local, remote = [Range(0, 10), Range(20, 5)], [Range(100, 10), Range(200, 5)]
    parts = list(cut(local, remote, 6, 2))
    assert parts == [
        ([Range(0, 6)], [Range(100, 6)]),
        ([Range(6, 4), Range(20, 2)], [Range(106, 4), Range(200, 2)]),
        ([Range(22, 3)], [Range(202, 3)]),
    ]
