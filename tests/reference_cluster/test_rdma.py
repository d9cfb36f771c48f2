"""Does RDMA do what it alone promises: paths over devices, failover, refusals by the device?

What every byte transport promises is in test_byte_transports.py. A device to set down is named by
RDMA_SPARE (DEVICE:NETWORK DEVICE), which the guest of `make test-rdma` has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from reference_cluster.transports.bytes import Endpoint, Range, Segment, TransportError
from reference_cluster.transports.rdma import control
from reference_cluster.transports.rdma.devices import SYSFS, usable_devices
from tests.reference_cluster.byte_peer import (
    PREFIX,
    SIZE,
    Own,
    Peer,
    crc,
    fill,
    other_process,
    why_not,
)

if (reason := why_not("rdma")) is not None:
    pytest.skip(reason, allow_module_level=True)

# These need pyverbs, which `make test-rdma` brings.
from reference_cluster.transports.rdma.link import paths_between
from reference_cluster.transports.rdma.transport import RdmaTransport
from reference_cluster.transports.rdma.verbs import event_descriptors

pytestmark = pytest.mark.rdma
MIB = 1 << 20
WHOLE = [Range(0, SIZE)]
SPARE, _, NETWORK = os.environ.get("RDMA_SPARE", "").partition(":")
STEADY = [device.name for device in usable_devices() if device.name != SPARE]
needs_spare = pytest.mark.skipif(not SPARE, reason="no device to set down (RDMA_SPARE)")


@contextlib.asynccontextmanager
async def over(
    *preferred: str, secondary: tuple[str, ...] = (), size: int = SIZE
) -> AsyncIterator[Own]:
    """This process's side over these devices."""
    memory = Segment.create(size, PREFIX)
    transport = RdmaTransport(preferred=preferred, secondary=secondary)
    try:
        yield Own(transport, memory, await transport.start(memory))
    finally:
        await transport.close()
        memory.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    """One other process for all tests: to start one takes an emulated machine many seconds."""
    with other_process("rdma") as process:
        yield process


def run(script: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(script, 240))


def sent_packets(device: str) -> int:
    return int((SYSFS / f"class/infiniband/{device}/ports/1/hw_counters/sent_pkts").read_text())


