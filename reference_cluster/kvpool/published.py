"""How do strangers follow our index? Its changes as open KV events on a zmq socket, with repeats.

Works like vLLM's publisher: PUB, and beside it a ROUTER that repeats what somebody has missed. Who
has missed more than is kept is told everything anew, on the PUB socket.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio

from reference_cluster.errors import ServeError
from reference_cluster.kvpool.events import (
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    AnyEvent,
    Cleared,
    Removed,
    Stored,
    encode,
)
from reference_cluster.kvpool.index import Change, PrefixIndex
from reference_cluster.request import Block

BATCHES_KEPT = 10_000  # For repeats; as many as vLLM keeps.
BATCHES_QUEUED_MAX = 100_000  # To a subscriber that has stopped reading; later ones it misses.
BLOCKS_MAX = 10_000  # Of one batch: 0.2 MB.
PARENTS_KEPT = 250_000  # Twice so many blocks of the latest prompts, about 50 MB.
UNKNOWN = "unknown"  # Instead of a parent.


class Parents:
    """Which block comes before a block? Known of the latest prompts; None: it begins a prompt."""

    def __init__(self, kept: int = PARENTS_KEPT) -> None:
        self.kept = kept
        self.young: dict[Block, Block | None] = {}
        self.old: dict[Block, Block | None] = {}

    def learn(self, blocks: Sequence[Block]) -> None:
        self.young.update(zip(blocks, (None, *blocks), strict=False))
        if len(self.young) > self.kept:
            self.old, self.young = self.young, {}

    def of(self, block: Block, unknown: Any = None) -> Any:
        return self.young.get(block, self.old.get(block, unknown))

    def runs(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """The same blocks in order, cut wherever one does not follow the one before.

        Those of which nothing is known are in runs of their own.
        """
        runs: list[list[Block]] = []
        before: Block | None = UNKNOWN
        for block in blocks:
            parent = self.of(block, UNKNOWN)
            if runs and parent == before:
                runs[-1].append(block)
            else:
                runs.append([block])
            before = UNKNOWN if parent == UNKNOWN else block
        return runs


class Announcer:
    """Changes of the index as events. Pure: what is made of them is the publisher's business."""

    def __init__(self, names: Sequence[str], medium: str, model: str, block_tokens: int) -> None:
        self.names = names
        self.envelope: dict[str, Any] = {
            "model_name": model,
            "block_size": block_tokens,
            "medium": medium,
            "dp_rank": 0,
        }
        self.parents = Parents()
        self.event_ids: Counter[int] = Counter()  # How many events there were, by instance.

    def events(self, change: Change, instance: int, blocks: Sequence[Block]) -> list[AnyEvent]:
        if change == "cleared":
            return [Cleared(**self.next(instance))]
        if change == "removed":
            return [Removed(seq_hashes=keys(blocks), **self.next(instance))] if blocks else []
        return [self.stored(instance, run) for run in self.parents.runs(blocks)]

    def stored(self, instance: int, run: Sequence[Block]) -> Stored:
        parent = self.parents.of(run[0], UNKNOWN)
        return Stored(
            seq_hashes=keys(run),
            base_block_idx=0 if parent is None else None,
            parent_hash=None if parent == UNKNOWN else parent,
            **self.next(instance),
        )

    def next(self, instance: int) -> dict[str, Any]:
        event_id = self.event_ids[instance]
        self.event_ids[instance] += 1
        return {"event_id": event_id, "backend_id": self.names[instance], **self.envelope}


def keys(blocks: Sequence[Any]) -> tuple[int, ...]:
    return tuple(blocks)


class Publisher:
    """The sockets of an index that is published; raises ServeError where they cannot be bound."""

    def __init__(
        self,
        index: PrefixIndex,
        announcer: Announcer,
        address: str,
        replay_address: str | None,
        clock: Callable[[], float],
    ) -> None:
        self.index = index
        self.announcer = announcer
        self.clock = clock
        self.numbers = itertools.count()
        self.kept: deque[tuple[bytes, bytes]] = deque(maxlen=BATCHES_KEPT)
        self.pub: Any = zmq.Context.instance().socket(zmq.PUB)
        self.replay: Any = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        try:
            self.pub.setsockopt(zmq.LINGER, 200)
            self.pub.setsockopt(zmq.SNDHWM, BATCHES_QUEUED_MAX)
            self.replay.setsockopt(zmq.LINGER, 0)
            self.replay.setsockopt(zmq.SNDHWM, BATCHES_QUEUED_MAX)
            bind(self.pub, address)
            if replay_address is not None:
                bind(self.replay, replay_address)
        except ServeError:
            self.close()
            raise
        index.on_change = self.changed

    def changed(self, change: Change, instance: int, blocks: Sequence[Block]) -> None:
        for first in range(0, max(1, len(blocks)), BLOCKS_MAX):
            part = blocks[first : first + BLOCKS_MAX]
            self.send(self.announcer.events(change, instance, part))

    def send(self, events: Sequence[AnyEvent]) -> None:
        if events:
            number = next(self.numbers).to_bytes(SEQUENCE_BYTES, "big")
            payload = encode(events, self.clock())
            self.kept.append((number, payload))
            self.pub.send_multipart((b"", number, payload), zmq.NOBLOCK)

    def learn(self, blocks: Sequence[Block]) -> None:
        """A prompt has these blocks: their events will say which follows which."""
        self.announcer.parents.learn(blocks)

    async def run(self) -> None:
        """Repeat what is asked for, for ever: [number] -> one [number, payload] a batch, and -1."""
        while True:
            client, *_, first = await self.replay.recv_multipart()
            # Big-endian: in the order of numbers.
            for number, payload in [one for one in self.kept if one[0] >= first]:
                await self.replay.send_multipart((client, b"", number, payload))
            await self.replay.send_multipart((client, b"", END_OF_REPLAY, b""))
            if self.kept and self.kept[0][0] > first:
                self.tell_everything()

    def tell_everything(self) -> None:
        for instance in range(self.index.instances):
            self.changed("cleared", instance, ())
            self.changed("stored", instance, self.index.held_by(instance))

    def close(self) -> None:
        self.pub.close()
        self.replay.close()


def bind(socket: Any, address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        why = zmq.strerror(error.errno or 0)
        raise ServeError(f"{address}: {why}; give another [conductor] address") from None
