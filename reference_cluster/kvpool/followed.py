"""How do we follow strangers' caches? Their open KV events drive an index of ours.

Whose blocks they are say the events (`backend_id`) or, as vLLM's say nothing, who subscribes. Where
token ids come along, the blocks get our own keys, so that strangers with hashes of their own can be
asked about prompts; else the hashes are taken as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import zmq
import zmq.asyncio

from reference_cluster.blocks import prefix_hashes
from reference_cluster.kvpool.events import (
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    AnyEvent,
    Cleared,
    EventError,
    Stored,
    decode,
    medium_of,
)
from reference_cluster.kvpool.index import PrefixIndex

log = logging.getLogger(__name__)
REPLAY_S_MAX = 5.0  # So long the next repeated batch is waited for.
BATCH_BYTES_MAX = 16 * 1024 * 1024


class FollowedIndex:
    """What strangers hold: on any medium (`index`), and on each of them."""

    def __init__(self, names: Sequence[str], block_tokens: int) -> None:
        self.ids = {name: id for id, name in enumerate(names)}
        self.block_tokens = block_tokens
        self.index = PrefixIndex(len(names))
        self.media: dict[str, PrefixIndex] = {}
        self.keys: dict[int, int] = {}  # Ours, of hashes that came with token ids.

    def apply(self, event: AnyEvent, name: str | None = None) -> None:
        """One event; of instances, adapters, salts and block sizes unknown here nothing is kept.

        `name`: whose it is where it does not say so. What is repeated changes nothing.
        """
        instance = self.ids.get(event.backend_id or name or "")
        if instance is None:
            return
        if isinstance(event, Cleared):
            self.cleared(instance, event.medium and medium_of(event))
        elif isinstance(event, Stored):
            if self.is_ours(event):
                medium = self.media.setdefault(medium_of(event), PrefixIndex(len(self.ids)))
                blocks = self.keys_of(event)
                medium.stored(instance, blocks)
                self.index.stored(instance, blocks)
        else:
            self.removed(instance, medium_of(event), event.seq_hashes)

    def is_ours(self, event: Stored) -> bool:
        """Do these hashes depend on tokens alone, in blocks of our size?"""
        is_salted = bool(event.lora_name or event.additional_salt or any(event.extra_keys or ()))
        return not is_salted and event.block_size in (None, self.block_tokens)

    def keys_of(self, event: Stored) -> tuple[int, ...]:
        if not event.token_ids:
            return event.seq_hashes
        parent = None
        if event.parent_hash is not None:
            parent = self.keys.get(event.parent_hash)
            if parent is None:
                return ()  # Its place is unknown; and without those before it nobody can use it.
        keys = prefix_hashes(event.token_ids, self.block_tokens, parent)
        self.keys.update(zip(event.seq_hashes, keys, strict=False))
        return keys[: len(event.seq_hashes)]

    def removed(self, instance: int, medium: str, hashes: Sequence[int]) -> None:
        where = self.media.get(medium)
        if where is None:
            return
        keys = [(one, self.keys.get(one, one)) for one in dict.fromkeys(hashes)]
        here = [key for _, key in keys if where.holds(instance, key)]
        where.evicted(instance, here)
        others = self.media.values()
        gone = [key for key in here if not any(one.holds(instance, key) for one in others)]
        self.index.evicted(instance, gone)
        for one, key in keys:
            if key not in self.index.holders:
                self.keys.pop(one, None)

    def cleared(self, instance: int, medium: str | None = None) -> None:
        """It holds nothing any more, on this medium or (None) on any."""
        for name in [*self.media] if medium is None else [medium]:
            if name in self.media:
                self.media[name].cleared(instance)
        others = self.media.values()
        held = self.index.held_by(instance)
        gone = [key for key in held if not any(one.holds(instance, key) for one in others)]
        self.index.evicted(instance, gone)
        self.keys = {one: key for one, key in self.keys.items() if key in self.index.holders}

    def forget(self, name: str) -> None:
        if name in self.ids:
            self.cleared(self.ids[name])


class Numbering:
    """Is a numbered batch the next, one that is known, or is something between them missing?"""

    def __init__(self) -> None:
        self.expected = 0
        self.heard = -1  # The last one that came by itself; what is repeated may be ahead of it.

    def judge(self, number: int) -> Literal["next", "known", "gap", "restart"]:
        last, self.heard = self.heard, number
        if number <= last:
            return "restart"
        if number < self.expected:
            return "known"
        return "next" if number == self.expected else "gap"


class Subscription:
    """One publisher's events into a FollowedIndex. Its tasks end when `run` is cancelled."""

    def __init__(
        self,
        followed: FollowedIndex,
        address: str,
        replay_address: str | None = None,
        name: str | None = None,
    ) -> None:
        self.followed = followed
        self.address = address
        self.replay_address = replay_address
        self.name = name
        self.numbering = Numbering()
        self.names: dict[str, None] = {}  # Whose events have come.
        self.gaps = 0
        self.context = zmq.asyncio.Context.instance()

    async def run(self) -> None:
        """Follow for ever. What cannot be repeated is forgotten, until it is told anew."""
        with contextlib.closing(self.context.socket(zmq.SUB)) as sub:
            sub.setsockopt(zmq.LINGER, 0)
            sub.setsockopt(zmq.MAXMSGSIZE, BATCH_BYTES_MAX)
            sub.subscribe(b"")
            sub.connect(self.address)
            await self.catch_up()
            while True:
                _, number, payload = await sub.recv_multipart()
                await self.receive(int.from_bytes(number, "big"), payload)

    async def receive(self, number: int, payload: bytes) -> None:
        what = self.numbering.judge(number)
        if what == "restart":
            self.forget()
            self.numbering.expected = 0
        if what in ("gap", "restart") and number != self.numbering.expected:
            self.gaps += 1
            await self.catch_up()
            if number > self.numbering.expected:
                self.forget()
                self.numbering.expected = number
        if number == self.numbering.expected:
            self.take(number, payload)

    async def catch_up(self) -> None:
        """Take in what is repeated from the expected batch on."""
        async for number, payload in self.repeated():
            if number > self.numbering.expected:
                self.forget()  # Not all that is missing is kept there.
            self.take(number, payload)

    async def repeated(self) -> AsyncIterator[tuple[int, bytes]]:
        if self.replay_address is None:
            return
        with contextlib.closing(self.context.socket(zmq.DEALER)) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.MAXMSGSIZE, BATCH_BYTES_MAX)
            dealer.connect(self.replay_address)
            first = self.numbering.expected.to_bytes(SEQUENCE_BYTES, "big")
            await dealer.send_multipart((b"", first))
            while True:
                try:
                    async with asyncio.timeout(REPLAY_S_MAX):
                        *_, number, payload = await dealer.recv_multipart()
                except TimeoutError:
                    log.warning("%s repeats nothing", self.replay_address)
                    return
                if number == END_OF_REPLAY:
                    return
                yield int.from_bytes(number, "big"), payload

    def take(self, number: int, payload: bytes) -> None:
        self.numbering.expected = number + 1
        try:
            events: list[Any] = decode(payload)
        except EventError as error:
            log.warning("%s: batch %d is %s", self.address, number, error)
            self.forget()
            return
        for event in events:
            self.names[event.backend_id or self.name or ""] = None
            self.followed.apply(event, self.name)

    def forget(self) -> None:
        """Nothing of this publisher's instances is known for certain any more."""
        for name in self.names:
            self.followed.forget(name)