def set_link(state: str) -> None:
    subprocess.run(["ip", "link", "set", NETWORK, state], check=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110  # counters announce nothing
            await asyncio.sleep(0.001)


@pytest.fixture
def link_restored() -> Iterator[None]:
    yield
    set_link("up")
    asyncio.run(until(lambda: SPARE in [device.name for device in usable_devices()]))


def test_a_gib_goes_over_in_slices() -> None:
    """Each round other bytes, written, checked there, and read back to another place.

    RDMA_MIB: how much in all, where 1024 would take too long.
    """
    half = 64 * MIB
    rounds = max(1, int(os.environ.get("RDMA_MIB", "1024")) * MIB // (2 * half))
    upper, lower = [Range(0, half)], [Range(half, half)]

    async def script(peer: Peer) -> None:
        async with over(size=2 * half) as own:
            memory = np.frombuffer(own.memory.buffer, np.uint32)
            for number in range(rounds):
                memory[: half // 4] = np.arange(half // 4, dtype=np.uint32) + number
                memory[half // 4 :] = 0
                await own.transport.write(peer.endpoint, upper, lower, 120.0)
                assert crc(peer.memory, *lower) == crc(own.memory, *upper)
                await own.transport.read(peer.endpoint, lower, lower, 120.0)
                assert crc(own.memory, *lower) == crc(own.memory, *upper)
            del memory

    with other_process("rdma", 2 * half) as larger:
        run(script(larger))


def test_a_batch_is_read_and_written_pairwise(peer: Peer) -> None:
    """Ranges of all sizes, one of them of several slices, change places on the way."""
    lengths = [1, 100, 4096, 65_537, MIB, 3 * MIB + 5]
    offsets = [sum(lengths[:i]) + 7 * i for i in range(len(lengths))]
    here = [Range(offset, length) for offset, length in zip(offsets, lengths, strict=True)]
    there = [Range(SIZE - one.offset - one.length, one.length) for one in here]

    async def script() -> None:
        async with over() as own:
            fill(own.memory, 20)
            await own.transport.write(peer.endpoint, here, there, 30.0)
            assert crc(own.memory, *here) == crc(peer.memory, *there)
            fill(own.memory, 21)
            await own.transport.read(peer.endpoint, there, here, 30.0)
            assert crc(own.memory, *here) == crc(peer.memory, *there)

    run(script())


def test_a_wrong_rkey_is_called_so(peer: Peer) -> None:
    """The peer's device refuses it; with the right one all goes on."""

    async def script() -> None:
        async with over() as own:
            assert isinstance(own.transport, RdmaTransport)
            await own.transport.read(peer.endpoint, WHOLE, WHOLE, 10.0)
            before = crc(peer.memory)
            fill(own.memory, 3)
            for path in own.transport.links[peer.endpoint].paths:
                path.port = msgspec.structs.replace(path.port, rkey=path.port.rkey ^ 0x5555)
            for move in (own.transport.write, own.transport.read):
                with pytest.raises(TransportError, match="wrong key") as caught:
                    await move(peer.endpoint, [Range(0, 8)], [Range(0, 8)], 10.0)
                assert not caught.value.peer_is_gone
            assert crc(peer.memory) == before
            own.transport.forget(peer.endpoint)
            await own.transport.write(peer.endpoint, WHOLE, WHOLE, 10.0)
            assert crc(peer.memory) == crc(own.memory)

    run(script())


@needs_spare
def test_preferred_devices_share_the_load(peer: Peer) -> None:
    """Half of 32 MiB is about 4,096 packets of 4 KiB on either."""

    async def script() -> None:
        devices = [*STEADY, SPARE]
        async with over(*devices) as own:
            before = [sent_packets(device) for device in devices]
            await own.transport.write(peer.endpoint, WHOLE, WHOLE, 10.0)
            after = [sent_packets(device) for device in devices]
        for first, last in zip(before, after, strict=True):
            assert last - first > 1000

    run(script())


@needs_spare
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_failed_device_s_slices_go_by_the_other(
    link_restored: None, what: str, peer: Peer
) -> None:
    """The preferred device goes down under a transfer; the secondary one does what is left."""

    async def script() -> None:
        async with over(SPARE, secondary=(STEADY[0],)) as own:
            move = own.transport.read if what == "read" else own.transport.write
            fill(own.memory, 8)
            before = sent_packets(SPARE)
            task = asyncio.create_task(move(peer.endpoint, WHOLE * 2, WHOLE * 2, 30.0))
            await until(lambda: sent_packets(SPARE) >= before + 100)
            idle = sent_packets(STEADY[0])
            await asyncio.to_thread(set_link, "down")
            assert not task.done()
            await task
            assert crc(own.memory) == crc(peer.memory)
            assert sent_packets(STEADY[0]) > idle

    run(script())


@needs_spare
def test_a_failed_queue_pair_is_replaced_by_a_new_one(link_restored: None, peer: Peer) -> None:
    """A device that was down for a moment has broken its queue pairs, and can make others."""

    async def script() -> None:
        async with over(SPARE) as own:
            await own.transport.read(peer.endpoint, WHOLE, WHOLE, 10.0)
            await asyncio.to_thread(set_link, "down")
            await asyncio.to_thread(set_link, "up")
            fill(own.memory, 5)
            await own.transport.write(peer.endpoint, WHOLE, WHOLE, 10.0)
            assert crc(own.memory) == crc(peer.memory)

    run(script())


@needs_spare
def test_without_a_path_the_error_names_them(link_restored: None, peer: Peer) -> None:
    """The peer lives, so it is not called gone, long before the deadline."""

    async def script() -> None:
        async with over(SPARE) as own:
            await own.transport.read(peer.endpoint, WHOLE, WHOLE, 10.0)
            await asyncio.to_thread(set_link, "down")
            with pytest.raises(TransportError, match=f"no path is left.*{SPARE}-") as caught:
                await own.transport.read(peer.endpoint, WHOLE, WHOLE, 60.0)
            assert not caught.value.peer_is_gone
            assert "\n" not in str(caught.value)

    run(script())


def test_a_deadline_in_mid_transfer_is_kept(peer: Peer) -> None:
    """The batch is given up, our memory is left alone, and the next one goes as ever."""

    async def script() -> None:
        async with over() as own:
            await own.transport.read(peer.endpoint, WHOLE, WHOLE, 10.0)
            begin_s = asyncio.get_running_loop().time()
            with pytest.raises(TransportError, match="not done within") as caught:
                await own.transport.read(peer.endpoint, WHOLE * 100, WHOLE * 100, 0.05)
            assert not caught.value.peer_is_gone
            assert asyncio.get_running_loop().time() - begin_s < 5.0
            fill(own.memory, 4)
            before = crc(own.memory)
            await asyncio.sleep(0.05)
            assert crc(own.memory) == before
            await own.transport.write(peer.endpoint, WHOLE, WHOLE, 10.0)
            assert crc(peer.memory) == before

    run(script())


def test_a_peer_that_never_answers_costs_the_deadline(peer: Peer) -> None:
    """Stopped before we met: the connection stands, but nobody lets us in."""

    async def script() -> None:
        async with over() as own:
            peer.pause()
            with pytest.raises(TransportError, match="not done within"):
                await own.transport.read(peer.endpoint, WHOLE, WHOLE, 0.3)
            peer.go_on()
            await own.transport.read(peer.endpoint, WHOLE, WHOLE, 10.0)
            assert crc(own.memory) == crc(peer.memory)

    run(script())


def test_a_peer_killed_in_mid_transfer_is_gone() -> None:
    """The end of its connection tells it at once, long before the deadline; the other goes on."""

    async def script(victim: Peer) -> None:
        async with over() as own:
            await own.transport.read(victim.endpoint, WHOLE, WHOLE, 30.0)
            task = asyncio.create_task(
                own.transport.write(victim.endpoint, WHOLE * 100, WHOLE * 100, 60.0)
            )
            await asyncio.sleep(0.05)
            assert not task.done()
            await asyncio.to_thread(victim.kill)
            with pytest.raises(TransportError, match="has gone") as caught:
                await task
            assert caught.value.peer_is_gone
            with pytest.raises(TransportError, match="does not listen") as caught:
                await own.transport.read(victim.endpoint, WHOLE, WHOLE, 30.0)
            assert caught.value.peer_is_gone

    with other_process("rdma") as process:
        run(script(process))


async def spoken(peer: Endpoint, *words: bytes) -> bytes:
    """All that the peer's door says to these words."""
    host, _, port = peer.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.writelines(words)
    answer = await reader.read()
    writer.close()
    return answer


def test_strangers_are_told_why_and_shown_out(peer: Peer) -> None:
    """Another protocol or version, a message without end: refused; the door stays open."""
    other = msgspec.msgpack.encode(control.Hello(control.VERSION + 1, b"k"))
    early = msgspec.msgpack.encode(control.Unpair(1))

    async def script() -> None:
        for words, reason in (
            (b"GET / HTTP/1.1\r\n\r\n", b"a Hello comes first"),
            (b"\x7f\xff\xff\xff", b"a Hello comes first"),
            (len(early).to_bytes(4) + early, b"a Hello comes first"),
            (len(other).to_bytes(4) + other, b"is not ours"),
        ):
            assert reason in await spoken(peer.endpoint, words)
        async with over() as own:
            await own.transport.read(peer.endpoint, WHOLE, WHOLE, 10.0)
            assert crc(own.memory) == crc(peer.memory)

    run(script())


def queue_pairs() -> int:
    shown = subprocess.run(["rdma", "-j", "resource"], check=True, capture_output=True).stdout
    return sum(device["qp"] for device in json.loads(shown))


@needs_spare
def test_nothing_is_left_behind(peer: Peer) -> None:
    """Queue pairs are kept for the next transfer; forgotten, they go on both sides."""

    async def script() -> None:
        files = event_descriptors()
        async with over() as own:
            assert isinstance(own.transport, RdmaTransport)
            await own.transport.read(peer.endpoint, WHOLE, WHOLE, 10.0)
            paths = own.transport.links[peer.endpoint].paths
            kept = [path.pair for path in paths if path.pair]
            await own.transport.write(peer.endpoint, WHOLE, WHOLE, 10.0)
            assert [path.pair for path in paths if path.pair] == kept != []
            in_use = queue_pairs()
            own.transport.forget(peer.endpoint)
            await until(lambda: queue_pairs() <= in_use - 2 * len(kept))
        assert event_descriptors() == files

    run(script())


class NamedNic:
    """As much of a Nic as a plan of paths looks at."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_paths_of_like_devices_come_first() -> None:
    """a1 meets a1 before a0 steps in; nothing in common: first with first, second with second."""

    def plan(preferred: str, secondary: str, ports: str) -> list[str]:
        ours, spare = (
            [NamedNic(name) for name in names.split()] for names in (preferred, secondary)
        )
        theirs = [control.Port(name, 0) for name in ports.split()]
        return [str(path) for path in paths_between(ours, spare, theirs)]  # type: ignore[arg-type]

    assert plan("a1", "a0", "a0 a1") == ["a1-a1", "a0-a0", "a1-a0", "a0-a1"]
    assert plan("a0 a1", "", "b0 b1") == ["a0-b0", "a1-b1", "a0-b1", "a1-b0"]
    assert plan("a0", "a1", "b0") == ["a0-b0", "a1-b0"]
