"""Where does a request go? The four strategies that the Mooncake papers compare."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from reference_cluster.config import ConductorConfig
from reference_cluster.cost_model import CostModel
from reference_cluster.policies.view import ClusterView, DecodeView, Holder, PrefillView
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
        options = []
        holder = view.holder if self.is_fetching else None
        for instance in view.prefill:
            fetch = holder and self.worth_fetching(instance, holder)
            ttft_s = self.ttft_s(request, instance, fetch)
            # Ties (idle colocated instances) go to the emptiest, then to the lowest id, so that a
            # seed fixes the whole run.
            options.append((ttft_s, instance.context_tokens, instance.id, fetch))
        ttft_s, _, prefill, fetch = min(options)  # Ids differ, so that `fetch` is never compared.
        reused = fetch.tokens if fetch else view.prefill[prefill].reused_tokens
        return complete(request, view, self.cost, prefill, ttft_s, reused, fetch)

    def worth_fetching(self, instance: PrefillView, holder: Holder) -> Holder | None:
        """Algorithm 1: best_len / prefix_len over the threshold; x/0 is over, 0/0 is not."""
        if holder.id == instance.id:
            return None
        is_over = holder.tokens > self.balancing_threshold * instance.reused_tokens
        return holder if is_over else None

    def ttft_s(self, request: Request, instance: PrefillView, fetch: Holder | None) -> float:
        """T_transfer + T_queue + T_prefill."""
        start_s = instance.queue_s
        if instance.read_s > start_s:
            start_s = instance.read_s
        if fetch is None:
            return start_s + self.cost.prefill_s(request.input_tokens, instance.reused_tokens)
        missing = fetch.tokens - instance.reused_tokens
        transfer_s = fetch.read_s + self.cost.kv_bytes(missing) / fetch.bytes_per_s
        prefill_s = self.cost.prefill_s(request.input_tokens, fetch.tokens)
        return transfer_s + start_s + prefill_s


class LocalCacheAware(KVCacheCentric):
    """Algorithm 1 without fetching: each instance counts on its own pool alone."""

    is_fetching = False


class LeastLoaded:
    """The shortest queue, whatever is cached where."""

    def __init__(self, cost: CostModel, config: ConductorConfig) -> None:
        self.cost = cost

    def place(self, request: Request, view: ClusterView) -> Placement:
        instance = min(view.prefill, key=lambda one: (one.queue_s, one.context_tokens, one.id))
        return here(request, view, self.cost, instance)


class Random:
    """Any prefill instance, each as likely."""

    def __init__(self, cost: CostModel, rng: random.Random) -> None:
        self.cost = cost
        self.rng = rng

    def place(self, request: Request, view: ClusterView) -> Placement:
        return here(request, view, self.cost, self.rng.choice(view.prefill))


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


def select_decode(request: Request, instances: list[DecodeView], cost: CostModel) -> DecodeView:
    """Least step time with all that is expected there too, among those with room if any have."""

    kv_tokens, step_s = request.kv_tokens, cost.step_s
    _, _, id = min(
        (
            one.free_tokens < kv_tokens,
            step_s(one.batch + one.expected, one.context_tokens + one.expected_tokens),
            one.id,
        )
        for one in instances
    )
    return instances[id]


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
