"""What kind of load is a trace? Rates, lengths, and how much of it a prefix cache could reuse."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from workloads.model import Ints, Trace, flat_codes
from workloads.transform import bucket_width_s, sessions

QUANTILES = (0.5, 0.9, 0.99)
# The capacities (tokens) at which Mooncake's hit rates were published (FAST'25, Fig. 9).
CAPACITIES_TOKENS = (10**5, 10**6, 2 * 10**6, 4 * 10**6, 5 * 10**6, 8 * 10**6, 10**7, 5 * 10**7)


def describe(trace: Trace) -> dict[str, Any]:
    """What `trace info` prints: a JSON-ready dict; seconds, tokens, blocks, shares of 1."""
    arrival_s = trace.frame["arrival_s"].to_numpy()
    codes, starts = flat_codes(trace)
    return {
        "name": trace.name,
        "sha256": trace.sha256,
        "block_tokens": trace.block_tokens,
        "jittered": trace.jittered,
        "transforms": list(trace.transforms),
        "requests": trace.frame.height,
        "first_arrival_s": float(arrival_s[0]),
        "duration_s": trace.duration_s,
        "rate_rps": trace.rate_rps,
        "timestamp_bucket_s": bucket_width_s(arrival_s),
        "distinct_timestamps": len(np.unique(arrival_s)),
        "requests_at_once_max": int(np.unique(arrival_s, return_counts=True)[1].max()),
        "input_tokens": length_quantiles(trace, "input_tokens"),
        "output_tokens": length_quantiles(trace, "output_tokens"),
        "blocks": len(codes),
        "blocks_unique": int(codes.max()) + 1,
        "blocks_used_once_share": used_once_share(trace),
        "prefix_is_chained": is_chained(codes, starts),
        "sessions": int(sessions(trace).max()) + 1,
        "prefix_hit_ceiling": prefix_hit_ratio(trace, None),
        "prefix_hit_lru": {
            str(capacity): prefix_hit_ratio(trace, capacity) for capacity in CAPACITIES_TOKENS
        },
    }


def length_quantiles(trace: Trace, column: str) -> dict[str, float]:
    """Mean, min, p50, p90, p99 and max of a column of tokens."""
    values = trace.frame[column].to_numpy()
    result = {"mean": float(values.mean()), "min": float(values.min())}
    for quantile, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True):
        result[f"p{quantile * 100:.0f}"] = float(value)
    return result | {"max": float(values.max())}


def used_once_share(trace: Trace) -> float:
    """Share of all different blocks that a single request uses."""
    codes, _ = flat_codes(trace)
    return float(np.mean(np.bincount(codes) == 1))


def is_chained(codes: Ints, starts: Ints) -> bool:
    """Does each id stand for its whole prefix: one position, one predecessor?"""
    previous = np.concatenate(([-1], codes[:-1]))
    previous[starts[:-1]] = -1
    pairs = np.unique(np.stack((codes, previous), axis=1), axis=0)
    return len(pairs) == int(codes.max()) + 1


def prefix_hit_ratio(trace: Trace, capacity_tokens: int | None) -> float:
    """Share of input tokens that one LRU cache of so many tokens would hold (None: endless).

    Requests come one by one, each an instant's work; a hit is a block all of whose predecessors
    in the request are hits too. Partial last blocks take a whole block of capacity.
    """
    input_tokens: list[int] = trace.frame["input_tokens"].to_list()
    codes, starts = flat_codes(trace)
    ends = starts[1:].tolist()
    hits = prefix_hits(codes.tolist(), ends, _capacity_blocks(trace, capacity_tokens))
    reused = sum(
        min(hit * trace.block_tokens, tokens)
        for hit, tokens in zip(hits, input_tokens, strict=True)
    )
    return reused / sum(input_tokens)


def _capacity_blocks(trace: Trace, capacity_tokens: int | None) -> int | None:
    """Whole blocks in so many tokens."""
    return None if capacity_tokens is None else capacity_tokens // trace.block_tokens


def prefix_hits(
    codes: Sequence[int], ends: Sequence[int], capacity_blocks: int | None
) -> list[int]:
    """Blocks of reused prefix of each request, with an LRU cache of so many blocks."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits: list[int] = []
    start = 0
    for end in ends:
        request = codes[start:end]
        start = end
        reused = 0
        for block in request:
            if block not in cache:
                break
            reused += 1
        hits.append(reused)
        # Deepest first, so that a prefix is never evicted before what builds on it.
        for block in reversed(request):
            cache[block] = None
            cache.move_to_end(block)
        if capacity_blocks is not None:
            for _ in range(len(cache) - capacity_blocks):
                cache.popitem(last=False)
    return hits


def reuse(trace: Trace, looked_at: int = 20_000, points: int = 200) -> pl.DataFrame:
    """How the uses of blocks lie apart: distance_blocks, share (of all uses, first ones too).

    The distance of a use is the number of different blocks used since the last use of the same
    one: an LRU cache of more blocks has it. Of a trace with more than `looked_at` uses an even
    share of the blocks is followed and their distances scaled up (SHARDS with its adjustment,
    Waldspurger et al., FAST '15).
    """
    codes, _ = flat_codes(trace)
    share = min(1.0, looked_at / max(len(codes), 1))
    # Fibonacci hashing: which blocks are followed has nothing to do with when they came.
    hashes = codes.astype(np.uint64) * np.uint64(11400714819323198485)
    followed = codes[(hashes >> np.uint64(40)) < np.uint64(round(share * 2**24))]
    distances = np.sort(stack_distances(followed.tolist())) / share
    # A block of half of all requests is followed or not: the uses that are too many or too few for
    # the share are such, and near.
    missing = round(len(codes) * share) - len(followed)
    distances = np.concatenate([np.zeros(max(missing, 0)), distances[max(-missing, 0) :]])
    ranks = np.unique(np.linspace(0, len(distances) - 1, min(points, len(distances))).astype(int))
    return pl.DataFrame(
        {
            "distance_blocks": distances[ranks],
            "share": (ranks + 1) / max(len(followed) + missing, 1),
        },
        schema={"distance_blocks": pl.Float64, "share": pl.Float64},
    )


def stack_distances(codes: Sequence[int]) -> Ints:
    """Of each use but the first of a code: how many different codes came since its last use."""
    last: dict[int, int] = {}
    times: list[int] = []  # Of the last use of every code, rising.
    distances = []
    for time, code in enumerate(codes):
        before = last.get(code)
        if before is not None:
            at = bisect_left(times, before)
            distances.append(len(times) - at - 1)
            del times[at]
        last[code] = time
        times.append(time)
    return np.array(distances, dtype=np.int64)


def session_sizes(trace: Trace) -> dict[int, int]:
    """How many sessions have how many requests: {requests: sessions}, by size."""
    return dict(sorted(Counter(np.bincount(sessions(trace)).tolist()).items()))
