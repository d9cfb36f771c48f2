"""How do instances that live in one process reach each other? Directly, over modelled links.

The cluster of `simulate`, and of `serve --workers inside`. Where instances are processes of their
own, `remote.py` takes this place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from reference_cluster.colocated import ColocatedInstance
from reference_cluster.decode import DecodeInstance
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.messenger import Delivery, Handover, Messenger
from reference_cluster.parts import Parts
from reference_cluster.policies.view import Holder
from reference_cluster.prefill import PrefillInstance, Queued, only_token
from reference_cluster.request import Block, OnEnd, Request
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
        for instance in self.instances:
            group.create_task(instance.run(), name=instance.name)

    # ---- between them ------------------------------------------------------------------------

    def fetch(self, queued: Queued, best: Holder) -> None:
        """Copy the holder's longer prefix and keep it here too: the replication of hot blocks."""
        request, block_tokens = queued.request, self.parts.config.block_tokens
        prefill, holder = self.prefills[number(request.prefill)], self.prefills[best.id]
        depth = queued.pinned
        # Less than was promised where its DRAM has no room for what it must read from SSD.
        held, ready_s = holder.hold(request.blocks[depth : best.blocks])
        blocks = depth + held
        copied = request.blocks[depth:blocks]
        holder.lending += 1
        tokens = min(best.tokens, blocks * block_tokens) - depth * block_tokens
        request.fetched_tokens = tokens

        def arrived() -> None:
            holder.pool.unpin(copied, depth)
            holder.lending -= 1
            prefill.fetched(queued, blocks)

        if ready_s > self.loop.time():
            self.loop.call_at(ready_s, self.messenger.fetch, tokens, holder.id, prefill.id, arrived)
        else:
            self.messenger.fetch(tokens, holder.id, prefill.id, arrived)

    def begin_handover(self, request: Request, prefill_s: float) -> Handover | None:
        """A prefill begins: its KV starts to flow to the decode instance, unless none is needed."""
        if request.output_tokens == 1:
            return None
        source, target = number(request.prefill), number(request.decode)
        node = self.parts.config.prefill_groups + target
        arrived = partial(self.transferred, request, self.decodes[target])
        return self.messenger.hand_over(request, source, node, prefill_s, arrived)

    def prefilled(self, request: Request, handover: Delivery | None) -> None:
        """A prefill has ended: its only token, or the rest of the transfer, or nobody wants it."""
        if request.is_cancelled:
            if handover is not None:
                handover.cancel()
        elif handover is not None:
            handover.prefilled()
        else:
            self.decodes[number(request.decode)].forget(request)
            only_token(request)
            self.on_end(request)

    def transferred(self, request: Request, decode: DecodeInstance) -> None:
        """All KV is at the decode instance."""
        if not request.has_ended:
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
        if not here:
            done(0)
            return
        holder.pool.pin(here)
        holder.lending += 1

        def arrived() -> None:
            holder.pool.unpin(here)
            holder.lending -= 1
            stored = target.pool.store_pinned(here)
            target.pool.unpin(here[:stored])
            done(stored)

        tokens = len(here) * self.parts.config.block_tokens
        self.messenger.fetch(tokens, holder.id, target.id, arrived)

    # ---- looking at it -----------------------------------------------------------------------

    async def ready(self) -> None:
        """They are, as soon as they are made."""

    def rows(self) -> list[dict[str, object]]:
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


def number(name: str | None) -> int:
    """The id in an instance's name, `decode-3`."""
    assert name is not None
    return int(name.rsplit("-", 1)[1])
