"""FAST'25: how does it depend on the network and on the split? Figures 13 and 15."""

from __future__ import annotations

from mooncake_bench.reproduce.experiment import Experiment, Published, Values
from mooncake_bench.reproduce.experiments.settings import SYNTHETIC, SYNTHETIC_STAND_IN, mooncake
from mooncake_bench.reproduce.outcome import Check, Outcome, Picture, Series, number, share

GBPS = (24, 50, 100, 200, 400, 800)
NODES = 16
SPEED = 3.0  # At the workload's own pace every split does well.
PREFILL_COUNTS = tuple(range(5, 12))
ALONE = "The paper's own curve is not among the published numbers here: ours stands alone."


def judge_fig13(values: Values, published: Published) -> Outcome:
    checks: list[Check] = []
    ttft, moving, waiting = [], [], []
    for gbps in GBPS:
        summary = values[f"{gbps} Gbps"]["summary"]
        stages = summary["stages_s"]
        moved_s = stages["transfer"] + stages["reuse_load"]
        ttft.append((gbps, summary["ttft_s"]["mean"]))
        moving.append((gbps, moved_s))
        waiting.append((gbps, stages["transfer"]))
        checks.append(number(f"mean TTFT at {gbps} Gbps", None, summary["ttft_s"]["mean"], "s"))
        checks.append(number(f"fetching and handing over at {gbps} Gbps", None, moved_s, "s"))
    series = [
        Series("TTFT", "disaggregated", (), ttft),
        Series("fetch and handover", "disaggregated", (), moving),
        Series("handover alone", "disaggregated", (), waiting),
    ]
    picture = Picture(
        "Mean seconds by bandwidth of a node",
        series,
        "Gbps a node",
        "seconds",
        "Handover: from the end of the prefill until all KV is at the decode instance.",
        is_log_x=True,
        is_log_y=True,
    )
    return Outcome([picture], checks, [ALONE, SYNTHETIC_STAND_IN])


def judge_fig15(values: Values, published: Published) -> Outcome:
    checks: list[Check] = []
    shares, ttft, tbt = [], [], []
    for count in PREFILL_COUNTS:
        name = split(count)
        summary = values[name]["summary"]
        shares.append((name, summary["attainment"]))
        ttft.append((count, summary["ttft_s"]["mean"]))
        tbt.append((count, summary["tbt_s"]["mean"] * 1e3))
        checks.append(share(f"effective requests, {name}", None, summary["attainment"]))
        checks.append(number(f"mean TTFT, {name}", None, summary["ttft_s"]["mean"], "s"))
        checks.append(number(f"mean TBT, {name}", None, 1e3 * summary["tbt_s"]["mean"], "ms"))
    bars = Series("effective requests", "disaggregated", (), shares)
    pictures = [
        Picture("Effective requests", [bars], y="of offered", is_bars=True, is_share=True),
        Picture(
            "Mean TTFT", [Series("TTFT", "disaggregated", (), ttft)], "prefill instances", "seconds"
        ),
        Picture("Mean TBT", [Series("TBT", "disaggregated", (), tbt)], "prefill instances", "ms"),
    ]
    return Outcome(pictures, checks, [ALONE, SYNTHETIC_STAND_IN])


def split(prefill: int) -> str:
    return f"{prefill}P+{NODES - prefill}D"


EXPERIMENTS = (
    Experiment(
        "fast25-fig13",
        "FAST'25 Figure 13: network bandwidth, synthetic workload",
        "8 prefill and 8 decode instances; only the bandwidth of a node's network differs.",
        {
            f"{gbps} Gbps": mooncake(SYNTHETIC, network__link_bytes_per_s=gbps * 1e9 / 8)
            for gbps in GBPS
        },
        judge_fig13,
    ),
    Experiment(
        "fast25-fig15",
        "FAST'25 Figure 15: how many of 16 nodes should prefill, synthetic workload",
        f"P prefill and 16 - P decode instances, {SPEED:g} times the workload's pace. A request is "
        "effective with its first token within 10 s and a TBT of at most 100 ms.",
        {
            split(count): mooncake(
                SYNTHETIC,
                speed=SPEED,
                prefill_instances=count,
                decode_instances=NODES - count,
                slo__ttft_s=10.0,
                slo__tbt_s=0.1,
            )
            for count in PREFILL_COUNTS
        },
        judge_fig15,
    ),
)
