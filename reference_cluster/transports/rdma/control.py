"""What do two processes tell each other before RDMA can begin, and who is let in?

Messages go over a TCP connection of our own, msgpack with a length before it. The connection
lives as long as the queue pairs made over it: its end is how either side learns that the other
has gone.
"""

from __future__ import annotations

import asyncio

import msgspec

VERSION = 1
MESSAGE_BYTES_MAX = 16 << 10
HEAD_BYTES = 4


class Party(msgspec.Struct, frozen=True):
    """One side of a queue pair: all that the other side's needs to be connected to it.

    `mtu` is verbs' code of it; `reads` how many READs it serves at a time.
    """

    gid: str
    number: int
    packet_number: int
    mtu: int
    reads: int


class Port(msgspec.Struct, frozen=True):
    """One of the passive side's devices, with the key of its memory there."""

    device: str
    rkey: int


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First words of who wants to reach a segment; `key` is its endpoint's."""

    version: int
    key: bytes


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The key was right: where the segment begins, and the devices it can be reached by."""

    address: int
    ports: list[Port]


class Pairing(msgspec.Struct, frozen=True, tag=True):
    """Make a queue pair on your `device` for this one of mine.

    `number` is the connection's own: those of queue pairs repeat from device to device.
    """

    number: int
    device: str
    party: Party


class Paired(msgspec.Struct, frozen=True, tag=True):
    """The answer to Pairing `number`: the other end."""

    number: int
    party: Party


class Unpair(msgspec.Struct, frozen=True, tag=True):
    """My end of Pairing `number` has gone; let go of yours."""

    number: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Why not; `number` is the Pairing's, or 0 in answer to a Hello."""

    number: int
    reason: str


Message = Hello | Welcome | Pairing | Paired | Unpair | Refused

decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    body = msgspec.msgpack.encode(message)
    assert len(body) <= MESSAGE_BYTES_MAX
    writer.write(len(body).to_bytes(HEAD_BYTES) + body)


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None at the end, and where what came is none of ours."""
    try:
        length = int.from_bytes(await reader.readexactly(HEAD_BYTES))
        if length > MESSAGE_BYTES_MAX:
            return None
        return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, OSError, msgspec.DecodeError):
        return None
