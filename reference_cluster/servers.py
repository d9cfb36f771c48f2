"""How does the Conductor use vLLM servers as its instances? It is their clients' client.

The counterpart of `workers.py` for `[engine] kind = "vllm"`: a request's way is a task that asks
the prefill server for one token, then streams the decode server's answer to it. What each server
holds it tells by its events; of one without, what it computed lately is taken to be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from reference_cluster.engines.vllm.connectors import Params, make_connector
from reference_cluster.engines.vllm.feed import Beat, Event, Hello, Removed, Stored
from reference_cluster.engines.vllm.server import (
    Address,
    Chunk,
    Server,
    ServerError,
    make_http,
    read_address,
)
from reference_cluster.errors import ServeError
from reference_cluster.inside import number
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.parts import Parts
from reference_cluster.policies.scheduling import Placement
from reference_cluster.prefill import only_token
from reference_cluster.proxied import ProxiedColocated, ProxiedDecode, ProxiedPrefill
from reference_cluster.request import Block, OnEnd, Request
from reference_cluster.workers import Links, Losing

log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.2  # Whether a server that is not there has come.
Proxied = ProxiedPrefill | ProxiedDecode | ProxiedColocated


class Place:
    """One instance's place in the cluster: its server, and what is known of that."""

    def __init__(self, name: str, server: Server, guess: BlockPool | None) -> None:
        self.name = name
        self.server = server
        self.guess = guess  # What a server without events holds.
        self.has_events = False
        self.state = "starting"
        self.starts = 0
        self.seen_s = 0.0
        self.beat: Beat | None = None
        self.lost_reason: str | None = None

    def row(self, now_s: float) -> dict[str, Any]:
        """For people and tools."""
        is_member = self.state == "member"
        counts = self.beat.counts if self.beat is not None and is_member else {}
        endpoint = self.server.endpoint
        return {
            "name": self.name,
            "state": self.state,
            "pid": self.server.address.pid or None,
            "url": self.server.address.url,
            "starts": self.starts,
            "segment": endpoint.segment if endpoint else None,
            "bootstrap": self.server.facts.get("bootstrap"),
            "age_s": now_s - self.seen_s if is_member else None,
            "report_age_s": now_s - self.seen_s if is_member and self.beat else None,
            "used_blocks": counts.get("held_blocks", 0),
            "pinned_blocks": 0,
            "lost_reason": self.lost_reason,
            **counts,
            "requests": self.beat.requests if counts and self.beat else 0,
        }


