"""FAST'25: what do users wait, and what does it cost? Figures 1, 5, 6, 7 and 8."""

from __future__ import annotations

from functools import partial

from mooncake_bench.reproduce.experiment import Experiment, Published, Values
from mooncake_bench.reproduce.experiments.settings import (
    CONVERSATION,
    STRATEGIES,
    SYNTHETIC,
    SYNTHETIC_STAND_IN,
    SYSTEMS,
    TOOLAGENT,
    kind,
    mooncake,
    preset,
)
from mooncake_bench.reproduce.outcome import (
    Check,
    Outcome,
    Picture,
    Series,
    between,
    claim,
    number,
    share,
)
from mooncake_bench.reproduce.plan import ClusterRun, Workload

NOT_DIGITISED = "The paper's own curve is not among the published numbers here: ours stands alone."
THRESHOLDS_MS = (100, 200, 300)
POINTS_WITHIN = 0.06


def four_systems(workload: Workload) -> dict[str, ClusterRun]:
    return {system: preset(system, workload) for system in SYSTEMS}


# ---- Figure 1 ----------------------------------------------------------------------------------


FIG1_NOTE = (
    "Below 100 ms ours is faster: the profile's decode step, 43 ms and little more for each "
    "sequence, was calibrated on the shares at 100, 200 and 300 ms, and the paper's Mooncake has "
    "its median near 75 ms. The arrivals are jittered within the trace's stamps of 3 s; without "
    "that, vLLM's shares miss by up to 11 points."
)


def judge_fig1(values: Values, published: Published) -> Outcome:
    checks = []
    ours: dict[str, dict[int, float]] = {}
    for system, label in SYSTEMS.items():
        within = {round(1e3 * bound): y for bound, y in values[system]["tbt_within"]}
        ours[system] = within
        theirs = dict(published[system])
        for threshold in THRESHOLDS_MS:
            printed = theirs.get(threshold)
            checks.append(
                share(
                    f"{label}, TBT below {threshold} ms",
                    # Mooncake's 100 % at 300 ms is off the read-off curve.
                    1.0 if printed is None else printed / 100,
                    within[threshold],
                    POINTS_WITHIN,
                )
            )
    checks += gains(ours, {system: dict(published[system]) for system in SYSTEMS})
    return Outcome([tbt_picture(values, published)], checks, [FIG1_NOTE])


def gains(
    ours: dict[str, dict[int, float]], published: dict[str, dict[float, float]]
) -> list[Check]:
    """Mooncake's share over the best vLLM variant's, at each threshold."""
    checks = []
    mine = []
    for threshold in THRESHOLDS_MS:
        theirs = {system: published[system].get(threshold, 100.0) for system in SYSTEMS}
        best = max((system for system in SYSTEMS if system != "mooncake"), key=theirs.__getitem__)
        gain = ours["mooncake"][threshold] / max(
            ours[system][threshold] for system in SYSTEMS if system != "mooncake"
        )
        mine.append(gain)
        checks.append(
            number(
                f"Mooncake over the best vLLM variant at {threshold} ms, times",
                theirs["mooncake"] / theirs[best],
                gain,
            )
        )
    falling = mine[0] > mine[1] > mine[2]
    checks.append(claim("the gain falls from 100 to 300 ms, as the paper's", falling))
    return checks


def tbt_picture(values: Values, published: Published, title: str = "TBT, cumulative") -> Picture:
    series = [
        Series(
            label,
            kind(system),
            [(x, y / 100) for x, y in published.get(system, [])],
            [(1e3 * x, y) for x, y in values[system]["tbt_within"]],
        )
        for system, label in SYSTEMS.items()
    ]
    note = "Share of requests whose TBT (mean of the longest tenth of the gaps) is below."
    return Picture(title, series, "TBT (ms)", "requests", note, is_log_x=True, is_share=True)


# ---- Figure 5 ----------------------------------------------------------------------------------

RATIOS = {  # Over the global strategy's mean TTFT: (low, high).
    "local-cache-aware": (1.05, 1.35),
    "least-loaded": (1.3, 2.3),
    "random": (4.0, 9.0),
}


