"""How does the owner of a segment serve its peers' reads and writes, without its event loop?

A thread for each stream, blocked in the system most of its life, copies between the socket and the
segment itself; so a busy event loop delays no peer, and the interpreter's lock is not held.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import socket
import threading

from reference_cluster.transports.bytes import Segment, TransportError
from reference_cluster.transports.tcp_wire import (
    ANSWER,
    DONE,
    HELLO,
    MAGIC,
    PLACE,
    RANGES_MAX,
    READ,
    REQUEST,
    REQUEST_BYTES_MAX,
    VERSION,
    WRITE,
    PeerLeft,
    prepare,
    receive,
    receive_struct,
    refusal,
    send,
)

STREAMS_MAX = 1024


class SegmentServer:
    """Listens from the moment it is made until close()."""

    def __init__(self, segment: Segment, host: str, secret: bytes) -> None:
        self.segment = segment
        self.buffer = segment.buffer
        self.secret = secret
        self.listener = listener(host)
        self.port: int = self.listener.getsockname()[1]
        self.lock = threading.Lock()
        self.streams: dict[socket.socket, threading.Thread] = {}
        self.closing = threading.Event()
        self.acceptor = threading.Thread(target=self.accept, name="tcp accept", daemon=True)
        self.acceptor.start()

    def accept(self) -> None:
        while not self.closing.is_set():
            try:
                stream, _ = self.listener.accept()
            except OSError:  # We close, the peer was gone before we came, or files ran out.
                self.closing.wait(0.01)
                continue
            thread = threading.Thread(
                target=self.serve, args=(stream,), name="tcp serve", daemon=True
            )
            with self.lock:
                if self.closing.is_set() or len(self.streams) >= STREAMS_MAX:
                    with stream, contextlib.suppress(OSError):
                        stream.sendall(refusal(f"{self.segment.name}: too many streams"))
                    continue
                self.streams[stream] = thread
            thread.start()

    def serve(self, stream: socket.socket) -> None:
        """One stream for its whole life."""
        # A peer that leaves, resets or stalls ends its stream and nothing else.
        with stream, contextlib.suppress(OSError):
            prepare(stream)
            if self.is_welcome(stream):
                while not self.closing.is_set():
                    self.answer(stream)
        with self.lock:
            del self.streams[stream]

    def is_welcome(self, stream: socket.socket) -> bool:
        magic, version, secret = receive_struct(stream, HELLO)
        assert isinstance(secret, bytes)
        refused = ""
        if magic != MAGIC or version != VERSION:
            refused = f"{self.segment.name} speaks version {VERSION}, not {version}"
        elif not hmac.compare_digest(secret, self.secret):
            refused = f"{self.segment.name}: the key or the token is wrong"
        send(stream, [refusal(refused) if refused else ANSWER.pack(DONE, 0)])
        return not refused

    def answer(self, stream: socket.socket) -> None:
        """One request; one that is refused leaves the stream in step."""
        try:
            operation, count = receive_struct(stream, REQUEST)
        except TimeoutError:  # Between requests a peer may be silent.
            return
        views, total, refused = self.views(stream, operation, count)
        if operation == WRITE:
            if refused:
                drain(stream, total)
            else:
                receive(stream, views)
            views = []
        send(stream, [refusal(refused)] if refused else [ANSWER.pack(DONE, 0), *views])

    def views(
        self, stream: socket.socket, operation: object, count: object
    ) -> tuple[list[memoryview], int, str]:
        """The ranges asked for, their bytes, and why not, if so."""
        assert isinstance(count, int)
        if operation not in (READ, WRITE) or count > RANGES_MAX:
            raise PeerLeft("talks nonsense")  # What follows cannot be told apart.
        places = bytearray(count * PLACE.size)
        receive(stream, [memoryview(places)])
        views, total, refused = [], 0, ""
        for offset, length in PLACE.iter_unpack(places):
            total += length
            if offset + length > self.segment.size:
                name, size = self.segment.name, self.segment.size
                refused = f"{offset}+{length} is outside {name} of {size} bytes"
            views.append(self.buffer[offset : offset + length])
        if total > REQUEST_BYTES_MAX:
            raise PeerLeft("asks for too much at once")
        return views, total, refused

    def close(self) -> None:
        """Returns when no thread touches the segment any more."""
        with self.lock:
            self.closing.set()
            streams = dict(self.streams)
        # Who is blocked in accept, recv or send wakes with an error.
        for one in (self.listener, *streams):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in (self.acceptor, *streams.values()):
            thread.join()
        self.listener.close()


def listener(host: str) -> socket.socket:
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family, backlog=128)
    except OSError as error:
        reason = f"{error.strerror}; give an address of this host"
        raise TransportError(f"network.transport tcp: {host}: {reason}") from None


def drain(stream: socket.socket, total: int) -> None:
    """Take the bytes of a refused write off the stream."""
    scratch = memoryview(bytearray(min(total, 1 << 20)))
    while total:
        part = scratch[: min(total, len(scratch))]
        receive(stream, [part])
        total -= len(part)
