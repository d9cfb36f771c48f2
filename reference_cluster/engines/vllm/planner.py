"""What is vLLM's scheduler told of the pool, and what do its steps load and save?

Plain decisions, without vLLM: `connector.py` asks in the order in which vLLM calls. Of a prompt the
pool keeps whole blocks of vLLM's size; its keys are those of `blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from reference_cluster.blocks import prefix_hashes
from reference_cluster.engines.vllm.store import Index, Offer
from reference_cluster.transports.bytes import Endpoint


class EngineRequest(Protocol):
    """What is needed of vLLM's Request."""

    request_id: str
    prompt_token_ids: list[int] | None
    num_computed_tokens: int
    kv_transfer_params: dict[str, Any] | None


@dataclass(slots=True)
class Load:
    """Blocks that one request waits for: (block of the engine, our slot, key)."""

    request: str
    blocks: list[tuple[int, int, int]]
    peer: Endpoint | None = None
    remote: list[int] = field(default_factory=list)  # Slots there, of the last so many blocks.


Save = tuple[int, int, int]  # Block of the engine, our slot, key.


@dataclass(slots=True)
class Tracked:
    """A request as the pool sees it: keys of its prompt's whole blocks."""

    request: EngineRequest
    keys: tuple[int, ...]
    offer: Offer | None
    first: int = 0  # Blocks that the engine has itself,
    here: int = 0  # and up to which ours has the next.
    saved: int = 0
    is_barred: bool = False  # A block of it was lost: it computes what it lacks, and asks no more.


class Planner:
    """The scheduler's side. `loads` and `saves` by the worker's role."""

    def __init__(self, block_tokens: int, loads: bool = True, saves: bool = True) -> None:
        self.block_tokens = block_tokens
        self.loads, self.saves = loads, saves
        self.requests: dict[str, Tracked] = {}
        self.loading: dict[str, Load] = {}
        self.planned: list[Load] = []

    def open(self, endpoint: Endpoint, slots: int) -> None:
        """The worker has its memory."""
        self.endpoint = endpoint
        self.index = Index(slots)

    def tracked(self, request: EngineRequest) -> Tracked:
        known = self.requests.get(request.request_id)
        if known is None:
            whole = len(request.prompt_token_ids or ()) // self.block_tokens * self.block_tokens
            keys: tuple[int, ...] = ()
            if is_plain(request):
                keys = prefix_hashes((request.prompt_token_ids or [])[:whole], self.block_tokens)
            known = Tracked(request, keys, offer_of(request))
            self.requests[request.request_id] = known
        return known

    def external_tokens(self, request: EngineRequest, local_tokens: int) -> int | None:
        """Tokens beyond the engine's own that can be loaded; None: ask again later.

        May be asked again of a request that did not fit, or was preempted; nothing is promised yet.
        """
        one = self.tracked(request)
        if not self.loads or one.is_barred:
            return 0
        first = local_tokens // self.block_tokens
        # One token must be left to compute: there is no answer without it.
        usable = (len(request.prompt_token_ids or ()) - 1) // self.block_tokens
        keys = one.keys[:usable]
        here = first + self.index.pool.match(keys[first:])
        if any(key in self.index.filling for key in keys[first:here]):
            return None
        there = here
        if one.offer is not None:
            room = self.index.room() - (here - first)
            there = max(here, min(len(one.offer.slots), len(keys), here + room))
        one.first, one.here = first, here
        return max(0, there - first) * self.block_tokens

    def allocated(
        self, request: EngineRequest, block_ids: Sequence[int], external_tokens: int
    ) -> None:
        """The engine has made room; `block_ids` is the request's whole table."""
        if not external_tokens:
            return
        one = self.requests[request.request_id]
        there = one.first + external_tokens // self.block_tokens
        keys = one.keys[one.first : there]
        slots = self.index.hold(keys)
        assert len(slots) == len(keys), f"{len(keys)} blocks promised, {self.index.pool!r}"
        blocks = list(zip(block_ids[one.first : there], slots, keys, strict=True))
        load = Load(request.request_id, blocks)
        if one.offer is not None and one.here < there:
            load.peer = one.offer.endpoint
            load.remote = one.offer.slots[one.here : there]
            self.index.filling.update(dict.fromkeys(keys[-len(load.remote) :]))
        self.loading[request.request_id] = load
        self.planned.append(load)

    def step(
        self, scheduled: Mapping[str, int], table: Callable[[str], Sequence[int]]
    ) -> tuple[list[Load], list[Save]]:
        """What to move in a step that computes so many tokens of each request.

        A block is saved in the step that completes it.
        """
        loads, self.planned = self.planned, []
        saves: list[Save] = []
        for request_id, tokens in scheduled.items() if self.saves else ():
            one = self.requests.get(request_id)
            if one is None or one.saved >= len(one.keys):
                continue
            computed = one.request.num_computed_tokens + tokens
            complete = min(computed // self.block_tokens, len(one.keys))
            missing = [i for i in range(one.saved, complete) if one.keys[i] not in self.index.slots]
            keys = [one.keys[i] for i in missing]
            slots = self.index.hold(keys)
            if slots:
                block_ids = table(request_id)
                places = [block_ids[i] for i in missing[: len(slots)]]
                saves += zip(places, slots, keys[: len(slots)], strict=True)
                self.index.release(keys[: len(slots)])
            one.saved = max(one.saved, complete)
        return loads, saves

    def loaded(self, request_ids: Iterable[str], lost: Iterable[int]) -> None:
        """These requests' loads have ended; blocks of the engine that are `lost` never came."""
        gone = frozenset(lost)
        for request_id in request_ids:
            load = self.loading.pop(request_id)
            keys = [key for _, _, key in load.blocks]
            for key in keys:
                self.index.filling.pop(key, None)
            self.index.release(keys)
            missing = [key for block_id, _, key in load.blocks if block_id in gone]
            for key in missing:
                self.index.drop(key)
            if missing and request_id in self.requests:
                self.requests[request_id].is_barred = True

    def finished(self, request: EngineRequest) -> dict[str, Any] | None:
        """The request has ended, or was aborted; where its prompt's blocks lie, for others."""
        one = self.requests.pop(request.request_id, None)
        if one is None or not self.saves:
            return None
        held = self.index.pool.match(one.keys)
        if not held:
            return None
        slots = [self.index.slots[key] for key in one.keys[:held]]
        return {"pool": msgspec.to_builtins(Offer(self.endpoint, slots))}


def is_plain(request: EngineRequest) -> bool:
    """Does the KV depend on the tokens alone?"""
    others = ("lora_request", "mm_features", "cache_salt", "prompt_embeds")
    return not any(getattr(request, name, None) for name in others)


def offer_of(request: EngineRequest) -> Offer | None:
    """The offer that came with the request; one that cannot be read is none."""
    given = (request.kv_transfer_params or {}).get("pool")
    try:
        return msgspec.convert(given, Offer) if given is not None else None
    except msgspec.ValidationError:
        return None
