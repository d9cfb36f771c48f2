"""Where does a request go? The four strategies that the Mooncake papers compare."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from reference_cluster.config import ConductorConfig
from reference_cluster.cost_model import CostModel
from reference_cluster.policies.view import (
    LOST_TOKENS,
    ClusterView,
    DecodeView,
    DecodeViews,
    Floats,
    Holder,
    Ints,
    PrefillView,
    spread,
)
from reference_cluster.request import Request


@dataclass(slots=True)
class Placement:
    """Where a request goes and what it should see there."""

    prefill: int
    decode: int
    ttft_s: float  # Predicted from now.
    tbt_s: float  # Predicted for its first decode step, by what decodes there now.
    reused_tokens: int
    fetch: Holder | None = None  # Copy the prefix from there first, and keep it: replication.


class Scheduling(Protocol):
    """Chooses the instances for one request; the only state a policy may have is its own random."""

    def place(self, request: Request, view: ClusterView) -> Placement: ...


class KVCacheCentric:
    """Weigh queueing, reuse and fetching on every prefill instance (Mooncake, Algorithm 1)."""

    is_fetching = True

    def __init__(self, cost: CostModel, config: ConductorConfig) -> None:
        self.cost = cost
        self.balancing_threshold = config.balancing_threshold

    def place(self, request: Request, view: ClusterView) -> Placement:
        prefill = view.prefill
        ttft_s = self.ttft_s(request, view, prefill.queue_s)
        # Ties (idle colocated instances) go to the emptiest, then to the lowest id, so that a
        # seed fixes the whole run.
        chosen = least(ttft_s, prefill.context_tokens)
        if prefill.read_s is not None:
            # With no time for reading from SSD these were the least they can be: read the best
            # one's, until none that is still to be read could be better.
            start_s = prefill.queue_s.copy()
            known: dict[int, None] = {}
            while chosen not in known:
                known[chosen] = None
                start_s[chosen] = max(start_s[chosen], prefill.read_s(chosen))
                ttft_s = self.ttft_s(request, view, start_s)
                chosen = least(ttft_s, prefill.context_tokens)
        reused = prefill.reused_tokens(chosen)
        fetch = self.worth_fetching(view.holder, chosen, reused)
        if fetch is not None:
            reused = fetch.tokens
        return complete(request, view, self.cost, chosen, float(ttft_s[chosen]), reused, fetch)

    def worth_fetching(self, holder: Holder | None, id: int, reused_tokens: int) -> Holder | None:
        """Algorithm 1: best_len / prefix_len over the threshold; x/0 is over, 0/0 is not."""
        if holder is None or not self.is_fetching or holder.id == id:
            return None
        return holder if holder.tokens > self.balancing_threshold * reused_tokens else None

    def ttft_s(self, request: Request, view: ClusterView, start_s: Floats) -> Floats:
        """T_transfer + T_queue + T_prefill of every instance, which could start at `start_s`.

        The first and the last depend on what it could reuse alone, and are computed once for all
        instances that could reuse as much.
        """
        transfer_s, prefill_s = [], []
        is_fetching = False
        cost, input_tokens = self.cost, request.input_tokens
        for reused_tokens, instances in view.prefill.reused:
            fetch = self.worth_fetching(view.holder, -1, reused_tokens)
            if fetch is None:
                transfer_s.append((0.0, instances))
                prefill_s.append((cost.prefill_s(input_tokens, reused_tokens), instances))
                continue
            is_fetching = True
            if instances >> fetch.id & 1:  # It fetches nothing from itself.
                instances ^= 1 << fetch.id
                transfer_s.append((0.0, 1 << fetch.id))
                prefill_s.append((cost.prefill_s(input_tokens, reused_tokens), 1 << fetch.id))
                if not instances:
                    continue
            missing = fetch.tokens - reused_tokens
            moving_s = fetch.read_s + cost.kv_bytes(missing) / fetch.bytes_per_s
            transfer_s.append((moving_s, instances))
            prefill_s.append((cost.prefill_s(input_tokens, fetch.tokens), instances))
        count = len(start_s)
        if is_fetching:
            start_s = spread(transfer_s, count) + start_s
        return start_s + spread(prefill_s, count)


class LocalCacheAware(KVCacheCentric):
    """Algorithm 1 without fetching: each instance counts on its own pool alone."""

    is_fetching = False


class LeastLoaded:
    """The shortest queue, whatever is cached where."""

    def __init__(self, cost: CostModel, config: ConductorConfig) -> None:
        self.cost = cost

    def place(self, request: Request, view: ClusterView) -> Placement:
        chosen = least(view.prefill.queue_s, view.prefill.context_tokens)
        return here(request, view, self.cost, view.prefill[chosen])


class Random:
    """Any prefill instance, each as likely."""

    def __init__(self, cost: CostModel, rng: random.Random) -> None:
        self.cost = cost
        self.rng = rng

    def place(self, request: Request, view: ClusterView) -> Placement:
        there = np.flatnonzero(np.isfinite(view.prefill.queue_s))
        chosen = self.rng.choice(there if len(there) else range(len(view.prefill)))
        return here(request, view, self.cost, view.prefill[int(chosen)])


def here(request: Request, view: ClusterView, cost: CostModel, instance: PrefillView) -> Placement:
    """Placed on a chosen prefill instance, with what its own pool holds."""
    prefill_s = cost.prefill_s(request.input_tokens, instance.reused_tokens)
    ttft_s = max(instance.queue_s, instance.read_s) + prefill_s
    return complete(request, view, cost, instance.id, ttft_s, instance.reused_tokens, None)


def complete(
    request: Request,
    view: ClusterView,
    cost: CostModel,
    prefill: int,
    ttft_s: float,
    reused_tokens: int,
    fetch: Holder | None,
) -> Placement:
    """Add the decode instance: the one with the least predicted TBT that has room."""
    if view.is_colocated:
        decode = view.decode[prefill]
    else:
        decode = select_decode(request, view.decode, cost)
    tbt_s = cost.step_s(decode.batch + 1, decode.context_tokens + request.input_tokens)
    return Placement(prefill, decode.id, ttft_s, tbt_s, reused_tokens, fetch)


def select_decode(request: Request, instances: DecodeViews, cost: CostModel) -> DecodeView:
    """Least step time with all that is expected there too, among those with room if any have."""
    batch = instances.batch + instances.expected
    step_s = cost.steps_s(batch, instances.context_tokens + instances.expected_tokens)
    is_full = instances.free_tokens < request.kv_tokens
    if is_full.any():
        step_s[is_full if not is_full.all() else instances.free_tokens == LOST_TOKENS] = np.inf
    return instances[int(step_s.argmin())]


def least(first: Floats, second: Ints | None) -> int:
    """The row with the least of `first`, of equals that with the least of `second`, or the first
    of those."""
    chosen = int(first.argmin())
    if second is not None:
        equals = np.flatnonzero(first == first[chosen])
        chosen = int(equals[second[equals].argmin()])
    return chosen


def make_scheduling(config: ConductorConfig, cost: CostModel, seed: int) -> Scheduling:
    """The policy that the configuration names."""
    if config.scheduling == "random":
        return Random(cost, random.Random(seed))
    by_name: dict[str, Callable[[CostModel, ConductorConfig], Scheduling]] = {
        "least-loaded": LeastLoaded,
        "local-cache-aware": LocalCacheAware,
        "kvcache-centric": KVCacheCentric,
    }
    return by_name[config.scheduling](cost, config)
