"""What is the cluster, as a whole? Built from a config and run on either clock: start reading here.

`Cluster.submit` is a request's way in: the Conductor decides, the prefill instance computes, the
Messenger hands over, the decode instance goes on (README.md has the journey in eight steps).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from reference_cluster.conductor import Conductor
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.decode import DecodeLoad
from reference_cluster.inside import Inside, number
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.parts import Parts
from reference_cluster.policies.admission import Rejected, make_admission
from reference_cluster.policies.scheduling import Placement, make_scheduling
from reference_cluster.prefill import PrefillLoad
from reference_cluster.recovery import Recovery
from reference_cluster.replicator import Replicator
from reference_cluster.reports import Decoding, LoadReports, Queueing
from reference_cluster.request import OnEnd, Request
from reference_cluster.samples import Samples
from reference_cluster.servers import Servers
from reference_cluster.workers import Workers


class Cluster:
    """Conductor and instances, wherever these live. Make it inside a running event loop.

    Without `directory` everything is in this process; with it the instances are workers, which
    meet the Conductor there.
    """

    def __init__(
        self,
        config: ClusterConfig,
        profile: Profile,
        on_end: OnEnd,
        steps_max: int | None = None,
        directory: str | None = None,
    ) -> None:
        self.config = config
        self.profile = profile
        self.on_end = on_end
        self.directory = directory
        self.loop = asyncio.get_running_loop()
        self.samples = Samples(config.sample_every_s)
        self.counts: Counter[str] = Counter()
        self.in_flight: dict[int, Request] = {}
        self.lost: dict[str, None] = {}  # Names of instances.
        self.replicator: Replicator | None = None
        self.parts = parts = Parts(config, profile, steps_max)
        is_colocated = config.system == "colocated"
        self.index = PrefixIndex(
            config.colocated_instances if is_colocated else config.prefill_groups
        )
        self.house: Inside | Workers | Servers
        if directory is None:
            self.house = Inside(parts, self.index, self.ended)
        elif config.engine.kind == "vllm":
            self.house = Servers(parts, self.index, self.ended, directory, self)
        else:
            self.house = Workers(parts, self.index, self.ended, directory, self)
        make = self.house
        self.prefill: list[Any] = []
        self.decode: list[Any] = []
        self.colocated: list[Any] = []
        if is_colocated:
            self.colocated = [make.colocated(id) for id in range(config.colocated_instances)]
        else:
            self.prefill = [make.prefill(id) for id in range(config.prefill_groups)]
            self.decode = [make.decode(id) for id in range(config.decode_instances)]
        self.conductor = Conductor(
            parts.cost,
            make_scheduling(config.conductor, parts.cost, config.seed),
            make_admission(config.conductor, config.slo, parts.cost),
            self.prefill or self.colocated,
            self.decode or self.colocated,
            self.index,
            None if is_colocated else self.house.transport,
            config.block_tokens,
            parts.capacity_tokens,
            self.make_reports(self.prefill or self.colocated, self.decode or self.colocated),
        )
        self.recovery = Recovery(self, config)
        if config.prefill.replicate_keys and not is_colocated:
            self.replicator = Replicator(config.prefill, self.index, self.house.copy)

    def make_reports(
        self, prefill: Sequence[Queueing], decode: Sequence[Decoding]
    ) -> LoadReports | None:
        every_s = self.config.conductor.report_every_s
        if not every_s:
            return None
        return LoadReports(every_s, self.parts.cost, prefill, decode)

    @property
    def instances(self) -> list[Any]:
        return [*self.prefill, *self.decode, *self.colocated]

    @property
    def transport(self) -> Any:
        """The links between the nodes."""
        return self.house.transport

    async def run(self, started: Callable[[], Any] | None = None) -> None:
        """Serve until cancelled: the one TaskGroup of the cluster."""
        async with asyncio.TaskGroup() as group:
            self.house.start(group)
            rows = [InstanceSample(self, one.name) for one in self.instances]
            group.create_task(self.samples.run([*rows]), name="samples")
            if self.conductor.reports is not None:
                group.create_task(self.conductor.reports.run(), name="load reports")
            if self.replicator is not None:
                group.create_task(self.replicator.run(), name="replicator")
            if started is not None:
                started()

    # ---- a request's way ---------------------------------------------------------------------

    def submit(self, request: Request) -> Rejected | None:
        """Let a request in now, or not; how it ends is told to its sink and to `on_end`."""
        if self.replicator is not None:
            self.replicator.asked_for(request)
        decision = self.conductor.decide(request, self.in_flight.values(), self.loop.time())
        self.in_flight[request.id] = request
        if isinstance(decision, Rejected):
            request.status, request.reason = "rejected", decision.reason
            self.ended(request)
            return decision
        self.dispatch(request, decision)
        return None

    def dispatch(self, request: Request, placement: Placement) -> None:
        """Expect at the decode instance, queue at the prefill instance: the rest is theirs."""
        request.timeline.placed_s = self.loop.time()
        if self.colocated:
            prefill = self.colocated[placement.prefill]
            request.prefill = request.decode = prefill.name
        else:
            prefill, decode = self.prefill[placement.prefill], self.decode[placement.decode]
            request.prefill, request.decode = prefill.name, decode.name
            decode.expect(request)
        prefill.accept(request, placement)

    def cancel(self, request: Request, reason: str = "client disconnected") -> None:
        """Nobody waits for this request any more: it ends now, what it holds is freed at the next
        boundary of whatever computes for it."""
        if request.has_ended:
            return
        attempt = self.recovery.attempts.get(request.id, request)
        attempt.status, attempt.reason = "failed", reason
        self.withdraw(attempt)
        self.ended(attempt)

    def withdraw(self, request: Request) -> None:
        """Whoever computes for it stops at its next boundary."""
        request.is_cancelled = True
        if request.decode is not None:
            if self.colocated:
                self.colocated[number(request.decode)].cancel(request)
            else:
                self.decode[number(request.decode)].cancel(request)
                self.prefill[number(request.prefill)].cancel(request)

    def ended(self, attempt: Request) -> None:
        """Finished, rejected or failed: the last that happens to a request."""
        del self.in_flight[attempt.id]
        request = self.recovery.settle(attempt)
        if request.status == "finished":
            self.conductor.learn(request)
        if request.timeline.finished_s is None:
            request.timeline.finished_s = self.loop.time()
        self.counts[request.status] += 1
        if request.sink is not None:
            request.sink.ended(request)
        self.on_end(request)

    # ---- losing instances --------------------------------------------------------------------

    def lose(self, name: str) -> None:
        """An instance ends at once, with all that it holds; its requests go on elsewhere, or end.

        It keeps its place, where nobody is sent until it joins again.
        """
        instances, id = self.place_of(name)
        if name in self.lost:
            return
        self.lost[name] = None
        gone = instances[id]
        gone.is_shunned = True
        self.house.drop(name, self.loop.time())
        gone.detach()
        if gone not in self.decode:
            self.index.cleared(id)
        instances[id] = fresh = self.house.make(name)
        fresh.is_shunned = True
        self.conductor.follow(id, self.loop.time())
        self.recovery.lost(name)

    def rejoin(self, name: str) -> None:
        """A lost instance is back, and knows nothing of before."""
        if name in self.lost:
            del self.lost[name]
            self.house.begin(name)
            self.shun(name, False)
            self.recovery.joined()

    def shun(self, name: str, is_shunned: bool) -> None:
        """Send nobody there any more, or again; what is there stays."""
        instances, id = self.place_of(name)
        if name not in self.lost and instances[id].is_shunned != is_shunned:
            instances[id].is_shunned = is_shunned
            self.conductor.follow(id, self.loop.time())

    def broken(self, id: int, reason: str) -> None:
        """Something that a request needs has failed, though its instances live."""
        self.recovery.broken(id, reason)

    def place_of(self, name: str) -> tuple[list[Any], int]:
        """The list of its kind, and its position there."""
        of_role = {"prefill": self.prefill, "decode": self.decode, "colocated": self.colocated}
        return of_role[name.rsplit("-", 1)[0]], number(name)

    # ---- looking at it -----------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError where the books of any part do not balance."""
        # The bytes of a request that has failed may still be on their way.
        replicating = self.replicator is not None and self.replicator.under_way
        given_up = self.counts["failed"] or self.recovery.counts
        self.house.check_integrity(not (self.in_flight or given_up or replicating))


