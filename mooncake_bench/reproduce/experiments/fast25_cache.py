"""FAST'25: what do pools hold, and what does that save? Figures 9, 10, 11 and 14."""

from __future__ import annotations

import msgspec

from mooncake_bench.reproduce.experiment import Experiment, Published, Values
from mooncake_bench.reproduce.experiments.settings import CONVERSATION, TOOLAGENT, mooncake
from mooncake_bench.reproduce.outcome import (
    Check,
    Outcome,
    Picture,
    Series,
    between,
    claim,
    exact,
    number,
    share,
    told,
)
from mooncake_bench.reproduce.plan import PoolRun
from reference_cluster.cost_model import CostModel, load_profile

BLOCK_TOKENS = 512

# ---- Figure 9 ----------------------------------------------------------------------------------

CAPACITY_TOKENS = (1e4, 1e5, 1e6, 2e6, 4e6, 5e6, 8e6, 1e7, 5e7, 1e8)


def judge_fig9(values: Values, published: Published) -> Outcome:
    rows = values["lru"]["capacity_token_block_ratio"]
    ours = {tokens: row[1] for tokens, row in zip(CAPACITY_TOKENS, rows, strict=False)}
    recounted = dict(published["recounted"])
    checks = [
        exact(f"hit ratio at {tokens / 1e6:g} M tokens, as recounted", there, ours[tokens], 0.005)
        for tokens, there in recounted.items()
    ]
    checks += [
        share(f"hit ratio at {tokens / 1e6:g} M tokens, as printed", there, ours[tokens])
        for tokens, there in published["conversation"]
        if tokens in ours
    ]
    series = [
        Series("as printed (finer blocks)", "external", published["conversation"]),
        Series("512-token blocks", "disaggregated", published["recounted"], list(ours.items())),
    ]
    picture = Picture(
        "Hit ratio by capacity",
        series,
        "capacity (tokens)",
        "prefix hits, of input tokens",
        is_log_x=True,
        is_share=True,
    )
    note = (
        "The paper counted with finer blocks than the published trace has (512 tokens): its curve "
        f"ends at {published['conversation'][-1][1]:.1%}, the trace's own ceiling is "
        f"{rows[-1][1]:.1%}."
    )
    return Outcome([picture], checks, [note])


# ---- Figure 10 ---------------------------------------------------------------------------------


def judge_fig10(values: Values, published: Published) -> Outcome:
    hit = {name: values[name]["summary"]["prefix_hit_ratio"] for name in values}
    prefill_s = {name: values[name]["summary"]["prefill_busy_s_mean"] for name in values}
    names = ("local", "global")
    checks = [
        share(f"hit ratio, {name}", published["hit"][name] / 100, hit[name]) for name in names
    ]
    checks += [
        number(
            f"prefill time a request, {name}", published["prefill_s"][name], prefill_s[name], "s"
        )
        for name in names
    ]
    theirs_hit = published["hit"]["global"] / published["hit"]["local"]
    theirs_s = published["prefill_s"]["global"] / published["prefill_s"]["local"]
    checks += [
        between("hit ratio, global over local", theirs_hit, hit["global"] / hit["local"], 1.8, 2.7),
        between(
            "prefill time, global over local",
            theirs_s,
            prefill_s["global"] / prefill_s["local"],
            0.66,
            0.86,
        ),
    ]
    hits = Series(
        "hit ratio",
        "disaggregated",
        [(name, published["hit"][name] / 100) for name in names],
        [(name, hit[name]) for name in names],
    )
    times = Series(
        "prefill",
        "disaggregated",
        [(name, published["prefill_s"][name]) for name in names],
        [(name, prefill_s[name]) for name in names],
    )
    pictures = [
        Picture("Prefix hits, of input tokens", [hits], is_bars=True, is_share=True),
        Picture("Prefill engine seconds a request", [times], y="seconds", is_bars=True),
    ]
    checks += [
        share(f"hit ratio, own caches only, {name}", None, summary_of(values, name))
        for name in ("least-loaded", "local-cache-aware")
    ]
    return Outcome(pictures, checks, [LOCAL])


def summary_of(values: Values, name: str) -> float:
    ratio: float = values[name]["summary"]["prefix_hit_ratio"]
    return ratio


# ---- Figure 11 ---------------------------------------------------------------------------------

STABLE_S = 600.0
ON_DEMAND = "conversation"
KEPT_KEYS = 100


def judge_fig11(values: Values, published: Published) -> Outcome:
    checks: list[Check] = []
    pictures = []
    for workload in values:
        ranks = values[workload]["hot_keys"]["ranks"]
        end_s = values[workload]["last_arrival_s"]
        rows = [row for row in values[workload]["hot_keys"]["seen"] if row[0] <= end_s]
        stable = [counts for at_s, counts in rows if at_s >= STABLE_S]
        for place, rank in enumerate(ranks):
            held = [counts[place] for counts in stable]
            what = f"{workload}: instances with key {rank} after ten minutes, least and mean"
            words = f"{min(held)} and {sum(held) / len(held):.1f} of 8"
            if rank == 10 and workload != ON_DEMAND:
                checks.append(claim(what, min(held) >= 7, "nearly all", words, "at least 7"))
            else:
                checks.append(told(what, "nearly all" if rank == 100 else "", words))
        checks.append(share(f"{workload}: hit ratio", None, summary_of(values, workload)))
        ttft_s = values[workload]["summary"]["ttft_s"]["mean"]
        checks.append(number(f"{workload}: mean TTFT", None, ttft_s, "s"))
        series = [
            Series(f"key {rank}", "disaggregated", (), [(at_s / 60, c[place]) for at_s, c in rows])
            for place, rank in enumerate(ranks)
        ]
        title = f"Prefill instances that hold the k-th most requested key: {workload}"
        pictures.append(Picture(title, series, "minutes", "instances of 8", is_stepped=True))
    return Outcome(pictures, checks, [KEYS])


