"""What do the two ends of a TCP stream say to each other, and how do bytes get on and off it?

A client says hello once, then sends requests, each answered before the next. All numbers are
big-endian:

    hello    "MCBT", version (2 bytes), 2 of padding, secret (32)
    request  operation (1: read, 2: write), 3 of padding, number of ranges (4),
             then offset and length (8 + 8) of each range; a write's bytes follow
    answer   status (0: done, else refused), 1 of padding, length of the reason (2),
             then the reason in UTF-8, or a read's bytes; hello is answered too
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Sequence

from reference_cluster.transports.bytes import Range, TransportError

VERSION = 1
MAGIC = b"MCBT"
HELLO = struct.Struct("!4sHxx32s")
REQUEST = struct.Struct("!BxxxI")
PLACE = struct.Struct("!QQ")
ANSWER = struct.Struct("!BxH")
READ, WRITE = 1, 2
DONE, REFUSED = 0, 1
RANGES_MAX = 4096
REQUEST_BYTES_MAX = 1 << 30
# Who sends or takes nothing for so long in the midst of a request is given up.
STALLED_S = 30
VECTORS_MAX = 1024  # IOV_MAX of Linux.


class PeerLeft(ConnectionError):  # noqa: N818  # what happened, beside ConnectionResetError
    """The other end closed the stream."""


def secret_of(key: bytes, token: bytes) -> bytes:
    """What opens a segment: its key, which peers are told, with the token that all of them have."""
    return hashlib.blake2b(key, key=token, digest_size=32).digest()


def prepare(stream: socket.socket) -> None:
    """Blocking, without delay of small messages, and with an end to every wait."""
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # In the system, not in Python, which would ask poll() before every call.
    limit = struct.pack("ll", STALLED_S, 0)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def send(stream: socket.socket, pieces: Sequence[bytes | memoryview]) -> None:
    """All the pieces, straight from where they are."""
    views = [memoryview(piece) for piece in pieces if len(piece)]
    while views:
        try:
            sent = stream.sendmsg(views[:VECTORS_MAX])
        except BlockingIOError:
            raise TimeoutError(f"took nothing for {STALLED_S} s") from None
        views = rest_of(views, sent)


def receive(stream: socket.socket, views: list[memoryview]) -> None:
    """Fill all the views, straight from the system's buffers."""
    views = [view for view in views if len(view)]
    while views:
        try:
            got = stream.recvmsg_into(views[:VECTORS_MAX], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise TimeoutError(f"sent nothing for {STALLED_S} s") from None
        if got == 0:
            raise PeerLeft("closed the stream")
        views = rest_of(views, got)


def rest_of(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of the views after their first `done` bytes."""
    for index, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[index + 1 :]]
        done -= len(view)
    return []


def receive_struct(stream: socket.socket, layout: struct.Struct) -> tuple[object, ...]:
    buffer = bytearray(layout.size)
    receive(stream, [memoryview(buffer)])
    return layout.unpack(buffer)


def request_of(operation: int, ranges: Sequence[Range]) -> bytes:
    places = (PLACE.pack(one.offset, one.length) for one in ranges)
    return REQUEST.pack(operation, len(ranges)) + b"".join(places)


def refusal(reason: str) -> bytes:
    text = reason.encode()[:1000]
    return ANSWER.pack(REFUSED, len(text)) + text


def expect_done(stream: socket.socket) -> None:
    """The answer's head; TransportError with the reason where the peer refused."""
    status, length = receive_struct(stream, ANSWER)
    if status != DONE:
        assert isinstance(length, int)
        reason = bytearray(length)
        receive(stream, [memoryview(reason)])
        raise TransportError(reason.decode(errors="replace"))
