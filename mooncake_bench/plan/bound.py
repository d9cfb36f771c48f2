"""How few nodes could a perfect system do with? Arithmetic on the trace, no simulation.

A perfect system has one endless cache that every node reads, never waits, never idles, spreads its
load evenly over the whole trace, and leaves out the dearest requests that the target allows it to
miss. No cluster needs fewer nodes (llm-d-autoscaling #1499 asks for this bound).
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from mooncake_bench.plan.candidate import Load
from mooncake_bench.plan.spec import Promise
from reference_cluster.cost_model import Profile
from workloads.model import Floats, Trace, flat_codes
from workloads.statistics import prefix_hits


class Bound(msgspec.Struct, frozen=True):
    """Nodes as real numbers, by role; shares of requests that even an idle node could serve."""

    prefill_nodes: float
    decode_nodes: float
    batch: int
    hit_ratio: float
    reachable: float
    within_ttft: float
    within_tbt: float
    fits_memory: float

    @property
    def nodes(self) -> int:
        """Whole nodes where each has one role."""
        return max(1, math.ceil(self.prefill_nodes)) + max(1, math.ceil(self.decode_nodes))

    def scaled(self, prefill: float, decode: float) -> Bound:
        """With all prefill and decode times longer by factors."""
        return msgspec.structs.replace(
            self,
            prefill_nodes=self.prefill_nodes * prefill,
            decode_nodes=self.decode_nodes * decode,
        )


class Demand:
    """A trace's requests as a perfect system sees them: lengths, and what it need not compute."""

    def __init__(self, trace: Trace) -> None:
        frame = trace.frame
        self.input = frame["input_tokens"].to_numpy().astype(np.float64)
        self.output = frame["output_tokens"].to_numpy().astype(np.float64)
        self.last_s = float(frame["arrival_s"][-1])
        codes, starts = flat_codes(trace)
        hits = np.array(prefix_hits(codes.tolist(), starts[1:].tolist(), None), dtype=np.float64)
        self.reused = np.minimum(hits * trace.block_tokens, self.input - 1)

    def bound(self, load: Load, profile: Profile, slo: Promise) -> Bound:
        """Nodes of the profile that could at best keep the promise for the target's share."""
        n, p, cost = self.input, self.reused, profile.prefill
        computing_s = cost.token_s * (n - p) + cost.token2_s * (n * n - p * p)
        prefill_s = cost.base_s + computing_s + cost.reused_token_s * p
        tokens = self.output - 1  # The first comes out of the prefill.
        context = n + self.output / 2
        decode = profile.decode
        alone_s = decode.base_s + decode.sequence_s + decode.context_token_s * context
        in_time, fluent = prefill_s <= slo.ttft_s, (alone_s <= slo.tbt_s) | (tokens < 1)
        fits = n + self.output <= profile.device_kv_tokens
        possible = in_time & fluent & fits
        kept = np.sort(prefill_s[possible])[: math.ceil(slo.target * len(n))]
        span_s = self.last_s / load.speed + slo.ttft_s
        batch, work_s = decoding(profile, slo, tokens[possible], context[possible], slo.target)
        return Bound(
            prefill_nodes=float(kept.sum()) / span_s,
            decode_nodes=work_s / (span_s + slo.tbt_s * float(tokens.mean())),
            batch=batch,
            hit_ratio=float(p.sum() / n.sum()),
            reachable=float(possible.mean()),
            within_ttft=float(in_time.mean()),
            within_tbt=float(fluent.mean()),
            fits_memory=float(fits.mean()),
        )


def decoding(
    profile: Profile, slo: Promise, tokens: Floats, context: Floats, target: float
) -> tuple[int, float]:
    """The largest even batch within TBT and device memory, and the seconds that all tokens take."""
    cost = profile.decode
    each_s = tokens * (cost.sequence_s + cost.context_token_s * context)
    order = np.argsort(each_s)[: math.ceil(target * len(tokens))]
    made, own_s = float(tokens[order].sum()), float(each_s[order].sum())
    if not made:
        return 1, 0.0
    mean_context = float((tokens[order] * context[order]).sum()) / made
    marginal_s = cost.sequence_s + cost.context_token_s * mean_context
    by_time = (slo.tbt_s - cost.base_s - profile.overheads.step_s) / marginal_s
    batch = max(1, math.floor(min(by_time, profile.device_kv_tokens / mean_context)))
    return batch, own_s + made / batch * (cost.base_s + profile.overheads.step_s)
