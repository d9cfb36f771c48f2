"""Does the Conductor decide as if it looked at every instance one by one? It looks at columns."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_cluster.blocks import reusable_tokens
from reference_cluster.cluster import Cluster
from reference_cluster.conductor import Conductor, replicas
from reference_cluster.config import Batching, Eviction, Scheduling
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.policies.admission import Rejected
from reference_cluster.policies.scheduling import Placement
from reference_cluster.policies.view import DecodeView, Holder, PrefillView, ids, spread
from reference_cluster.request import Request
from reference_cluster.simulate import sleep_until
from tests.reference_cluster.small import ROUGH, SMALL, a_config, random_requests, with_cluster


class OneByOne:
    """Algorithm 1 and the other policies as they are written: every instance is asked in turn."""

    def __init__(self, cluster: Cluster) -> None:
        self.conductor: Conductor = cluster.conductor
        self.config = cluster.config.conductor
        self.cost = cluster.conductor.cost
        self.rng = random.Random(cluster.config.seed)

    def place(self, request: Request, now_s: float) -> Placement:
        one = self.conductor
        held = one.index.match(request.blocks)
        prefill = [self.prefill_view(request, id, held[id], now_s) for id in range(len(held))]
        decode = [self.decode_view(id, now_s) for id in range(len(one.decode))]
        if one.transport is None:
            for view in prefill:
                view.context_tokens = decode[view.id].context_tokens
                view.context_tokens += decode[view.id].expected_tokens
        holder = self.best_holder(request, held)
        if holder is not None:
            holder.read_s = prefill[holder.id].read_s
        chosen, ttft_s, fetch = self.choose(request, prefill, holder)
        reused = fetch.tokens if fetch else chosen.reused_tokens
        target = decode[chosen.id] if one.transport is None else self.least_step(request, decode)
        context_tokens = target.context_tokens + request.input_tokens
        tbt_s = self.cost.step_s(target.batch + 1, context_tokens)
        return Placement(chosen.id, target.id, ttft_s, tbt_s, reused, fetch)

    def prefill_view(self, request: Request, id: int, held: int, now_s: float) -> PrefillView:
        one: Any = self.conductor.prefill[id]
        read_s, blocks = 0.0, request.blocks
        if getattr(one, "ssd", None) is not None:
            held = min(held, one.pool.capacity)
            read_s = one.ssd.ready_s(blocks[:held], now_s) - now_s
        promised = getattr(one, "promised", {})
        while held < len(blocks) and blocks[held] in promised:
            held += 1
        reports = self.conductor.reports
        queue_s = one.queue_s(now_s) if reports is None else float(reports.queued_s[id])
        reused = reusable_tokens(held, request.input_tokens, self.conductor.block_tokens)
        return PrefillView(id, queue_s, reused, 0, read_s)

    def decode_view(self, id: int, now_s: float) -> DecodeView:
        if self.conductor.reports is None:
            return self.conductor.decode[id].decode_view(now_s)
        return self.conductor.reports.decoding(now_s)[id]

    def best_holder(self, request: Request, held: list[int]) -> Holder | None:
        one, best = self.conductor, max(held)
        if one.transport is None or best == min(held):
            return None
        speeds = [
            (one.transport.available_bytes_per_s(id), -id)
            for id, blocks in enumerate(held)
            if blocks == best
        ]
        bytes_per_s, negative_id = max(speeds)
        tokens = reusable_tokens(best, request.input_tokens, one.block_tokens)
        return Holder(-negative_id, best, tokens, bytes_per_s)

    def choose(
        self, request: Request, prefill: list[PrefillView], holder: Holder | None
    ) -> tuple[PrefillView, float, Holder | None]:
        name, threshold = self.config.scheduling, self.config.balancing_threshold
        if name in ("random", "least-loaded"):
            chosen = min(prefill, key=lambda view: (view.queue_s, view.context_tokens, view.id))
            if name == "random":
                chosen = self.rng.choice(prefill)
            return chosen, self.ttft_s(request, chosen, None), None
        options = []
        for view in prefill:
            fetch = None
            if holder is not None and holder.id != view.id and name == "kvcache-centric":
                fetch = holder if holder.tokens > threshold * view.reused_tokens else None
            ttft_s = self.ttft_s(request, view, fetch)
            options.append((ttft_s, view.context_tokens, view.id, fetch))
        ttft_s, _, id, fetch = min(options, key=lambda option: option[:3])
        return prefill[id], ttft_s, fetch

    def ttft_s(self, request: Request, view: PrefillView, fetch: Holder | None) -> float:
        start_s = max(view.queue_s, view.read_s)
        if fetch is None:
            return start_s + self.cost.prefill_s(request.input_tokens, view.reused_tokens)
        missing = fetch.tokens - view.reused_tokens
        transfer_s = fetch.read_s + self.cost.kv_bytes(missing) / fetch.bytes_per_s
        return transfer_s + start_s + self.cost.prefill_s(request.input_tokens, fetch.tokens)

    def least_step(self, request: Request, decode: list[DecodeView]) -> DecodeView:
        def rank(one: DecodeView) -> tuple[bool, float, int]:
            context_tokens = one.context_tokens + one.expected_tokens
            step_s = self.cost.step_s(one.batch + one.expected, context_tokens)
            return one.free_tokens < request.kv_tokens, step_s, one.id

        return min(decode, key=rank)


CLUSTERS = st.fixed_dictionaries(
    {
        "system": st.sampled_from(["disaggregated", "disaggregated", "colocated"]),
        "prefill_instances": st.sampled_from([2, 4, 6, 10]),
        "decode_instances": st.integers(1, 5),
        "colocated_instances": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "prefill": st.fixed_dictionaries(
            {
                "dram_tokens": st.sampled_from([100, 400, 2000, 100_000]),
                "ssd_tokens": st.sampled_from([0, 0, 300, 5000]),
                "nodes_per_group": st.sampled_from([1, 1, 2]),
                "eviction": st.sampled_from(get_args(Eviction)),
            }
        ),
        "decode": st.fixed_dictionaries({"device_tokens": st.sampled_from([700, 3000])}),
        "colocated": st.fixed_dictionaries(
            {
                "prefix_caching": st.booleans(),
                "batching": st.sampled_from(get_args(Batching)),
                "device_tokens": st.sampled_from([700, 3000]),
            }
        ),
        "conductor": st.fixed_dictionaries(
            {
                "scheduling": st.sampled_from([*get_args(Scheduling), *["kvcache-centric"] * 3]),
                "report_every_s": st.sampled_from([0.0, 0.0, 2.0]),
                "balancing_threshold": st.sampled_from([1.0, 1.3, 4.0]),
            }
        ),
    }
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    fields=CLUSTERS,
    seed=st.integers(0, 10**6),
    gap_s=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    ssd_bytes_per_s=st.sampled_from([1e4, 1e5]),
    profile=st.sampled_from([ROUGH, SMALL]),
)
def test_columns_decide_as_one_by_one(
    fields: dict[str, Any], seed: int, gap_s: float, ssd_bytes_per_s: float, profile: Any
) -> None:
    """60 requests, some cancelled, in any cluster: the same placement to the last bit."""
    requests = random_requests(seed, 60, gap_s or 1.0, families=3)
    profile = msgspec.structs.replace(profile, ssd_bytes_per_s=ssd_bytes_per_s)
    rng = random.Random(seed)

    async def script(cluster: Cluster) -> int:
        expected = OneByOne(cluster)
        decide, compared = cluster.conductor.decide, 0

        def compare(
            request: Request, in_flight: Collection[Request], now_s: float
        ) -> Placement | Rejected:
            nonlocal compared
            is_possible = request.kv_tokens <= cluster.conductor.capacity_tokens
            placement = expected.place(request, now_s) if is_possible else None
            decision = decide(request, in_flight, now_s)
            if isinstance(decision, Placement):
                assert decision == placement
                compared += 1
            return decision

        cluster.conductor.decide = compare  # type: ignore[method-assign]
        for request in requests:
            await sleep_until(request.timeline.arrived_s if gap_s else 0.0)
            cluster.submit(request)
            if rng.random() < 0.1:
                cluster.cancel(request)
        return compared

    assert with_cluster(a_config(**fields), script, profile) > 0


@settings(derandomize=True, deadline=None)
@given(sets=st.lists(st.integers(0, 2**70 - 1), min_size=1, max_size=6))
def test_a_value_for_each_set_of_instances_becomes_a_column(sets: list[int]) -> None:
    """Few instances and many are spread alike; the sets are made disjoint first."""
    left, values = 2**70 - 1, []
    for number, instances in enumerate(sets):
        values.append((float(number), instances & left))
        left &= ~instances
    values.append((-1.0, left))
    column = spread(values, 70)
    for value, instances in values:
        assert list(ids(instances)) == [id for id in range(70) if instances >> id & 1]
        assert all(column[id] == value for id in ids(instances))


def test_what_is_promised_counts_right_behind_what_is_held() -> None:
    """0 holds a and promises bc; 1 promises b alone, which follows nothing it has."""
    index = PrefixIndex(2)
    index.stored(0, "a")
    index.promised(0, "bc")
    index.promised(1, "b")
    held = index.prefixes("abcd")
    assert held == [(0, 0b10), (1, 0b01)]
    assert index.promising(held, "abcd") == [(0, 0b10), (3, 0b01)]
    index.settled(0, "bc")
    index.settled(1, "b")
    assert index.promising(held, "abcd") == held
    assert index.promises == {}


@pytest.mark.parametrize("instances", [3, 200])
def test_a_block_of_one_holder_shares_its_integer(instances: int) -> None:
    """However it came to be the only one."""
    index = PrefixIndex(instances)
    for id in range(instances):
        index.stored(id, "ab")
    assert index.holders["a"] is index.holders["b"]
    for id in range(instances - 1):
        index.evicted(id, "ab")
    assert index.holders["a"] is index.bits[-1]
    index.evicted(instances - 1, "ab")
    assert index.holders == {}


def test_replicas_are_counted_block_by_block() -> None:
    """Of 4 known blocks the first 2 are in 3 instances, the others in one: 2 on average."""
    assert replicas([(0, 0b10000), (2, 0b0110), (4, 0b1000)]) == (2 * 2 + 4) / 4
    assert replicas([(0, 0b111)]) is None
