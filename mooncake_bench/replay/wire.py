"""What do a Locust worker and its engine process say to each other? Length-prefixed msgpack."""

from __future__ import annotations

from typing import IO, Protocol

import msgspec

from mooncake_bench.replay.client import ClientStats, Progress
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.recorder import Batch
from mooncake_bench.replay.target import Target

PREFIX_BYTES = 4


class Job(msgspec.Struct, frozen=True, tag=True):
    """The first message to the engine process: what to send, and which share of it."""

    options: ReplayOptions
    target: Target
    worker: int
    workers: int
    sha256: str
    """Of the trace as the master read it: another file of the same name is refused."""
    rows: int
    """Of the whole trace after its transforms."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """When to begin, in seconds of time.time() on the engine's host."""

    wall_s: float


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End now and keep what was measured."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine has read the trace and built its first requests."""

    planned: int


class Records(msgspec.Struct, frozen=True, tag=True):
    """What has been settled since the last message."""

    batch: Batch | None
    progress: Progress


class Done(msgspec.Struct, frozen=True, tag=True):
    """The last message; `error` is one line where the engine could not do its job."""

    stats: ClientStats | None = None
    error: str = ""


Order = Job | Start | Stop
Report = Ready | Records | Done


class Readable(Protocol):
    """What `read_frame` needs of a stream."""

    def read(self, size: int, /) -> bytes | None: ...


def encode(message: Order | Report) -> bytes:
    """The message as msgpack."""
    return msgspec.msgpack.encode(message)


def decode_order(frame: bytes) -> Order:
    """A message to the engine process; raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(frame, type=Job | Start | Stop)


def decode_report(frame: bytes) -> Report:
    """A message of the engine process; raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(frame, type=Ready | Records | Done)


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    """Write one message and flush."""
    stream.write(len(frame).to_bytes(PREFIX_BYTES, "big") + frame)
    stream.flush()


def read_frame(stream: Readable) -> bytes | None:
    """The next message, or None at the end of the stream, also inside a message."""
    prefix = stream.read(PREFIX_BYTES)
    if not prefix or len(prefix) < PREFIX_BYTES:
        return None
    size = int.from_bytes(prefix, "big")
    frame = stream.read(size)
    return frame if frame is not None and len(frame) == size else None
