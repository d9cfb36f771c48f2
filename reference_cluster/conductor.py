"""Where does a request go, and is it let in? The only caller of scheduling and admission."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Protocol

from reference_cluster.blocks import reusable_tokens
from reference_cluster.cost_model import CostModel
from reference_cluster.kvpool.index import Prefixes, PrefixIndex
from reference_cluster.policies.admission import Admission, Rejected
from reference_cluster.policies.scheduling import Placement, Scheduling
from reference_cluster.policies.view import LOST_TOKENS, ClusterView, Holder, PrefillViews, ids
from reference_cluster.reports import Decoding, LoadReports, Loads, Queueing
from reference_cluster.request import Request
from reference_cluster.transports.base import Links

FORGETTING = 0.02  # Share of the newest in the learned mean decode time.


class Prefilling(Queueing, Protocol):
    """What the Conductor asks of an instance that can prefill."""

    id: int

    def follow_promises(self, index: PrefixIndex) -> None:
        """Tell this index from now on what it will have stored and has not."""

    @property
    def tiered_blocks(self) -> int | None:
        """With SSD below its DRAM: how many blocks of a prompt can be in DRAM; else None."""

    def read_s(self, request: Request, held_blocks: int, now_s: float) -> float:
        """Seconds until all of a prompt's first blocks could be in DRAM."""


class Conductor:
    """Looks at all instances, lets the policies decide, and writes down what they predicted."""

    def __init__(
        self,
        cost: CostModel,
        scheduling: Scheduling,
        admission: Admission,
        prefill: Sequence[Prefilling],
        decode: Sequence[Decoding],
        index: PrefixIndex,
        transport: Links | None,
        block_tokens: int,
        capacity_tokens: int,
        reports: LoadReports | None = None,
    ) -> None:
        self.cost = cost
        self.scheduling = scheduling
        self.admission = admission
        self.prefill = prefill
        self.decode = decode
        self.index = index
        self.transport = transport
        self.block_tokens = block_tokens
        self.capacity_tokens = capacity_tokens
        self.reports = reports  # None: every load is known as it is now.
        self.loads = reports or Loads(cost, prefill, decode)
        self.tiered_blocks = prefill[0].tiered_blocks
        for one in prefill:
            one.follow_promises(index)
        self.decode_s: float | None = None

    def follow(self, id: int, now_s: float) -> None:
        """The instances of this number are others than before, or may be used again."""
        if id < len(self.prefill):
            self.prefill[id].follow_promises(self.index)
        self.loads.follow(id, now_s)

    def decide(
        self, request: Request, in_flight: Collection[Request], now_s: float
    ) -> Placement | Rejected:
        """Place the request, unless it cannot or should not be served."""
        if request.kv_tokens > self.capacity_tokens:
            return Rejected("too-large", 0.0)
        view = self.view(request, in_flight, now_s)
        placement = self.scheduling.place(request, view)
        if (
            placement.ttft_s == float("inf")
            or view.decode.free_tokens[placement.decode] == LOST_TOKENS
        ):
            return Rejected("no-instance", 1.0)
        request.predicted_ttft_s, request.predicted_tbt_s = placement.ttft_s, placement.tbt_s
        rejected = self.admission.admit(request, placement, view)
        if not rejected:
            self.loads.placed(request, placement)
        return rejected or placement

    def view(self, request: Request, in_flight: Collection[Request], now_s: float) -> ClusterView:
        """Everything a policy may see: at `now_s`, but for loads that were reported before."""
        held = self.index.prefixes(request.blocks)
        request.prefix_replicas = replicas(held)
        queue_s, decode = self.loads.queues_s(now_s), self.loads.decoding(now_s)
        is_colocated = self.transport is None
        prefill = PrefillViews(queue_s, [])
        if is_colocated:
            prefill.context_tokens = decode.context_tokens + decode.expected_tokens
            decode.prefix = "colocated"
        holder = self.best_holder(request, held)
        if self.tiered_blocks is not None:
            held = at_most(self.tiered_blocks, held)  # All must come up to DRAM.
            read_s = partial(self.read_s, request, held, now_s)
            prefill.read_s = read_s
            if holder is not None:
                holder.read_s = read_s(holder.id)
        prefill.reused = [
            (reusable_tokens(blocks, request.input_tokens, self.block_tokens), instances)
            for blocks, instances in self.index.promising(held, request.blocks)
        ]
        return ClusterView(now_s, prefill, decode, holder, is_colocated, in_flight, self.decode_s)

    def read_s(self, request: Request, held: Prefixes, now_s: float, id: int) -> float:
        """Seconds until what an instance has of the prompt on SSD could be in its DRAM."""
        blocks = next(blocks for blocks, instances in held if instances >> id & 1)
        return self.prefill[id].read_s(request, blocks, now_s)

    def learn(self, request: Request) -> None:
        """A request has finished: how long do decodes last? (A mean that forgets slowly.)"""
        stamps = request.timeline
        if request.output_tokens > 1 and stamps.finished_s and stamps.first_token_s:
            decode_s = stamps.finished_s - stamps.first_token_s
            before_s = decode_s if self.decode_s is None else self.decode_s
            self.decode_s = before_s + FORGETTING * (decode_s - before_s)

    def best_holder(self, request: Request, held: Prefixes) -> Holder | None:
        """FindBestPrefixMatch; of equals, whoever can send fastest. None if nobody could gain."""
        if self.transport is None or len(held) == 1:
            return None
        blocks, instances = held[-1]
        available = self.transport.available_bytes_per_s
        bytes_per_s, negative_id = max((available(int(id)), -int(id)) for id in ids(instances))
        tokens = reusable_tokens(blocks, request.input_tokens, self.block_tokens)
        return Holder(-negative_id, blocks, tokens, bytes_per_s)


def replicas(held: Prefixes) -> float | None:
    """How many instances hold a block of the longest prefix, on average over its blocks."""
    deepest = held[-1][0]
    if not deepest:
        return None
    return sum(depth * instances.bit_count() for depth, instances in held) / deepest


def at_most(blocks: int, held: Prefixes) -> Prefixes:
    """The same prefixes, cut to that many blocks."""
    return [(min(blocks, depth), instances) for depth, instances in held]
