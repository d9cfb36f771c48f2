"""How do instances that live in one process reach each other? Directly, over modelled links.

The cluster of `simulate`, and of `serve --workers inside`. Where instances are processes of their
own, `remote.py` takes this place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from reference_cluster.colocated import ColocatedInstance
from reference_cluster.decode import DecodeInstance
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.messenger import Delivery, Handover, Messenger
from reference_cluster.parts import Parts
from reference_cluster.policies.view import Holder
from reference_cluster.prefill import PrefillInstance, Queued, only_token
from reference_cluster.request import Block, OnEnd, Request
from reference_cluster.spans import Span
from reference_cluster.transports.base import Flow
from reference_cluster.transports.modelled import ModelledTransport


class Inside:
    """Makes instances whose peers are objects beside them.

    Prefill instances are the nodes 0..P-1 of the network, decode instances P..P+D-1. A group of
    prefill nodes (CPP) is one instance, with the memory and the links of all.
    """

    def __init__(self, parts: Parts, index: PrefixIndex, on_end: OnEnd) -> None:
        config = parts.config
        self.parts = parts
        self.index = index
        self.on_end = on_end
        self.loop = asyncio.get_running_loop()
        self.prefills: dict[int, PrefillInstance] = {}
        self.decodes: dict[int, DecodeInstance] = {}
        self.colocateds: dict[int, ColocatedInstance] = {}
        self.group: asyncio.TaskGroup | None = None
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.deliveries: dict[int, tuple[Handover, int]] = {}  # By request, and where it is from.
        self.fetches: dict[Fetch, None] = {}
        groups = 0 if config.system == "colocated" else config.prefill_groups
        nodes = groups + (config.decode_instances if groups else 0)
        link = config.network.link_bytes_per_s or parts.profile.link_bytes_per_s
        self.transport = ModelledTransport(nodes, link)
        for id in range(groups):
            self.transport.widen(id, config.prefill.nodes_per_group)
        self.messenger = Messenger(self.transport, parts.cost, config.prefill.layerwise)

    # ---- making them -------------------------------------------------------------------------

    def prefill(self, id: int) -> PrefillInstance:
        stored, evicted = partial(self.index.stored, id), partial(self.index.evicted, id)
        made = self.parts.prefill(
            id, stored, evicted, self.fetch, self.begin_handover, self.prefilled
        )
        self.prefills[id] = made
        return made

    def decode(self, id: int) -> DecodeInstance:
        self.decodes[id] = made = self.parts.decode(id, self.on_end)
        return made

    def colocated(self, id: int) -> ColocatedInstance:
        stored, evicted = partial(self.index.stored, id), partial(self.index.evicted, id)
        self.colocateds[id] = made = self.parts.colocated(id, stored, evicted, self.on_end)
        return made

    @property
    def instances(self) -> list[PrefillInstance | DecodeInstance | ColocatedInstance]:
        return [*self.prefills.values(), *self.decodes.values(), *self.colocateds.values()]

    def start(self, group: asyncio.TaskGroup) -> None:
        self.group = group
        for instance in self.instances:
            self.begin(instance.name)

    def make(self, name: str) -> PrefillInstance | DecodeInstance | ColocatedInstance:
        """A new instance in this place."""
        of_role: dict[str, Callable[[int], Any]] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "colocated": self.colocated,
        }
        made: PrefillInstance | DecodeInstance | ColocatedInstance
        made = of_role[name.rsplit("-", 1)[0]](number(name))
        return made

    # ---- losing them -------------------------------------------------------------------------

    def drop(self, name: str, now_s: float) -> None:
        """An instance stops at once. What its batch had produced so far is in its requests."""
        if name in self.tasks:
            self.tasks.pop(name).cancel()
        gone = self.instance(name)
        if not isinstance(gone, PrefillInstance):
            give_up_batch(gone, now_s, self.on_end)
        else:
            for moving in [one for one in self.fetches if gone in (one.holder, one.target)]:
                moving.abort()
            for request_id in [*self.deliveries]:
                delivery, source = self.deliveries[request_id]
                if source == gone.id:
                    delivery.cancel()
                    del self.deliveries[request_id]

    def begin(self, name: str) -> None:
        """The instance that was made in the place of a dropped one starts to work."""
        instance = self.instance(name)
        assert self.group is not None
        self.tasks[name] = self.group.create_task(instance.run(), name=name)

    def instance(self, name: str) -> PrefillInstance | DecodeInstance | ColocatedInstance:
        of_role: dict[str, Mapping[int, Any]] = {
            "prefill": self.prefills,
            "decode": self.decodes,
            "colocated": self.colocateds,
        }
        found: PrefillInstance | DecodeInstance | ColocatedInstance
        found = of_role[name.rsplit("-", 1)[0]][number(name)]
        return found

    # ---- between them ------------------------------------------------------------------------

    def fetch(self, queued: Queued, best: Holder) -> None:
        """Copy the holder's longer prefix and keep it here too: the replication of hot blocks."""
        request, block_tokens = queued.request, self.parts.config.block_tokens
        prefill, holder = self.prefills[number(request.prefill)], self.prefills[best.id]
        depth = queued.pinned
        # Less than was promised where its DRAM has no room for what it must read from SSD.
        held, ready_s = holder.hold(request.blocks[depth : best.blocks])
        blocks = depth + held
        tokens = min(best.tokens, blocks * block_tokens) - depth * block_tokens
        request.fetched_tokens = tokens

        def done(is_here: bool) -> None:
            if not is_here:
                request.fetched_tokens = 0
            prefill.fetched(queued, blocks if is_here else depth)

        Fetch(self, holder, prefill, request.blocks[depth:blocks], depth, done).start(
            tokens, ready_s
        )

    def begin_handover(self, request: Request, prefill_s: float) -> Handover | None:
        """A prefill begins: its KV starts to flow to the decode instance, unless none is needed."""
        if request.output_tokens == 1:
            return None
        source, target = number(request.prefill), number(request.decode)
        node = self.parts.config.prefill_groups + target
        arrived = partial(self.transferred, request, self.decodes[target])
        handover = self.messenger.hand_over(request, source, node, prefill_s, arrived)
        self.deliveries[request.id] = handover, source
        return handover

    def prefilled(self, request: Request, handover: Delivery | None) -> None:
        """A prefill has ended: its only token, or the rest of the transfer, or nobody wants it."""
        if request.is_cancelled:
            if handover is not None:
                handover.cancel()
                self.deliveries.pop(request.id, None)
        elif handover is not None:
            handover.prefilled()
        else:
            self.decodes[number(request.decode)].forget(request)
            only_token(request)
            self.on_end(request)

    def transferred(self, request: Request, decode: DecodeInstance) -> None:
        """All KV is at the decode instance."""
        self.deliveries.pop(request.id, None)
        later_s = self.parts.cost.handover_s(request.input_tokens)
        if later_s:
            now_s = self.loop.time()
            self.loop.call_at(now_s + later_s, self.taken_in, request, decode)
        else:
            self.taken_in(request, decode)

    def taken_in(self, request: Request, decode: DecodeInstance) -> None:
        """It can be decoded now, unless it was given up on the way."""
        if not request.is_cancelled:
            request.timeline.transferred_s = self.loop.time()
            decode.join(request)

    def copy(
        self, holder_id: int, target_id: int, blocks: Sequence[Block], done: Callable[[int], None]
    ) -> None:
        """Keep the holder's blocks at the target too, as long as they are used; tells how many.

        Only what the holder has in DRAM: what lies on its SSD is not worth reading for this.
        """
        holder, target = self.prefills[holder_id], self.prefills[target_id]
        here = [block for block in blocks if block in holder.pool]
        if not here or target.is_shunned:
            done(0)
            return
        holder.pool.pin(here)

        def arrived(is_here: bool) -> None:
            stored = target.pool.store_pinned(here) if is_here else 0
            target.pool.unpin(here[:stored])
            done(stored)

        tokens = len(here) * self.parts.config.block_tokens
        Fetch(self, holder, target, here, 0, arrived).start(tokens, 0.0)

    # ---- looking at it -----------------------------------------------------------------------

    async def ready(self) -> None:
        """They are, as soon as they are made."""

    def rows(self) -> list[dict[str, Any]]:
        """No workers to tell of."""
        return []

    async def check(self) -> dict[str, str]:
        """What is wrong with every instance's books: one line each, empty where all is well."""
        found = {}
        for instance in self.instances:
            try:
                instance.check_integrity()
                found[instance.name] = ""
            except AssertionError as error:
                found[instance.name] = str(error)
        return found

    @property
    def engine_lag_s(self) -> float:
        """How late an engine of the live cluster woke at worst."""
        return max(getattr(one.engine, "lag_s_max", 0.0) for one in self.instances)

    def check_integrity(self, is_idle: bool) -> None:
        """Raise AssertionError where the books of any instance do not balance, or where links are
        busy though nothing is under way."""
        for instance in self.instances:
            instance.check_integrity()
        busy = [link for link in self.transport.sending if link.flows]
        assert not (is_idle and busy), f"{len(busy)} links carry bytes of nobody"