KEYS = (
    "Keys are the published trace's blocks of 512 tokens. In the conversation trace only the first "
    "block is common: it is in all 12,031 requests, the second to the tenth most requested block "
    "in 43 of them, of one long conversation, eight of these in the first ten minutes. A policy "
    "that copies on demand would have to send each to another instance. The paper's curve is "
    "counted with finer keys: of keys of 16 tokens (vLLM's blocks) the 32 most requested lie in "
    "that first block, so that its line, 8 of 8, is also that of the 10th key of 16 tokens. The "
    f"second run adds what the paper does not describe: every 30 s the {KEPT_KEYS} keys most used "
    "so far are copied to all prefill instances. The 10th key is then where the paper has it; it "
    "gains nothing here, since few of these keys are asked for again (hits and TTFT in the table)."
)


# ---- Figure 14 ---------------------------------------------------------------------------------

LATENCY_WITHIN = 0.05
COST_PROFILE = "a800-llama3-70b"


def judge_fig14(values: Values, published: Published) -> Outcome:
    cost = CostModel(load_profile(COST_PROFILE))
    checks, pictures = [], []
    for part, unit in (("prefill", "prefill"), ("decode", "128 decoded tokens")):
        series = []
        for cached, words in ((0.0, "uncached"), (0.95, "95 % cached")):
            theirs = published[f"{part}-{'cached-95' if cached else 'uncached'}"]
            ours = []
            for thousands, there_s in theirs:
                tokens = round(1024 * thousands)
                if part == "prefill":
                    here_s = cost.prefill_s(tokens, round(cached * tokens))
                else:
                    here_s = cost.span_s(1, tokens, 128)
                ours.append((thousands, here_s))
                what = f"{unit}, {words}, {thousands:g}k"
                checks.append(number(what, there_s, here_s, "s", LATENCY_WITHIN))
            series.append(Series(words, "colocated" if cached else "disaggregated", theirs, ours))
        pictures.append(
            Picture(unit.capitalize(), series, "prompt (k tokens)", "seconds", is_log_x=True)
        )
    return Outcome(pictures, checks)


LOCAL = (
    "The paper does not say where local requests went. Its 16.9 % is what its own Figure 9 gives "
    "for 3 M tokens (between 12.0 % at 2 M and 21.5 % at 4 M): the hits of one node's cache that "
    "sees all requests, which is what is compared. Ten nodes that each see a tenth of the requests "
    "find less if requests go anywhere, because a conversation rarely comes back to its node, and "
    "much more if the scheduler knows the local caches: both are in the table. All hit ratios are "
    "lower by the trace's coarser blocks (see Figure 9)."
)
ONE_TOKEN = msgspec.structs.replace(CONVERSATION, output_tokens=1)
TEN = {"prefill_instances": 10, "decode_instances": 6}

EXPERIMENTS = (
    Experiment(
        "fast25-fig9",
        "FAST'25 Figure 9: hit ratio by capacity, conversation",
        "All requests in order through one global LRU pool; hits are prefix tokens found, over all "
        "input tokens.",
        {
            "lru": PoolRun(
                CONVERSATION,
                "lru",
                (*[int(tokens) // BLOCK_TOKENS for tokens in CAPACITY_TOKENS], None),
            )
        },
        judge_fig9,
    ),
    Experiment(
        "fast25-fig10",
        "FAST'25 Figure 10: local and global cache, conversation",
        "Outputs cut to one token. Global: 10 prefill instances of 3 M tokens each, "
        "kvcache-centric scheduling, prefixes are fetched from wherever they are. Local: what one "
        "node's 3 M tokens find of all requests (one prefill instance, 20 times slower, so that "
        "nothing queues).",
        {
            "local": mooncake(ONE_TOKEN, speed=0.05, prefill_instances=1),
            "global": mooncake(ONE_TOKEN, **TEN),
            "least-loaded": mooncake(ONE_TOKEN, conductor__scheduling="least-loaded", **TEN),
            "local-cache-aware": mooncake(
                ONE_TOKEN, conductor__scheduling="local-cache-aware", **TEN
            ),
        },
        judge_fig10,
    ),
    Experiment(
        "fast25-fig11",
        "FAST'25 Figure 11: replicas of hot keys",
        "8 prefill and 8 decode instances; every 10 s it is counted on how many prefill instances "
        "the keys are that the whole trace asks for most. Keys are 512-token blocks.",
        {
            name: msgspec.structs.replace(run, hot_keys_every_s=10.0)
            for name, run in (
                (ON_DEMAND, mooncake(CONVERSATION)),
                (
                    f"conversation, {KEPT_KEYS} keys kept everywhere",
                    mooncake(CONVERSATION, prefill__replicate_keys=KEPT_KEYS),
                ),
                ("tool & agent", mooncake(TOOLAGENT)),
            )
        },
        judge_fig11,
    ),
    Experiment(
        "fast25-fig14",
        "FAST'25 Figure 14: latency of one request",
        f"Straight from the cost model, profile {COST_PROFILE}: one request, one node.",
        {},
        judge_fig14,
    ),
)
