"""What is each part worth? The cluster without fetching, without streaming, with stale reports."""

from __future__ import annotations

from typing import Any

from mooncake_bench.reproduce.experiment import Experiment, Published, Values
from mooncake_bench.reproduce.experiments.settings import CONVERSATION, mooncake
from mooncake_bench.reproduce.outcome import Check, Outcome, Picture, Series, number, share

WHOLE = "whole"
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "without fetching and replication": {"conductor__scheduling": "local-cache-aware"},
    "without layer-wise streaming": {"prefill__layerwise": False},
    "load reports 1 s old": {"conductor__report_every_s": 1.0},
    "load reports 5 s old": {"conductor__report_every_s": 5.0},
}
# Where the fastest network hides what streaming saves, a slower one shows it.
SLOW_LINK = {"network__link_bytes_per_s": 100e9 / 8}
SLOW: dict[str, dict[str, Any]] = {
    "100 Gbps": SLOW_LINK,
    "100 Gbps, without layer-wise streaming": {**SLOW_LINK, "prefill__layerwise": False},
}


def judge(values: Values, published: Published) -> Outcome:
    checks: list[Check] = []
    names = [*VARIANTS, *SLOW]
    for name in names:
        summary = values[name]["summary"]
        checks.append(number(f"{name}: mean TTFT", None, summary["ttft_s"]["mean"], "s"))
        checks.append(number(f"{name}: P90 TTFT", None, summary["ttft_s"]["p90"], "s"))
        handover_ms = 1e3 * summary["stages_s"]["transfer"]
        checks.append(number(f"{name}: handover after the prefill", None, handover_ms, "ms"))
        checks.append(share(f"{name}: prefix hits", None, summary["prefix_hit_ratio"]))
    bars = [
        Series("mean TTFT", "disaggregated", (), means(values, names, "mean")),
        Series("P90 TTFT", "disaggregated", (), means(values, names, "p90")),
    ]
    return Outcome([Picture("TTFT", bars, y="seconds", is_bars=True)], checks)


def means(values: Values, names: list[str], which: str) -> list[tuple[float | str, float]]:
    return [(name, values[name]["summary"]["ttft_s"][which]) for name in names]


EXPERIMENTS = (
    Experiment(
        "ablations",
        "Ablations: what each part is worth, conversation",
        "8 prefill and 8 decode instances with kvcache-centric scheduling; one part is taken away "
        "at a time. Load reports: the Conductor sees each instance as of its last report.",
        {name: mooncake(CONVERSATION, **one) for name, one in {**VARIANTS, **SLOW}.items()},
        judge,
    ),
)
