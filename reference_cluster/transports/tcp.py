"""How do bytes move between hosts without RDMA? Several TCP streams to each peer, one-sidedly."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from reference_cluster.transports.bytes import (
    Endpoint,
    Range,
    Segment,
    TransportError,
    check_batch,
    cut,
)
from reference_cluster.transports.tcp_owner import SegmentServer
from reference_cluster.transports.tcp_wire import (
    ANSWER,
    DONE,
    HELLO,
    MAGIC,
    RANGES_MAX,
    READ,
    REQUEST_BYTES_MAX,
    VERSION,
    WRITE,
    PeerLeft,
    expect_done,
    prepare,
    receive,
    request_of,
    secret_of,
    send,
)
from reference_cluster.transports.threads import run_stoppable

# So much is moved by the event loop itself, where threads would take as long to wake as the bytes
# to move; of few ranges, as each costs it a system call.
INLINE_BYTES = 1 << 20
INLINE_RANGES = 16
# Below this a second stream costs more, in waking its threads, than it brings.
SHARE_BYTES_MIN = 2 << 20
# As many transfers to one peer run at once, each on a stream of its own; others wait.
STREAMS_PER_PEER = 8

Part = tuple[list[Range], list[Range]]  # Of one request: our ranges and the peer's.


class TcpTransport:
    """Serves its own segment and reaches others' over `streams` connections for a large batch.

    `host` is the address of this host that peers reach. Who can reach it must know the segment's
    key; an address other than loopback also needs a `token` that all workers have. Nothing is
    encrypted: keep it inside a network that you trust.
    """

    name = "tcp"

    def __init__(self, host: str = "127.0.0.1", token: bytes = b"", streams: int = 2) -> None:
        check_host(host, token)
        self.host, self.token, self.streams = host, token, streams
        self.peers: dict[Endpoint, TcpPeer] = {}
        self.server: SegmentServer | None = None

    async def start(self, segment: Segment) -> Endpoint:
        self.segment = segment
        key = secrets.token_bytes(16)
        self.server = SegmentServer(segment, self.host, secret_of(key, self.token))
        address = f"{self.host}:{self.server.port}"
        return Endpoint(self.name, address, segment.name, segment.size, key)

    async def read(
        self,
        peer: Endpoint,
        remote: Sequence[Range],
        local: Sequence[Range],
        deadline_s: float,
    ) -> None:
        await self.move(READ, peer, local, remote, deadline_s)

    async def write(
        self,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        await self.move(WRITE, peer, local, remote, deadline_s)

    async def move(
        self,
        operation: int,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        total = check_batch(local, self.segment.size, remote, peer)
        if total == 0:
            return
        link = self.peers.get(peer)
        if link is None:
            link = self.peers[peer] = TcpPeer(peer, self.segment.buffer, self.token)
        is_small = total <= INLINE_BYTES and len(local) <= INLINE_RANGES
        stream = link.take_idle() if is_small else None
        if stream is not None:
            share = Share(link, operation, [(list(local), list(remote))], deadline_s)
            await share.moved_here(stream)
            return
        count = max(1, min(self.streams, total // SHARE_BYTES_MIN))
        bytes_max = min(-(-total // count), REQUEST_BYTES_MAX)
        parts = list(cut(local, remote, bytes_max, RANGES_MAX))
        shares = [Share(link, operation, parts[first::count], deadline_s) for first in range(count)]
        # Each ends by its deadline, so all are waited for: none works on when we have returned.
        ends = await asyncio.gather(*(share.moved() for share in shares), return_exceptions=True)
        for end in ends:
            if end is not None:
                raise end

    def forget(self, peer: Endpoint) -> None:
        link = self.peers.pop(peer, None)
        if link is not None:
            link.close()

    async def close(self) -> None:
        for peer in list(self.peers):
            self.forget(peer)
        if self.server is not None:
            await asyncio.to_thread(self.server.close)


class TcpPeer:
    """The streams to one peer: some idle, the others each in the hands of a share."""

    def __init__(self, endpoint: Endpoint, buffer: memoryview, token: bytes) -> None:
        self.endpoint = endpoint
        self.name = f"{endpoint.segment} at {endpoint.address}"
        self.buffer = buffer
        self.secret = secret_of(endpoint.key, token)
        # Of its own, so that a peer that hangs keeps no other waiting.
        self.threads = ThreadPoolExecutor(STREAMS_PER_PEER, thread_name_prefix="tcp")
        self.idle: list[socket.socket] = []
        self.at_work: dict[Share, None] = {}

    def take_idle(self) -> socket.socket | None:
        try:
            return self.idle.pop()
        except IndexError:  # Threads take them too, so to look first would not do.
            return None

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for share in list(self.at_work):
            share.stop()
        while self.idle:
            self.idle.pop().close()


class Share:
    """A part of a batch that goes over one stream."""

    def __init__(
        self, peer: TcpPeer, operation: int, parts: Sequence[Part], deadline_s: float
    ) -> None:
        self.peer = peer
        self.operation = operation
        self.parts = parts
        self.deadline_s = deadline_s
        self.lock = threading.Lock()
        self.stream: socket.socket | None = None
        self.is_stopped = False

    async def moved(self) -> None:
        self.peer.at_work[self] = None
        try:
            threads, name = self.peer.threads, self.peer.name
            await run_stoppable(threads, self.move, self.stop, self.deadline_s, name)
        finally:
            del self.peer.at_work[self]

    async def moved_here(self, stream: socket.socket) -> None:
        """By the event loop, on a stream that was idle."""
        self.peer.at_work[self] = None
        self.hold(stream)
        is_in_step = False
        try:
            stream.setblocking(False)
            async with asyncio.timeout(self.deadline_s):
                await self.exchange_here(stream, *self.parts[0])
            is_in_step = True
        except TimeoutError:
            reason = f"{self.peer.name}: not done within {self.deadline_s:g} s"
            raise TransportError(reason) from None
        except TransportError:
            is_in_step = True
            raise
        except OSError as error:
            raise self.failure(error) from None
        finally:
            self.give_back(stream, is_in_step)
            del self.peer.at_work[self]

    async def exchange_here(
        self, stream: socket.socket, ours: list[Range], theirs: list[Range]
    ) -> None:
        loop = asyncio.get_running_loop()
        views = self.views(ours)
        await loop.sock_sendall(stream, request_of(self.operation, theirs))
        if self.operation == WRITE:
            for view in views:
                await loop.sock_sendall(stream, view)
        head = bytearray(ANSWER.size)
        await fill_here(loop, stream, memoryview(head))
        status, length = ANSWER.unpack(head)
        if status != DONE:
            reason = bytearray(length)
            await fill_here(loop, stream, memoryview(reason))
            raise TransportError(reason.decode(errors="replace"))
        if self.operation == READ:
            for view in views:
                await fill_here(loop, stream, view)

    def stop(self) -> None:
        """Whoever waits for the stream wakes with an error."""
        with self.lock:
            self.is_stopped = True
            if self.stream is not None:
                with contextlib.suppress(OSError):
                    self.stream.shutdown(socket.SHUT_RDWR)

    def move(self) -> None:
        """In a thread: every part, request by request."""
        is_in_step = False
        try:
            stream = self.take()
            try:
                stream.setblocking(True)
                for ours, theirs in self.parts:
                    is_in_step = False
                    self.exchange(stream, ours, theirs)
                    is_in_step = True
            except TransportError:
                is_in_step = True
                raise
            finally:
                self.give_back(stream, is_in_step)
        except OSError as error:
            raise self.failure(error) from None

    def failure(self, error: OSError) -> TransportError:
        is_gone = isinstance(error, ConnectionError) and not self.is_stopped
        reason = f"{self.peer.name}: {error.strerror or error}"
        return TransportError(reason, peer_is_gone=is_gone)

    def views(self, ranges: list[Range]) -> list[memoryview]:
        buffer = self.peer.buffer
        return [buffer[one.offset : one.offset + one.length] for one in ranges]

    def exchange(self, stream: socket.socket, ours: list[Range], theirs: list[Range]) -> None:
        views = self.views(ours)
        head = request_of(self.operation, theirs)
        if self.operation == WRITE:
            send(stream, [head, *views])
            expect_done(stream)
        else:
            send(stream, [head])
            expect_done(stream)
            receive(stream, views)

    def take(self) -> socket.socket:
        """An idle stream or a new one, which stop() can reach from now on."""
        stream = self.peer.take_idle()
        if stream is None:
            return self.connected()
        self.hold(stream)
        return stream

    def hold(self, stream: socket.socket) -> None:
        with self.lock:
            self.stream = stream
            if self.is_stopped:
                stream.close()
                raise ConnectionAbortedError("stopped")

    def connected(self) -> socket.socket:
        host, port = self.peer.endpoint.address.rsplit(":", 1)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        stream = socket.socket(family)
        self.hold(stream)
        try:
            stream.settimeout(self.deadline_s)
            stream.connect((host, int(port)))
            prepare(stream)
            send(stream, [HELLO.pack(MAGIC, VERSION, self.peer.secret)])
            expect_done(stream)
        except BaseException:
            self.give_back(stream, False)
            raise
        return stream

    def give_back(self, stream: socket.socket, is_in_step: bool) -> None:
        with self.lock:
            self.stream = None
            if is_in_step and not self.is_stopped:
                self.peer.idle.append(stream)
            else:
                stream.close()


async def fill_here(
    loop: asyncio.AbstractEventLoop, stream: socket.socket, view: memoryview
) -> None:
    while view:
        got = await loop.sock_recv_into(stream, view)
        if got == 0:
            raise PeerLeft("closed the stream")
        view = view[got:]


def check_host(host: str, token: bytes) -> None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise TransportError(f"network: {host!r} is no IP address; give one in figures") from None
    if address.is_unspecified:
        raise TransportError(f"network: {host} is every address; give the one that peers reach")
    if not address.is_loopback and not token:
        raise TransportError(f"network: {host} can be reached by others; give a token too")