class Fetch:
    """Blocks on their way from one prefill instance to another, pinned at the holder."""

    def __init__(
        self,
        house: Inside,
        holder: PrefillInstance,
        target: PrefillInstance,
        blocks: Sequence[Block],
        depth: int,
        done: Callable[[bool], None],
    ) -> None:
        self.house = house
        self.holder = holder
        self.target = target
        self.blocks = blocks
        self.depth = depth
        self.done = done
        self.flow: Flow | None = None
        self.timer: asyncio.TimerHandle | None = None

    def start(self, tokens: int, ready_s: float) -> None:
        """At once, or when the holder has read all of it from its SSD."""
        self.house.fetches[self] = None
        self.holder.lending += 1
        if ready_s > self.house.loop.time():
            self.timer = self.house.loop.call_at(ready_s, self.move, tokens)
        else:
            self.move(tokens)

    def move(self, tokens: int) -> None:
        source, target = self.holder.id, self.target.id
        self.flow = self.house.messenger.fetch(tokens, source, target, self.arrived)

    def arrived(self) -> None:
        self.end()
        self.done(True)

    def abort(self) -> None:
        """The holder or the target is lost."""
        if self.timer is not None:
            self.timer.cancel()
        if self.flow is not None:
            self.flow.cancel()
        self.end()
        if not self.target.is_shunned:
            self.done(False)

    def end(self) -> None:
        del self.house.fetches[self]
        self.holder.pool.unpin(self.blocks, self.depth)
        self.holder.lending -= 1


def give_up_batch(
    instance: DecodeInstance | ColocatedInstance, now_s: float, on_end: OnEnd
) -> None:
    """Count the whole steps of the span under way, and take all members out."""
    batch = instance.batch
    if batch.span_start_s is not None and batch.members:
        size, context = batch.size, batch.context_tokens
        elapsed_s = max(0.0, now_s - batch.span_start_s)
        done = instance.cost.whole_steps_within(size, context, elapsed_s)
        steps = min(done, batch.steps_until_leave)
        if steps:
            start_s, first_gap_s = batch.span_start_s, instance.cost.step_s(size, context)
            end_s = start_s + instance.cost.span_s(size, context, steps)
            growth_s = instance.cost.growth_s(size)
            span = Span(start_s, steps, first_gap_s, growth_s, end_s)
            for request in batch.apply(span):
                if not request.is_cancelled:
                    request.status, request.timeline.finished_s = "finished", end_s
                    on_end(request)
    for request in [member.request for member in batch.members.values()]:
        batch.remove(request)


def number(name: str | None) -> int:
    """The id in an instance's name, `decode-3`."""
    assert name is not None
    return int(name.rsplit("-", 1)[1])
