"""What is the cluster, as a whole? Built from a config and run on either clock: start reading here.

`Cluster.submit` is a request's way in: the Conductor decides, the prefill instance computes, the
Messenger hands over, the decode instance goes on (README.md has the journey in eight steps).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from reference_cluster.colocated import ColocatedInstance
from reference_cluster.conductor import Conductor
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import CostModel, Profile
from reference_cluster.decode import DecodeInstance
from reference_cluster.engines.modelled import ModelledEngine
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.kvpool.ssd import SsdTier
from reference_cluster.messenger import Handover, Messenger
from reference_cluster.policies.admission import Rejected, make_admission
from reference_cluster.policies.scheduling import Placement, make_scheduling
from reference_cluster.policies.view import Holder
from reference_cluster.prefill import PrefillInstance, Queued
from reference_cluster.replicator import Replicator
from reference_cluster.reports import Decoding, LoadReports, Queueing
from reference_cluster.request import OnEnd, Request
from reference_cluster.samples import Samples
from reference_cluster.transports.modelled import ModelledTransport


class Cluster:
    """Conductor, instances, pools and links. Make it inside a running event loop."""

    def __init__(
        self, config: ClusterConfig, profile: Profile, on_end: OnEnd, steps_max: int | None = None
    ) -> None:
        self.config = config
        self.profile = profile
        self.on_end = on_end
        self.steps_max = steps_max
        self.loop = asyncio.get_running_loop()
        self.samples = Samples(config.sample_every_s)
        self.counts: Counter[str] = Counter()
        self.in_flight: dict[int, Request] = {}
        self.replicator: Replicator | None = None
        self.prefill: list[PrefillInstance] = []
        self.decode: list[DecodeInstance] = []
        self.colocated: list[ColocatedInstance] = []
        self.engines: list[ModelledEngine] = []
        if config.system == "disaggregated":
            self.build_disaggregated()
        else:
            self.build_colocated()

    def build_disaggregated(self) -> None:
        """Prefill instances are the nodes 0..P-1 of the network, decode instances P..P+D-1.

        A group of prefill nodes (CPP) is one instance, with the memory and the links of all.
        """
        config, profile = self.config, self.profile
        width, chunk_tokens = config.prefill.nodes_per_group, config.prefill.chunk_tokens
        groups = config.prefill_groups
        cost = CostModel(profile, stages=width, chunk_tokens=chunk_tokens)
        link = config.network.link_bytes_per_s or profile.link_bytes_per_s
        self.transport = ModelledTransport(groups + config.decode_instances, link)
        for id in range(groups):
            self.transport.widen(id, width)
        self.messenger = Messenger(self.transport, cost, config.prefill.layerwise)
        index = PrefixIndex(groups)
        admission = make_admission(config.conductor, config.slo, cost)
        capacity = config.decode.device_tokens or profile.device_kv_tokens
        dram_tokens = width * (config.prefill.dram_tokens or profile.dram_kv_tokens)
        dram_blocks = dram_tokens // config.block_tokens
        for id in range(groups):
            stored, evicted = partial(index.stored, id), partial(index.evicted, id)
            pool = BlockPool(dram_blocks, stored, evicted, config.prefill.eviction)
            instance = PrefillInstance(
                id,
                cost,
                self.make_engine(cost),
                pool,
                self.make_ssd(pool, cost),
                config.block_tokens,
                chunk_tokens,
                self.begin_handover,
                self.prefilled,
            )
            self.prefill.append(instance)
        if config.prefill.replicate_keys:
            self.replicator = Replicator(
                self.prefill,
                index,
                self.messenger,
                config.prefill.replicate_keys,
                config.prefill.replicate_every_s,
                config.block_tokens,
            )
        tbt_slo_s = config.slo.tbt_s if admission.is_rechecking else None
        for id in range(config.decode_instances):
            batch_max = config.decode.batch_max
            engine = self.make_engine(cost)
            self.decode.append(
                DecodeInstance(id, cost, engine, capacity, batch_max, tbt_slo_s, self.ended)
            )
        self.conductor = Conductor(
            cost,
            make_scheduling(config.conductor, cost, config.seed),
            admission,
            self.prefill,
            self.decode,
            index,
            self.transport,
            config.block_tokens,
            capacity,
            self.make_reports(cost, self.prefill, self.decode),
        )

    def make_ssd(self, pool: BlockPool, cost: CostModel) -> SsdTier | None:
        config, width = self.config, self.config.prefill.nodes_per_group
        blocks = width * config.prefill.ssd_tokens // config.block_tokens
        if not blocks:
            return None
        block_bytes = cost.kv_bytes(config.block_tokens)
        return SsdTier(pool, blocks, block_bytes, width * self.profile.ssd_bytes_per_s)

    def build_colocated(self) -> None:
        config, profile = self.config, self.profile
        caching = config.colocated.prefix_caching
        cost = CostModel(profile, is_reuse_on_device=True, is_prefix_caching=caching)
        count = config.colocated_instances
        index = PrefixIndex(count)
        capacity = config.colocated.device_tokens or profile.device_kv_tokens
        blocks = capacity // config.block_tokens
        for id in range(count):
            stored, evicted = partial(index.stored, id), partial(index.evicted, id)
            settings = config.colocated
            pool = BlockPool(blocks, stored, evicted, settings.eviction)
            engine = self.make_engine(cost)
            self.colocated.append(
                ColocatedInstance(id, cost, engine, pool, config.block_tokens, settings, self.ended)
            )
        self.conductor = Conductor(
            cost,
            make_scheduling(config.conductor, cost, config.seed),
            make_admission(config.conductor, config.slo, cost),
            self.colocated,
            self.colocated,
            index,
            None,
            config.block_tokens,
            blocks * config.block_tokens,
            self.make_reports(cost, self.colocated, self.colocated),
        )

    def make_reports(
        self, cost: CostModel, prefill: Sequence[Queueing], decode: Sequence[Decoding]
    ) -> LoadReports | None:
        every_s = self.config.conductor.report_every_s
        if not every_s:
            return None
        return LoadReports(every_s, cost, prefill, decode, bool(self.colocated))

    def make_engine(self, cost: CostModel) -> ModelledEngine:
        engine = ModelledEngine(cost, self.steps_max)
        self.engines.append(engine)
        return engine

    @property
    def instances(self) -> list[PrefillInstance | DecodeInstance | ColocatedInstance]:
        return [*self.prefill, *self.decode, *self.colocated]

    async def run(self, started: Callable[[], Any] | None = None) -> None:
        """Serve until cancelled: the one TaskGroup of the cluster."""
        async with asyncio.TaskGroup() as group:
            for instance in self.instances:
                group.create_task(instance.run(), name=instance.name)
            group.create_task(
                self.samples.run([*map(self.sampled, self.instances)]), name="samples"
            )
            if self.conductor.reports is not None:
                group.create_task(self.conductor.reports.run(), name="load reports")
            if self.replicator is not None:
                group.create_task(self.replicator.run(), name="replicator")
            if started is not None:
                started()

    # ---- a request's way ---------------------------------------------------------------------

    def submit(self, request: Request) -> Rejected | None:
        """Let a request in now, or not; how it ends is told to its sink and to `on_end`."""
        now_s = self.loop.time()
        if self.replicator is not None:
            self.replicator.asked_for(request)
        decision = self.conductor.decide(request, self.in_flight.values(), now_s)
        self.in_flight[request.id] = request
        if isinstance(decision, Rejected):
            request.status, request.reason = "rejected", decision.reason
            self.ended(request)
            return decision
        request.timeline.placed_s = now_s
        if self.colocated:
            instance = self.colocated[decision.prefill]
            request.prefill = request.decode = instance.name
            instance.accept(request, decision.reused_tokens)
        else:
            self.dispatch(request, decision)
        return None

    def dispatch(self, request: Request, placement: Placement) -> None:
        """Queue at the prefill instance, expect at the decode instance, fetch what was chosen."""
        prefill, decode = self.prefill[placement.prefill], self.decode[placement.decode]
        request.prefill, request.decode = prefill.name, decode.name
        decode.expect(request)
        queued = prefill.accept(request, placement)
        if not queued.is_fetching:
            request.timeline.fetched_s = request.timeline.placed_s
        if placement.fetch is not None:
            self.fetch(queued, placement.fetch, prefill)

    def fetch(self, queued: Queued, best: Holder, prefill: PrefillInstance) -> None:
        """Copy the holder's longer prefix and keep it here too: the replication of hot blocks."""
        holder, request = self.prefill[best.id], queued.request
        depth, block_tokens = queued.pinned, self.config.block_tokens
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
        assert request.prefill is not None
        source, target = number(request.prefill), number(request.decode)
        node = self.config.prefill_groups + target
        arrived = partial(self.transferred, request, self.decode[target])
        return self.messenger.hand_over(request, source, node, prefill_s, arrived)

    def prefilled(self, request: Request, handover: Handover | None) -> None:
        """A prefill has ended: its only token, or the rest of the transfer, or nobody wants it."""
        if request.is_cancelled:
            if handover is not None:
                handover.cancel()
        elif handover is not None:
            handover.prefilled()
        else:
            self.decode[number(request.decode)].forget(request)
            stamps = request.timeline
            stamps.transferred_s = stamps.first_token_s = stamps.prefill_end_s
            stamps.finished_s = stamps.prefill_end_s
            request.produced_tokens = 1
            if request.sink is not None:
                request.sink.tokens(1)
            request.status = "finished"
            self.ended(request)

    def transferred(self, request: Request, decode: DecodeInstance) -> None:
        """All KV is at the decode instance."""
        if not request.has_ended:
            request.timeline.transferred_s = self.loop.time()
            decode.join(request)

    def cancel(self, request: Request, reason: str = "client disconnected") -> None:
        """Nobody waits for this request any more: it ends now, what it holds is freed at the next
        boundary of whatever computes for it."""
        if request.has_ended:
            return
        request.is_cancelled = True
        request.status, request.reason = "failed", reason
        if request.decode is not None:
            if self.colocated:
                self.colocated[number(request.decode)].cancel(request)
            else:
                self.decode[number(request.decode)].cancel(request)
                self.prefill[number(request.prefill)].changed.set()
        self.ended(request)

    def ended(self, request: Request) -> None:
        """Finished, rejected or failed: the last that happens to a request."""
        del self.in_flight[request.id]
        if request.status == "finished":
            self.conductor.learn(request)
        if request.timeline.finished_s is None:
            request.timeline.finished_s = self.loop.time()
        self.counts[request.status] += 1
        if request.sink is not None:
            request.sink.ended(request)
        self.on_end(request)

    # ---- looking at it -----------------------------------------------------------------------

    def sampled(self, instance: Any) -> Any:
        return InstanceSample(self, instance)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books of any part do not balance."""
        for instance in self.instances:
            instance.check_integrity()
        # The bytes of a request that has failed may still be on their way.
        replicating = self.replicator is not None and self.replicator.under_way
        if not (self.in_flight or self.colocated or self.counts["failed"] or replicating):
            busy = [link for link in self.transport.sending if link.flows]
            assert not busy, f"{len(busy)} links carry bytes of nobody"


class InstanceSample:
    """One instance as a row of SAMPLE_COLUMNS."""

    def __init__(
        self, cluster: Cluster, instance: PrefillInstance | DecodeInstance | ColocatedInstance
    ) -> None:
        self.cluster = cluster
        self.instance = instance

    def sample(self, now_s: float) -> tuple[Any, ...]:
        slo, one = self.cluster.config.slo, self.instance
        if isinstance(one, PrefillInstance):
            pool = one.pool
            load = one.queue_s(now_s) / slo.ttft_s
            running = int(one.running is not None)
            link = self.cluster.transport.sent_bytes_per_s(one.id)
            used, size = pool.used, pool.capacity
            return now_s, one.name, "prefill", load, len(one.queue), running, 0, used, size, link
        batch = one.batch
        context = batch.context_tokens_at(now_s, one.cost)
        load = one.cost.step_s(batch.size, context) / slo.tbt_s if batch.size else 0.0
        waiting = len(one.waiting)
        if isinstance(one, DecodeInstance):
            size = one.capacity_tokens // self.cluster.config.block_tokens
            used = batch.kv_tokens // self.cluster.config.block_tokens
            role, running = "decode", batch.size
        else:
            load = max(load, one.queue_s(now_s) / slo.ttft_s)
            size, used = one.pool.capacity, one.pool.used
            role, running = "colocated", batch.size + len(one.started)
        return now_s, one.name, role, load, waiting, running, context, used, size, 0.0


def number(name: str | None) -> int:
    """The id in an instance's name, `decode-3`."""
    assert name is not None
    return int(name.rsplit("-", 1)[1])
