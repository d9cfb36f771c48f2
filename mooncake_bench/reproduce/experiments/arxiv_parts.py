"""arXiv 2407.00079: eviction, storing the KVCache, scheduling. Table 1, Figures 7 and 8."""

from __future__ import annotations

from mooncake_bench.reproduce.experiment import Experiment, Published, Values
from mooncake_bench.reproduce.experiments.settings import (
    CONVERSATION,
    LLAMA2,
    REAL,
    STRATEGIES,
)
from mooncake_bench.reproduce.outcome import (
    Check,
    Outcome,
    Picture,
    Series,
    claim,
    number,
    share,
)
from mooncake_bench.reproduce.plan import ClusterRun, PoolRun, Workload

# ---- Table 1 -----------------------------------------------------------------------------------

CAPACITY_BLOCKS = (100_000, 50_000, 30_000, 10_000, 1_000)
EVICTIONS = {"lru": "LRU", "lfu": "LFU", "length-aware": "LengthAware"}
POOLS = {"the paper's workload": REAL, "conversation": CONVERSATION}


def judge_table1(values: Values, published: Published) -> Outcome:
    checks: list[Check] = []
    pictures = []
    for workload in POOLS:
        series = []
        for eviction, label in EVICTIONS.items():
            rows = values[f"{label}, {workload}"]["capacity_token_block_ratio"]
            ours = {capacity or 0: ratio for capacity, _, ratio in rows}
            theirs = dict(published[eviction]) if workload != "conversation" else {}
            for capacity, ratio in ours.items():
                size = f"{capacity:,} blocks" if capacity else "no bound"
                checks.append(share(f"{label}, {workload}, {size}", theirs.get(capacity), ratio))
            series.append(
                Series(
                    label,
                    "disaggregated",
                    [(x, y) for x, y in theirs.items() if x],
                    [(x, y) for x, y in ours.items() if x],
                )
            )
        pictures.append(
            Picture(
                f"Block hits by capacity: {workload}",
                series,
                "capacity (512-token blocks)",
                "blocks hit",
                is_log_x=True,
                is_share=True,
            )
        )
    note = (
        "The paper's trace of this table is not to be had without its file mooncake_trace.jsonl; "
        "hit rates of another trace differ for reasons that no policy can mend."
    )
    return Outcome(pictures, checks, [note])


# ---- Figure 7 ----------------------------------------------------------------------------------

LENGTHS = (8_000, 16_000, 32_000, 64_000, 128_000)
STORING = {"serialized": False, "layer-wise": True}


def alone(tokens: int) -> Workload:
    """Requests so far apart that each has the cluster for itself."""
    return Workload(
        f"poisson-16k:input_tokens={tokens},output_tokens=2,shared=0.001,rate_rps=0.001,duration_s=5000"
    )


def judge_fig7(values: Values, published: Published) -> Outcome:
    checks: list[Check] = []
    series = []
    for name in STORING:
        theirs = dict(published[name])
        ours = [
            (tokens, values[f"{name}, {tokens}"]["summary"]["stages_s"]["transfer"])
            for tokens in LENGTHS
        ]
        for tokens, seconds in ours:
            checks.append(number(f"{name}, {tokens // 1000}k", theirs[tokens], seconds, "s"))
        colour = "disaggregated" if STORING[name] else "colocated"
        series.append(Series(name, colour, published[name], ours))
    hidden = [
        1 - layerwise[-1][1] / serialized[-1][1]
        for serialized, layerwise in (
            (series[0].published, series[1].published),
            (series[0].ours, series[1].ours),
        )
    ]
    checks.append(share("of it hidden layer by layer, 128k", *hidden))
    picture = Picture(
        "From the end of the prefill to the last byte", series, "prompt (tokens)", "seconds"
    )
    note = (
        "The paper's times hold about 0.1 s at every length, also layer-wise, which ours has not: "
        "ours counts from the end of the prefill to the last byte's arrival at the decode "
        "instance. Beyond that constant the paper's serialized points rise by 6.3 us a token, "
        "that is 52 GB/s for this model's 327,680 bytes a token; our profile's link has 100 GB/s."
    )
    return Outcome([picture], checks, [note])


# ---- Figure 8 ----------------------------------------------------------------------------------


FIG8_SPEED = 2.0


def judge_fig8(values: Values, published: Published) -> Outcome:
    ours = {name: values[name]["summary"]["ttft_s"]["mean"] for name in STRATEGIES}
    theirs = {name: published[name]["mean"] for name in STRATEGIES}
    checks = [
        number(f"{label}, mean TTFT", theirs[name], ours[name], "s")
        for name, label in STRATEGIES.items()
    ]
    means = list(ours.values())
    checks.append(
        claim("random > load balancing > cache-aware > KVCache-centric", means == sorted(means))
    )
    best = "kvcache-centric"
    checks += [
        number(
            f"{label} over KVCache-centric, times",
            theirs[name] / theirs[best],
            ours[name] / ours[best],
        )
        for name, label in STRATEGIES.items()
        if name != best
    ]
    bars = Series(
        "mean TTFT",
        "disaggregated",
        [(label, theirs[name]) for name, label in STRATEGIES.items()],
        [(label, ours[name]) for name, label in STRATEGIES.items()],
    )
    picture = Picture("Mean TTFT by scheduling", [bars], y="seconds", is_bars=True, is_log_y=True)
    note = (
        "How fast the paper replayed its trace for this figure is not printed. Means of seconds "
        "to minutes say that it was near or over what eight prefill instances can do, where the "
        "mean depends on the pace more than on anything else (with the generator, KVCache-centric: "
        "0.5 s at 1x, 1.2 s at 2x, 2.9 s at 2.2x, 8.0 s at 2.4x). What compares is the order."
    )
    return Outcome([picture], checks, [note])


EXPERIMENTS = (
    Experiment(
        "arxiv-table1",
        "arXiv Table 1: hit rate by eviction policy and capacity",
        "All requests in order through one global pool of so many 512-token blocks.",
        {
            f"{label}, {name}": PoolRun(workload, eviction, (None, *CAPACITY_BLOCKS))  # type: ignore[arg-type]
            for name, workload in POOLS.items()
            for eviction, label in EVICTIONS.items()
        },
        judge_table1,
    ),
    Experiment(
        "arxiv-fig7",
        "arXiv Figure 7: storing the KVCache, serialized and layer by layer",
        f"Single requests through 1 prefill and 1 decode instance, profile {LLAMA2}.",
        {
            f"{name}, {tokens}": ClusterRun(
                alone(tokens),
                {
                    "profile": LLAMA2,
                    "prefill_instances": 1,
                    "decode_instances": 1,
                    "prefill.layerwise": is_layerwise,
                },
            )
            for name, is_layerwise in STORING.items()
            for tokens in LENGTHS
        },
        judge_fig7,
    ),
    Experiment(
        "arxiv-fig8",
        "arXiv Figure 8: TTFT of four scheduling strategies",
        f"8 prefill and 8 decode instances, profile {LLAMA2}, {FIG8_SPEED:g} times the trace's "
        "pace as in the paper's Table 3; only the strategy differs.",
        {
            name: ClusterRun(
                REAL, {"profile": LLAMA2, "conductor.scheduling": name}, speed=FIG8_SPEED
            )
            for name in STRATEGIES
        },
        judge_fig8,
    ),
)