def judge_fig5(values: Values, published: Published) -> Outcome:
    ours = {name: values[name]["summary"]["ttft_s"]["mean"] for name in STRATEGIES}
    theirs = {name: published[name]["mean"] for name in STRATEGIES}
    checks = [
        number(f"{label}, mean TTFT", theirs[name], ours[name], "s")
        for name, label in STRATEGIES.items()
    ]
    means = [ours[name] for name in STRATEGIES]
    checks.append(
        claim("random > load balancing > local > global cache-aware", means == sorted(means))
    )
    for name, (low, high) in RATIOS.items():
        ratio = theirs[name] / theirs["kvcache-centric"]
        what = f"{STRATEGIES[name]} over global cache-aware, times"
        checks.append(between(what, ratio, ours[name] / ours["kvcache-centric"], low, high))
    bars = Series(
        "mean TTFT",
        "disaggregated",
        [(label, theirs[name]) for name, label in STRATEGIES.items()],
        [(label, ours[name]) for name, label in STRATEGIES.items()],
    )
    picture = Picture("Mean TTFT by scheduling", [bars], y="seconds", is_bars=True)
    return Outcome([picture], checks, [FIG5_NOTE])


FIG5_NOTE = (
    "The ratios are the paper's, the seconds are a third of them: at the trace's own pace eight "
    "prefill instances are busy half of the time here, and hardly anything queues. Neither "
    "unjittered arrivals (1.36, 1.46, 1.95 and 7.13 s) nor fewer prefill instances (six: 1.5, 1.8, "
    "3.2, 15; five: 2.7, 3.9, 47, 95) give the paper's four numbers at once: it is not the load "
    "alone. The paper does not say what its TTFT holds beside prefill and queue."
)


# ---- Figure 8 ----------------------------------------------------------------------------------


def judge_fig8(values: Values, published: Published) -> Outcome:
    ours = {name: values[name]["summary"]["prefill_busy_s_mean"] for name in SYSTEMS}
    checks = [
        number(f"{label}, prefill engine time a request", published[name], ours[name], "s", 0.1)
        for name, label in SYSTEMS.items()
    ]
    bars = Series(
        "prefill time",
        "disaggregated",
        [(label, published[name]) for name, label in SYSTEMS.items()],
        [(label, ours[name]) for name, label in SYSTEMS.items()],
    )
    picture = Picture("Prefill engine seconds a request", [bars], y="seconds", is_bars=True)
    return Outcome([picture], checks)


# ---- Figures 6 and 7 ---------------------------------------------------------------------------


def judge_other_workload(notes: tuple[str, ...], values: Values, published: Published) -> Outcome:
    checks = []
    for system, label in SYSTEMS.items():
        within = {round(1e3 * bound): y for bound, y in values[system]["tbt_within"]}
        checks += [
            share(f"{label}, TBT below {threshold} ms", None, within[threshold])
            for threshold in THRESHOLDS_MS
        ]
    for system, label in SYSTEMS.items():
        summary = values[system]["summary"]
        checks.append(number(f"{label}, mean TTFT", None, summary["ttft_s"]["mean"], "s"))
        checks.append(share(f"{label}, prefix hits", None, summary["prefix_hit_ratio"]))
    return Outcome([tbt_picture(values, published)], checks, [NOT_DIGITISED, *notes])


SYSTEMS_TEXT = (
    "16 nodes: Mooncake as 8 prefill and 8 decode instances with kvcache-centric scheduling; vLLM "
    "v0.5.1 as 16 colocated instances, prefill-first, least-loaded, then with prefix caching in "
    "device memory, then with chunked prefill. Nothing is refused."
)

EXPERIMENTS = (
    Experiment(
        "fast25-fig1",
        "FAST'25 Figure 1: TBT of four systems, conversation",
        SYSTEMS_TEXT,
        four_systems(CONVERSATION),
        judge_fig1,
    ),
    Experiment(
        "fast25-fig5",
        "FAST'25 Figure 5: TTFT of four scheduling strategies, conversation",
        "8 prefill and 8 decode instances; only the Conductor's strategy differs.",
        {name: mooncake(CONVERSATION, conductor__scheduling=name) for name in STRATEGIES},
        judge_fig5,
    ),
    Experiment(
        "fast25-fig6",
        "FAST'25 Figure 6: TBT of four systems, tool & agent",
        SYSTEMS_TEXT,
        four_systems(TOOLAGENT),
        partial(judge_other_workload, ()),
    ),
    Experiment(
        "fast25-fig7",
        "FAST'25 Figure 7: TBT of four systems, synthetic workload",
        SYSTEMS_TEXT,
        four_systems(SYNTHETIC),
        partial(judge_other_workload, (SYNTHETIC_STAND_IN,)),
    ),
    Experiment(
        "fast25-fig8",
        "FAST'25 Figure 8: prefill time a request, conversation",
        SYSTEMS_TEXT + " The time is what the engine spent on a request's prompt; nothing was "
        "fitted to this figure.",
        four_systems(CONVERSATION),
        judge_fig8,
    ),
)