class Servers:
    """All vLLM servers of the cluster, as the Conductor reaches them."""

    def __init__(
        self, parts: Parts, index: PrefixIndex, on_end: OnEnd, directory: str, cluster: Losing
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.index = index
        self.on_end = on_end
        self.directory = directory
        self.cluster = cluster
        self.loop = asyncio.get_running_loop()
        self.connector = make_connector(parts.config)
        self.http = make_http()
        link = parts.config.network.link_bytes_per_s or parts.profile.link_bytes_per_s
        self.transport = Links(link)
        self.proxies: dict[str, Proxied] = {}
        self.places: dict[str, Place] = {}
        self.journeys: dict[int, asyncio.Task[None]] = {}
        self.group: asyncio.TaskGroup | None = None
        self.all_here = asyncio.Event()

    # ---- making the instances ----------------------------------------------------------------

    def prefill(self, id: int) -> ProxiedPrefill:
        made = ProxiedPrefill(id, self.parts, self.begin_journey, self.stop_journey)
        self.settle(made.name, made, self.parts.capacity_tokens // self.config.block_tokens)
        return made

    def decode(self, id: int) -> ProxiedDecode:
        made = ProxiedDecode(id, self.parts, self.stop_journey)
        self.settle(made.name, made, None)
        return made

    def colocated(self, id: int) -> ProxiedColocated:
        made = ProxiedColocated(id, self.parts, self.begin_journey, self.stop_journey)
        keeps = self.config.colocated.prefix_caching
        self.settle(made.name, made, made.capacity_blocks if keeps else None)
        return made

    def settle(self, name: str, made: Proxied, blocks: int | None) -> None:
        """Give an instance its place, with a server that nobody has heard of yet."""
        guess = None
        if blocks is not None:
            stored, evicted = self.index.stored, self.index.evicted
            guess = BlockPool(blocks, partial(stored, made.id), partial(evicted, made.id))
        before = self.places.get(name)
        self.proxies[name] = made
        self.places[name] = place = Place(name, Server(name, self.http), guess)
        if before is not None:
            place.state, place.starts = "lost", before.starts
            place.lost_reason = before.lost_reason

    def make(self, name: str) -> Proxied:
        """A new instance in this place."""
        of_role: dict[str, Callable[[int], Proxied]] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "colocated": self.colocated,
        }
        return of_role[name.rsplit("-", 1)[0]](number(name))

    def drop(self, name: str, now_s: float) -> None:
        """Its requests are withdrawn by whoever tries them again."""

    def begin(self, name: str) -> None:
        """The server has begun already."""

    # ---- servers that come and go ------------------------------------------------------------

    def start(self, group: asyncio.TaskGroup) -> None:
        self.group = group
        group.create_task(self.keep_connections(), name="connections")
        for name in self.places:
            group.create_task(self.follow(name), name=f"follow {name}")

    async def keep_connections(self) -> None:
        """Until the cluster ends."""
        async with self.http:
            await asyncio.Event().wait()

    async def ready(self) -> None:
        """Return when every server is there; raises ServeError naming who is not."""
        within_s = self.config.vllm.start_s_max
        try:
            async with asyncio.timeout(within_s):
                await self.all_here.wait()
        except TimeoutError:
            missing = [one for one in self.places.values() if not one.starts]
            told = ", ".join(f"{one.name} ({one.lost_reason or 'no address'})" for one in missing)
            raise ServeError(
                f"{told}: not serving after {within_s:g} s; see the worker's own log"
            ) from None

    async def follow(self, name: str) -> None:
        """For ever: wait until the server is there, and hear of it until it is not."""
        while True:
            place = self.places[name]
            try:
                await self.listen(place)
                reason = "it ended"
            except ServerError as error:
                reason = str(error)
                if place.state == "member" and error.problem == "silent":
                    self.kill(place)
            if place.state == "member" and place is self.places[name]:
                self.lose(name, reason)
            elif place.server.address.url:
                place.lost_reason = reason
            await asyncio.sleep(LOOK_EVERY_S)

    async def listen(self, place: Place) -> None:
        """Returns, or raises ServerError, when the server is not there (any more)."""
        settings, server = self.config.vllm, place.server
        if settings.urls:
            server.address = self.given_address(place.name)
        elif (found := read_address(self.directory, place.name)) is not None:
            server.address = found
        else:
            return
        async with aclosing(
            server.events(self.config.workers.heartbeat_s, settings.dead_after_s)
        ) as events:
            async for event in events:
                if place is not self.places[place.name]:
                    return  # It was lost meanwhile: a request could not reach it.
                self.heard(place, event)
        if not place.has_events:
            await self.look_after(place)

    def given_address(self, name: str) -> Address:
        settings, position = self.config.vllm, self.config.instance_names.index(name)
        given = settings.bootstraps[position : position + 1]
        facts = {"bootstrap": given[0]} if given else {}
        return Address(settings.urls[position].rstrip("/"), facts=facts)

    async def look_after(self, place: Place) -> None:
        """A stock server says only whether it is healthy, and only when it is asked."""
        server = place.server
        while await server.is_healthy() and place is self.places[place.name]:
            if place.state != "member":
                await server.learn_model()
                await server.learn_engine()
                self.joined(place)
            place.seen_s = self.loop.time()
            await asyncio.sleep(self.config.workers.heartbeat_s)

    def heard(self, place: Place, event: Event) -> None:
        place.seen_s = self.loop.time()
        proxy, server = self.proxies[place.name], place.server
        match event:
            case Hello():
                place.has_events = True
                if event.endpoint is not None:
                    place.guess = None
                self.joined(place)
            case Stored():
                server.slots.update(event.slots)
                if isinstance(proxy, ProxiedPrefill):
                    self.index.stored(proxy.id, [block for block, _ in event.slots])
            case Removed():
                for block in event.blocks:
                    del server.slots[block]
                if isinstance(proxy, ProxiedPrefill):
                    self.index.evicted(proxy.id, event.blocks)
            case Beat():
                place.beat = event
        if isinstance(proxy, ProxiedPrefill):
            guess = place.guess
            proxy.pool.used = guess.used if guess is not None else len(server.slots)

    def joined(self, place: Place) -> None:
        place.state = "member"
        place.starts += 1
        place.seen_s = self.loop.time()
        self.cluster.rejoin(place.name)
        if all(one.starts for one in self.places.values()):
            self.all_here.set()

    def lose(self, name: str, reason: str) -> None:
        """A server has ended, or is taken for dead."""
        log.warning("%s is lost: %s", name, reason)
        self.places[name].lost_reason = reason
        self.cluster.lose(name)

    def kill(self, place: Place) -> None:
        """A process of ours that hangs is of no use to anybody."""
        if place.server.address.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(place.server.address.pid, signal.SIGKILL)

    # ---- a request's way ---------------------------------------------------------------------

    def begin_journey(self, request: Request, placement: Placement) -> None:
        assert self.group is not None
        journey = self.journey(request, placement)
        self.journeys[request.id] = self.group.create_task(journey, name=f"request {request.id}")

    def stop_journey(self, request: Request) -> None:
        """Both servers learn of it by their connections: they abort."""
        task = self.journeys.pop(request.id, None)
        if task is not None:
            task.cancel()

    async def journey(self, request: Request, placement: Placement) -> None:
        """A request's whole way, to one of its ends."""
        way = self.alone if self.config.system == "colocated" else self.apart
        try:
            await way(request, placement)
            request.status, request.timeline.finished_s = "finished", self.loop.time()
        except ServerError as error:
            # Whatever happens from here on does not stop this task: it is done.
            del self.journeys[request.id]
            self.failed(request, error)
            return
        del self.journeys[request.id]
        self.on_end(request)

    def failed(self, request: Request, error: ServerError) -> None:
        log.info("request %d: %s", request.id, error)
        name = self.serving(request)
        if error.problem == "refused":
            for one in (request.prefill, request.decode):
                assert one is not None
                self.proxies[one].leave(request)
            request.is_cancelled = True
            request.status, request.reason = "failed", str(error)
            self.on_end(request)
        elif error.problem == "gone" and self.places[name].state == "member":
            self.lose(name, str(error))
        else:
            self.cluster.broken(request.id, f"{error.problem}-{name.rsplit('-', 1)[0]}")

    def serving(self, request: Request) -> str:
        """Whose answer it waits for."""
        prefill, decode = request.prefill, request.decode
        assert prefill is not None
        assert decode is not None
        return prefill if request.timeline.prefill_end_s is None else decode

    async def alone(self, request: Request, placement: Placement) -> None:
        """One server does it all."""
        proxy = self.proxies[f"colocated-{placement.prefill}"]
        assert isinstance(proxy, ProxiedColocated)
        request.timeline.fetched_s = request.timeline.placed_s
        await self.answer(request, proxy, None, placement.ttft_s)

    async def apart(self, request: Request, placement: Placement) -> None:
        """The prefill server's only token, or its KV for the decode server's answer."""
        prefill = self.proxies[f"prefill-{placement.prefill}"]
        decode = self.proxies[f"decode-{placement.decode}"]
        assert isinstance(prefill, ProxiedPrefill)
        assert isinstance(decode, ProxiedDecode)
        server = self.places[prefill.name].server
        goes_on = request.output_tokens > 1
        transfer_id = f"{os.getpid()}-{request.id}"
        params = self.for_prefill(request, placement, transfer_id if goes_on else None)
        asked = body(request, 1, params)
        if goes_on:
            # An end of its own would keep the KV from leaving: the token is not even looked at.
            asked |= {"ignore_eos": True, "stop": []}
        within_s = self.config.vllm.answer_s_max + 2 * placement.ttft_s
        first = await server.complete(asked, within_s)
        self.prefilled(request, prefill, first, placement)
        if request.output_tokens == 1:
            request.output += tokens_of(first)
            decode.leave(request)
            only_token(request)
            return
        params = self.connector.to_decode(transfer_id, server, first.kv_transfer_params)
        await self.answer(request, decode, params, 0.0)

    def for_prefill(
        self, request: Request, placement: Placement, transfer_id: str | None
    ) -> Params:
        holder, blocks = None, request.blocks
        if placement.fetch is not None:
            holder = self.places[f"prefill-{placement.fetch.id}"].server
            blocks = request.blocks[: placement.fetch.blocks]
        return self.connector.to_prefill(transfer_id, holder, blocks)

    def prefilled(
        self, request: Request, prefill: ProxiedPrefill, first: Chunk, placement: Placement
    ) -> None:
        """The prefill server has answered."""
        stamps, told = request.timeline, first.timeline
        stamps.fetched_s = stamps.placed_s
        request.reused_tokens = min(first.cached_tokens, request.input_tokens - 1)
        if placement.fetch is not None:
            stamps.fetched_s = told.scheduled_s or stamps.placed_s
            request.fetched_tokens = min(request.reused_tokens, placement.fetch.tokens)
        self.computed(request, prefill.name, told.scheduled_s, told.first_token_s)
        prefill.leave(request)

    def computed(self, request: Request, name: str, start_s: float, end_s: float) -> None:
        """The prompt's KV is there, from `start_s` to `end_s` as the server says, if it does."""
        stamps, now_s = request.timeline, self.loop.time()
        begun_s = max(stamps.placed_s or 0.0, start_s or stamps.prefill_start_s or 0.0)
        stamps.prefill_start_s = min(now_s, begun_s)
        stamps.prefill_end_s = min(now_s, max(stamps.prefill_start_s, end_s or now_s))
        request.prefilled_tokens = request.input_tokens
        request.prefill_busy_s += stamps.prefill_end_s - stamps.prefill_start_s
        guess = self.places[name].guess
        if guess is not None:
            whole = request.blocks[: request.input_tokens // self.config.block_tokens]
            guess.unpin(whole[: guess.store_pinned(whole)])

    async def answer(
        self,
        request: Request,
        proxy: ProxiedDecode | ProxiedColocated,
        params: Params,
        queue_s: float,
    ) -> None:
        """Pass the server's tokens on. The last are kept back until all that follows is known."""
        patience_s = self.config.vllm.answer_s_max
        server = self.places[proxy.name].server
        asked = body(request, request.output_tokens, params)
        last: list[int] | None = None
        async with aclosing(server.stream(asked, patience_s + 2 * queue_s, patience_s)) as chunks:
            async for chunk in chunks:
                for choice in chunk.choices:
                    if choice.token_ids is None:
                        raise ServerError(
                            "refused", f"{proxy.name} tells no token_ids: use vLLM 0.10.2 or newer"
                        )
                    if choice.finish_reason in ("stop", "length"):
                        last = choice.token_ids
                        request.has_stopped = choice.finish_reason == "stop"
                    elif choice.finish_reason is not None:
                        raise ServerError("failed", f"{proxy.name} ended: {choice.finish_reason}")
                    elif choice.token_ids:
                        self.grow(request, proxy, choice.token_ids)
                if chunk.usage is not None:
                    self.told(request, proxy, chunk)
        if last is None:
            raise ServerError("failed", f"{proxy.name} gave half an answer")
        self.grow(request, proxy, last)
        proxy.leave(request)

    def grow(
        self, request: Request, proxy: ProxiedDecode | ProxiedColocated, tokens: list[int]
    ) -> None:
        stamps, now_s = request.timeline, self.loop.time()
        if stamps.first_token_s is None:
            if isinstance(proxy, ProxiedColocated):
                self.computed(request, proxy.name, 0.0, 0.0)
            stamps.transferred_s = stamps.first_token_s = now_s
        proxy.grow(request, tokens, now_s)

    def told(self, request: Request, proxy: ProxiedDecode | ProxiedColocated, chunk: Chunk) -> None:
        """What a server says at the end: how much was cached, and when it began to compute."""
        stamps, began_s = request.timeline, chunk.timeline.scheduled_s
        if isinstance(proxy, ProxiedColocated):
            request.reused_tokens = min(chunk.cached_tokens, request.input_tokens - 1)
            if began_s and stamps.prefill_end_s is not None:
                stamps.prefill_start_s = min(stamps.prefill_end_s, began_s)
        elif began_s and stamps.first_token_s is not None and stamps.prefill_end_s is not None:
            stamps.transferred_s = min(stamps.first_token_s, max(began_s, stamps.prefill_end_s))

    # ---- what the cluster asks of them -------------------------------------------------------

    def copy(
        self, holder: int, target: int, blocks: Sequence[Block], done: Callable[[int], None]
    ) -> None:
        """Nothing is replicated but by fetching (the config says so)."""
        done(0)

    async def check(self) -> dict[str, str]:
        """What every server says of its own books: one line each, empty where all is well."""
        found = {}
        for name, place in self.places.items():
            if place.state == "member":
                try:
                    await place.server.counts()
                    found[name] = ""
                except ServerError as error:
                    found[name] = str(error)
        return found

    def rows(self) -> list[dict[str, Any]]:
        return [place.row(self.loop.time()) for place in self.places.values()]

    engine_lag_s = 0.0  # They have real engines.

    def check_integrity(self, is_idle: bool) -> None:
        """The servers look after their own books (`check`)."""
        assert not (is_idle and self.journeys), f"{len(self.journeys)} requests under way"


def body(request: Request, tokens: int, params: Params) -> dict[str, Any]:
    """What a server is asked."""
    how = request.sampling
    asked: dict[str, Any] = {
        "prompt": [*request.prompt],
        "max_tokens": tokens,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "ignore_eos": how.ignore_eos,
    }
    if how.temperature:
        asked["seed"] = how.seed & 0x7FFFFFFF
    if how.stop:
        asked["stop"] = [*how.stop]
    if request.tenant:
        asked["cache_salt"] = request.tenant
    if params is not None:
        asked["kv_transfer_params"] = params
    return asked


def tokens_of(answer: Chunk) -> list[int]:
    """Raises ServerError where the answer has none."""
    for choice in answer.choices:
        if choice.token_ids is not None:
            return choice.token_ids
    raise ServerError("refused", "no token_ids in the answer: use vLLM 0.10.2 or newer")
