"""How does the Conductor hear what a worker holds, and that it lives? By a stream of events.

`GET /events` begins with a hello and all that is held; then it tells every change in order, and
now and then a beat. Whoever loses the connection begins anew: no numbers, no gaps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

QUEUED_MAX = 10_000  # Events that a follower may be behind before it has to begin anew.


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Who it is. `endpoint` is that of its share of our pool, if it has one."""

    name: str
    model: str
    endpoint: dict[str, Any] | None


class Stored(msgspec.Struct, frozen=True, tag="stored"):
    """These blocks lie in these slots."""

    slots: list[tuple[int, int]]


class Removed(msgspec.Struct, frozen=True, tag="removed"):
    """These made room."""

    blocks: list[int]


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life: requests in hand, and numbers of the pool's."""

    requests: int
    counts: dict[str, float]


Event = Hello | Stored | Removed | Beat
DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def line(event: Event) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


class Feed:
    """All in the event loop's thread but `tell`, which the engine's thread calls."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, hello: Hello, beat: Callable[[], Beat]
    ) -> None:
        self.loop = loop
        self.hello = hello
        self.beat = beat
        self.held: dict[int, int] = {}
        self.followers: dict[int, asyncio.Queue[Event]] = {}

    def tell(self, change: str, slots: Mapping[Any, int]) -> None:
        """As `store.Change`."""
        event: Event = Stored([*slots.items()]) if change == "stored" else Removed([*slots])
        self.loop.call_soon_threadsafe(self.apply, event)

    def apply(self, event: Event) -> None:
        if isinstance(event, Stored):
            self.held.update(event.slots)
        elif isinstance(event, Removed):
            for block in event.blocks:
                del self.held[block]
        for follower in self.followers.values():
            follower.put_nowait(event)

    async def follow(self, beat_every_s: float) -> AsyncIterator[bytes]:
        """For ever, but for a follower that does not read."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        self.followers[id(events)] = events
        try:
            yield line(self.hello) + line(Stored([*self.held.items()])) + line(self.beat())
            while events.qsize() < QUEUED_MAX:
                try:
                    event = await asyncio.wait_for(events.get(), beat_every_s)
                except TimeoutError:
                    event = self.beat()
                yield line(event)
        finally:
            del self.followers[id(events)]
