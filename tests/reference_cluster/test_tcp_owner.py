"""Who may reach a segment over TCP, and what do strangers get?"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from reference_cluster.transports.bytes import Endpoint, Range, Segment, TransportError
from reference_cluster.transports.tcp import TcpTransport
from reference_cluster.transports.tcp_wire import (
    HELLO,
    MAGIC,
    RANGES_MAX,
    READ,
    REQUEST,
    VERSION,
    secret_of,
)

SIZE = 1 << 20
FEW = [Range(0, 8)]


@contextlib.asynccontextmanager
async def serving(token: bytes = b"") -> AsyncIterator[tuple[TcpTransport, Endpoint]]:
    segment = Segment.create(SIZE, "mcb-tcp-")
    transport = TcpTransport(token=token)
    try:
        yield transport, await transport.start(segment)
    finally:
        await transport.close()
        segment.close()


def stranger(endpoint: Endpoint) -> socket.socket:
    host, port = endpoint.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def heard(stream: socket.socket) -> bytes:
    """What comes next; nothing, where the owner has closed the stream."""
    with contextlib.suppress(ConnectionResetError):
        return stream.recv(1000)
    return b""


def hello(endpoint: Endpoint, version: int = VERSION) -> bytes:
    return HELLO.pack(MAGIC, version, secret_of(endpoint.key, b""))


def with_a_server(script: Callable[[Endpoint], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving() as (_, endpoint), serving() as (reader, _own):
            await script(endpoint)
            await reader.read(endpoint, FEW, FEW, 5.0)  # It serves the next as if nothing were.

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "give a token"),
        ("0.0.0.0", "give the one that peers reach"),
        ("::", "give the one that peers reach"),
        ("localhost", "give one in figures"),
    ],
)
def test_an_address_that_others_reach_needs_a_token(host: str, reason: str) -> None:
    """Loopback is the default; the rest is asked for in full."""
    with pytest.raises(TransportError, match=reason):
        TcpTransport(host)


def test_an_address_of_another_host_is_one_line() -> None:
    """192.0.2.0/24 belongs to nobody."""

    async def main() -> None:
        segment = Segment.create(SIZE, "mcb-tcp-")
        with pytest.raises(TransportError, match="give an address of this host"):
            await TcpTransport("192.0.2.1", token=b"x").start(segment)
        segment.close()

    asyncio.run(main())


def test_a_token_must_be_the_same_on_both_sides() -> None:
    """The key alone does not open a segment that has a token."""

    async def main() -> None:
        async with (
            serving(b"ours") as (_, endpoint),
            serving(b"theirs") as (wrong, _a),
            serving(b"ours") as (right, _b),
        ):
            with pytest.raises(TransportError, match="key or the token is wrong"):
                await wrong.read(endpoint, FEW, FEW, 5.0)
            await right.read(endpoint, FEW, FEW, 5.0)

    asyncio.run(main())


def test_another_version_is_told_ours() -> None:
    """Old and new do not talk past one another."""

    async def script(endpoint: Endpoint) -> None:
        with stranger(endpoint) as stream:
            stream.sendall(hello(endpoint, version=VERSION + 1))
            answer = await asyncio.to_thread(heard, stream)
        assert f"speaks version {VERSION}, not {VERSION + 1}".encode() in answer

    with_a_server(script)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\nUser-Agent: a browser\r\n\r\n",
        b"",
        b"MCBT",
    ],
)
def test_whoever_is_no_peer_gets_no_bytes(said: bytes) -> None:
    """A browser, a port scan, half a hello: at most a refusal."""

    async def script(endpoint: Endpoint) -> None:
        with stranger(endpoint) as stream:
            stream.sendall(said)
            with contextlib.suppress(OSError):  # It may be closed already.
                stream.shutdown(socket.SHUT_WR)
            assert len(await asyncio.to_thread(heard, stream)) < 100

    with_a_server(script)


@pytest.mark.parametrize(
    "request_bytes",
    [
        REQUEST.pack(READ, RANGES_MAX + 1),
        REQUEST.pack(7, 1) + struct.pack("!QQ", 0, 8),
        REQUEST.pack(READ, 2) + struct.pack("!QQ", 0, 1 << 62) * 2,
    ],
    ids=["too many ranges", "no such operation", "too many bytes"],
)
def test_a_request_past_the_limits_ends_the_stream(request_bytes: bytes) -> None:
    """Nothing is reserved for it and nothing is sent."""

    async def script(endpoint: Endpoint) -> None:
        with stranger(endpoint) as stream:
            stream.sendall(hello(endpoint))
            assert await asyncio.to_thread(stream.recv, 4) == b"\0\0\0\0"
            stream.sendall(request_bytes)
            assert await asyncio.to_thread(heard, stream) == b""

    with_a_server(script)


def test_close_leaves_no_thread_and_no_port() -> None:
    """Also the streams of peers that stay connected end with it."""

    async def main() -> None:
        async with serving() as (reader, _own):
            async with serving() as (_, endpoint):
                await reader.read(endpoint, FEW, FEW, 5.0)
            with pytest.raises(ConnectionRefusedError):
                stranger(endpoint)

    before = threading.active_count()
    asyncio.run(main())
    names = [thread.name for thread in threading.enumerate()]
    assert threading.active_count() <= before + 1, names  # A pool's idle thread ends by itself.