class InstanceSample:
    """One instance as a row of SAMPLE_COLUMNS."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.instances, self.id = cluster.place_of(name)

    def sample(self, now_s: float) -> tuple[Any, ...]:
        slo, one = self.cluster.config.slo, self.instances[self.id]
        if isinstance(one, PrefillLoad):
            pool = one.pool
            load = 0.0 if one.is_shunned else one.queue_s(now_s) / slo.ttft_s
            running = int(one.running is not None)
            link = self.cluster.transport.sent_bytes_per_s(one.id)
            row = now_s, one.name, "prefill", load, len(one.queue), running, 0
            return *row, pool.used, pool.capacity, link, pool.evictions
        batch = one.batch
        context = batch.context_tokens_at(now_s, one.cost)
        load = one.cost.step_s(batch.size, context) / slo.tbt_s if batch.size else 0.0
        waiting, evicted = len(one.waiting), None
        if isinstance(one, DecodeLoad):
            size = one.capacity_tokens // self.cluster.config.block_tokens
            used = batch.kv_tokens // self.cluster.config.block_tokens
            role, running = "decode", batch.size
        else:
            if not one.is_shunned:
                load = max(load, one.queue_s(now_s) / slo.ttft_s)
            size, used, evicted = one.pool.capacity, one.pool.used, one.pool.evictions
            role, running = "colocated", batch.size + len(one.started)
        return now_s, one.name, role, load, waiting, running, context, used, size, 0.0, evicted
