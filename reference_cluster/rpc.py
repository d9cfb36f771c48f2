"""How do messages get from one process to another? Frames of msgpack over zmq, on asyncio.

What is posted in one turn of the loop leaves in one frame. A frame that is too large or is no list
of messages is dropped and logged: a process that talks nonsense must not bring down its hearer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from reference_cluster.errors import ClusterError
from reference_cluster.messages import AnyMessage, Message, Sorry

log = logging.getLogger(__name__)

FRAME_BYTES_MAX = 16 * 1024 * 1024  # All 1.6 million blocks of a large pool's contents.
FRAMES_QUEUED_MAX = 10_000  # To a process that has stopped reading; later ones are lost.
encoder = msgspec.msgpack.Encoder()
decoder = msgspec.msgpack.Decoder(list[AnyMessage])
OnMessage = Callable[[bytes, Message], None]


class NoAnswerError(ClusterError):
    """A question to another process that was not answered in time, or with regret."""


class Socket:
    """One zmq socket: messages out by `post`, messages in by `run`. `peer` is b"" on a Line."""

    def __init__(self, kind: int, on_message: OnMessage) -> None:
        self.on_message = on_message
        self.loop = asyncio.get_running_loop()
        self.socket: Any = zmq.asyncio.Context.instance().socket(kind)
        self.socket.setsockopt(zmq.LINGER, 200)
        self.socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        self.socket.setsockopt(zmq.SNDHWM, FRAMES_QUEUED_MAX)
        self.socket.setsockopt(zmq.RCVHWM, FRAMES_QUEUED_MAX)
        self.outbox: dict[bytes, list[Message]] = {}
        self.lost_frames = 0

    def post(self, peer: bytes, message: Message) -> None:
        """Send with what else is posted to this peer in this turn; it may get lost with it."""
        if not self.outbox:
            self.loop.call_soon(self.flush)
        self.outbox.setdefault(peer, []).append(message)

    def flush(self) -> None:
        outbox, self.outbox = self.outbox, {}
        for peer, messages in outbox.items():
            self.send(peer, encoder.encode(messages))

    def send(self, peer: bytes, frame: bytes) -> None:
        if self.socket.closed:
            return
        parts = [peer, frame] if peer else [frame]
        sent = self.socket.send_multipart(parts, flags=zmq.NOBLOCK)
        if sent.done():
            self.note(sent)
        else:
            sent.add_done_callback(self.note)

    def note(self, sent: asyncio.Future[Any]) -> None:
        """A full queue loses its frames: who reads so slowly will be found dead soon."""
        if not sent.cancelled() and sent.exception() is not None:
            self.lost_frames += 1

    async def run(self) -> None:
        """Hand messages on for ever."""
        while True:
            *peer, frame = await self.socket.recv_multipart()
            try:
                messages = decoder.decode(frame)
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                log.warning("a frame of %d bytes was dropped: %s", len(frame), error)
                continue
            for message in messages:
                self.on_message(peer[0] if peer else b"", message)

    def close(self) -> None:
        self.flush()
        self.socket.close()


class Office(Socket):
    """Where others come to: bound to an address, answers by the identity that came."""

    def __init__(self, address: str, on_message: OnMessage) -> None:
        super().__init__(zmq.ROUTER, on_message)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.bind(address)


class Line(Socket):
    """To one other process, which knows us by `identity`; connects again by itself."""

    def __init__(self, address: str, identity: bytes, on_message: OnMessage) -> None:
        super().__init__(zmq.DEALER, on_message)
        self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self.socket.connect(address)

    def tell(self, message: Message) -> None:
        self.post(b"", message)


class Questions:
    """Questions to others and who waits for their answers."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.open: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, put: Callable[[int], None], deadline_s: float, what: str) -> Any:
        """`put` sends the question of the number given; raises NoAnswerError."""
        number = next(self.numbers)
        answer = self.open[number] = asyncio.get_running_loop().create_future()
        try:
            put(number)
            async with asyncio.timeout(deadline_s):
                found = await answer
        except TimeoutError:
            raise NoAnswerError(f"{what}: no answer in {deadline_s:g} s") from None
        finally:
            del self.open[number]
        if isinstance(found, Sorry):
            raise NoAnswerError(f"{what}: {found.reason}")
        return found

    def answered(self, number: int, answer: Message) -> None:
        """An answer that nobody waits for any more is dropped."""
        waiting = self.open.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
