"""arXiv 2407.00079: which system takes the highest rate? Figures 11, 12 and 13."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mooncake_bench.reproduce.experiment import Experiment, Published, Values
from mooncake_bench.reproduce.experiments.settings import LLAMA2, REAL
from mooncake_bench.reproduce.outcome import (
    Check,
    Outcome,
    Picture,
    Series,
    number,
    share,
    told,
)
from mooncake_bench.reproduce.plan import ClusterRun, Workload
from reference_cluster.cost_model import load_profile

TTFT_TIMES, TBT_TIMES = 10.0, 5.0
# The published curves, which are ratios to these bounds, start at 1/10 and 1/5 for this one.
REFERENCE = "2P+2D"
REQUESTS = 600


@dataclass(frozen=True, slots=True)
class Ladder:
    """A workload offered at rising rates."""

    name: str
    generator: str
    rates: Sequence[float]
    title: str


FIG11 = (
    Ladder(
        "arxiv-summarization",
        "arxiv-summarization-like",
        (0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
        "arXiv summarization",
    ),
    Ladder(
        "leval",
        "leval-like:questions=6",
        (0.1, 0.2, 0.5, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0),
        "L-Eval",
    ),
)
FIG12 = (
    Ladder("16k", "poisson-16k", (0.1, 0.2, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0), "16k prompts"),
    Ladder("32k", "poisson-32k", (0.1, 0.2, 0.5, 0.6, 0.8, 1.0, 1.25), "32k prompts"),
    Ladder("64k", "poisson-64k", (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "64k prompts"),
    Ladder(
        "128k", "poisson-128k", (0.02, 0.05, 0.1, 0.11, 0.12, 0.14, 0.16, 0.2, 0.25), "128k prompts"
    ),
)
SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "3P+1D": {"prefill_instances": 3, "decode_instances": 1},
    "2P+2D": {"prefill_instances": 2, "decode_instances": 2},
    "4 vLLM": {
        "system": "colocated",
        "colocated_instances": 4,
        "conductor.scheduling": "least-loaded",
    },
}
# The paper ran vLLM's long requests one by one. That it reused the shared half of the prompts is
# found by reckoning (see REUSE): the paper does not say so.
BARE = {"overheads.step_s": 0.0, "overheads.prefix_caching_step_s": 0.0}
ONE_BY_ONE = {"colocated.batch_max": 1, "colocated.prefix_caching": True}


def ladder_runs(ladders: Sequence[Ladder], vllm: Mapping[str, Any]) -> dict[str, ClusterRun]:
    return {
        f"{ladder.name}, {system}, {rate:g}/s": ClusterRun(
            Workload(at_rate(ladder.generator, rate)),
            {"profile": LLAMA2, **overrides, **(vllm if "vLLM" in system else {})},
            is_with_gaps=True,
        )
        for ladder in ladders
        for rate in ladder.rates
        for system, overrides in SYSTEMS.items()
    }


def at_rate(generator: str, rate: float) -> str:
    """The generator with its rate, for as long as its requests take."""
    parameters = f"rate_rps={rate},duration_s={round(REQUESTS / rate)}"
    return f"{generator}{',' if ':' in generator else ':'}{parameters}"


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A question about a difference: the same ladder with one thing changed, TTFT only."""

    text: str
    ladder: Ladder
    system: str
    rates: Sequence[float]
    generator: str  # With a colon: parameters follow.
    cluster: Mapping[str, Any] = field(default_factory=dict)
    prefill_times: float = 1.0  # How much dearer a prompt's computing is.
    is_bare: bool = False  # Without the overheads of a step.

    def runs(self) -> dict[str, ClusterRun]:
        prefill = load_profile(LLAMA2).prefill
        changes = dict(BARE) if self.is_bare else {}
        if self.prefill_times != 1:
            changes["prefill.token_s"] = self.prefill_times * prefill.token_s
            changes["prefill.token2_s"] = self.prefill_times * prefill.token2_s
        return {
            f"what if: {self.text}, {rate:g}/s": ClusterRun(
                Workload(at_rate(self.generator, rate)),
                {"profile": LLAMA2, **SYSTEMS[self.system], **self.cluster},
                changes,
                is_with_gaps=True,
            )
            for rate in self.rates
        }

    def check(self, values: Values, published: Published) -> Check:
        """The highest rate within the TTFT bound of the ladder as it is."""
        bound_s = TTFT_TIMES * p90(values, self.ladder, REFERENCE, self.ladder.rates[0], "TTFT")
        runs = {rate: values[f"what if: {self.text}, {rate:g}/s"] for rate in self.rates}
        curve = [(rate, run["summary"]["ttft_s"]["p90"] / bound_s) for rate, run in runs.items()]
        printed = published[self.ladder.name]["within"][self.system]
        first = printed[0] if isinstance(printed, list) else printed
        what = f"what if: {self.text}: highest rate by TTFT"
        return told(what, f"{first:g} req/s", f"{highest(curve):g} req/s")


Curves = dict[str, list[tuple[float, float]]]


def p90(values: Values, ladder: Ladder, system: str, rate: float, metric: str) -> float:
    """P90 over requests of the TTFT, or over all gaps between tokens."""
    found = values[f"{ladder.name}, {system}, {rate:g}/s"]
    return float(found["gap_p90_s"] if metric == "TBT" else found["summary"]["ttft_s"]["p90"])


def normalised(values: Values, ladder: Ladder, metric: str, times: float) -> Curves:
    """P90 of the metric over `times` its value at the lowest rate: 1 is the bound."""
    bound = times * p90(values, ladder, REFERENCE, ladder.rates[0], metric)
    return {
        system: [(rate, p90(values, ladder, system, rate, metric) / bound) for rate in ladder.rates]
        for system in SYSTEMS
    }


def highest(curve: Sequence[tuple[float, float]]) -> float:
    """The highest rate up to which every rate was within the bound; 0 if none was."""
    best = 0.0
    for rate, ratio in curve:
        if ratio > 1:
            break
        best = rate
    return best


def judge_ladders(
    ladders: Sequence[Ladder],
    questions: Sequence[WhatIf],
    reasons: Sequence[str],
    values: Values,
    published: Published,
) -> Outcome:
    pictures: list[Picture] = []
    checks: list[Check] = []
    for ladder in ladders:
        theirs = published[ladder.name]
        ttft = normalised(values, ladder, "TTFT", TTFT_TIMES)
        tbt = normalised(values, ladder, "TBT", TBT_TIMES)
        within: dict[str, float] = {}
        printed: dict[str, float] = {}
        for system in SYSTEMS:
            by_ttft, by_tbt = highest(ttft[system]), highest(tbt[system])
            within[system] = min(by_ttft, by_tbt)
            bounds = theirs["within"][system]
            printed[system] = min(bounds) if isinstance(bounds, list) else bounds
            what = f"{ladder.title}, {system}: highest rate"
            checks.append(number(f"{what} within both", printed[system], within[system], "req/s"))
            if isinstance(bounds, list):
                pair = f"{bounds[0]:g}; {bounds[1]:g}"
                checks.append(told(f"{what} by TTFT; by TBT", pair, f"{by_ttft:g}; {by_tbt:g}"))
        checks.append(winner(ladder.title, printed, within))
        for metric, curves in (("TTFT", ttft), ("TBT", tbt)):
            pictures.append(picture(ladder, metric, curves, theirs[metric.lower()]))
    checks += [question.check(values, published) for question in questions]
    return Outcome(pictures, checks, reasons)


def winner(title: str, printed: dict[str, float], within: dict[str, float]) -> Check:
    """Who takes most, and how many times vLLM's rate."""

    def words(rates: dict[str, float]) -> str:
        most = max(rates.values())
        names = " and ".join(system for system in rates if rates[system] == most)
        other = rates["4 vLLM"]
        mine = max(rate for system, rate in rates.items() if "vLLM" not in system)
        factor = f"x{mine / other:.2f}" if other else "vLLM none"
        return f"{names}; Mooncake over vLLM {factor}"

    return told(f"{title}: who takes most", words(printed), words(within))


def picture(ladder: Ladder, metric: str, curves: Curves, published: Mapping[str, Any]) -> Picture:
    series = [
        Series(
            system,
            "colocated" if "vLLM" in system else "disaggregated",
            published[system],
            [(rate, min(ratio, 2.0)) for rate, ratio in curves[system]],
        )
        for system in SYSTEMS
    ]
    times = TTFT_TIMES if metric == "TTFT" else TBT_TIMES
    return Picture(
        f"{ladder.title}: P90 {metric}",
        series,
        "requests/s",
        "P90 over its bound",
        f"The bound, 1, is {times:g} times the value of {REFERENCE} at the lowest rate; cut at 2.",
    )


# ---- Figure 13 ---------------------------------------------------------------------------------

FIG13_SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "10P+10D": {"prefill_instances": 10, "decode_instances": 10},
    "20 vLLM": {
        "system": "colocated",
        "colocated_instances": 20,
        "conductor.scheduling": "least-loaded",
    },
}


BARE_VLLM = "20 vLLM without overheads of a step"
FIG13_REASON = (
    "vLLM keeps fewer requests within 0.1 s than in the paper because of the overhead of a decode "
    "step, 17 ms, that was calibrated on FAST'25 Figure 1: without it, the share is near the "
    "paper's (see the table). One set of overheads is kept for all figures."
)


def judge_fig13(values: Values, published: Published) -> Outcome:
    checks: list[Check] = []
    pictures = []
    for metric, bound_s, label in (("ttft", 30.0, "TTFT"), ("tbt", 0.1, "TBT")):
        series = []
        for system in FIG13_SYSTEMS:
            ours = [(x, y) for x, y in values[system][f"{metric}_within"]]
            theirs = published[metric][system]
            what = f"{system}, {label} within {bound_s:g} s"
            checks.append(share(what, dict(map(tuple, theirs))[bound_s], dict(ours)[bound_s]))
            colour = "colocated" if "vLLM" in system else "disaggregated"
            series.append(Series(system, colour, theirs, ours))
        pictures.append(
            Picture(
                f"{label}, cumulative", series, "seconds", "requests", is_log_x=True, is_share=True
            )
        )
    bare = dict(map(tuple, values[BARE_VLLM]["tbt_within"]))[0.1]
    checks.append(share(f"what if: {BARE_VLLM}, TBT within 0.1 s", 0.571, bare))
    mine, other = (dict(map(tuple, values[s]["tbt_within"]))[0.1] for s in FIG13_SYSTEMS)
    checks.append(number("more requests within the TBT bound, times", 1 / 0.571, mine / other))
    return Outcome(pictures, checks, [FIG13_REASON])


def asked(questions: Sequence[WhatIf]) -> dict[str, ClusterRun]:
    return {name: run for question in questions for name, run in question.runs().items()}


GAPS = (
    "TBT here is the P90 of all gaps between tokens, not of each request's longest tenth: with the "
    "latter vLLM would break the bound at the lowest rates already (prompts stop all decoding), "
    "which the published curves rule out."
)
FIG11_WHAT_IF = (
    WhatIf(
        "arXiv summarization, 4 vLLM with prompts 1.6 times dearer",
        FIG11[0],
        "4 vLLM",
        (1.0, 1.5, 2.0, 2.5, 3.0, 3.5),
        "arxiv-summarization-like",
        prefill_times=1.6,
    ),
    *[
        WhatIf(
            f"L-Eval, {system} with nothing reused",
            FIG11[1],
            system,
            (0.5, 0.8, 1.0, 1.25, 1.5),
            "leval-like:questions=1",
        )
        for system in ("3P+1D", "2P+2D")
    ],
)
FIG11_REASONS = (
    "vLLM takes more here than in the paper because its prompts cost here what Mooncake's cost. "
    "With prompts 1.6 times dearer its limit is the paper's (see the table): the paper's vLLM took "
    "about so much longer for a prompt than its Mooncake did.",
    "On L-Eval Mooncake's limits lie between those with the paper's reuse (over 80 %) and those "
    "with nothing reused (see the table): the paper's Mooncake reused less of these prompts than "
    "its Table 2 would allow. The paper's 3P+1D is bound at 0.8 req/s by its TBT; ours, with 72 "
    "tokens an answer on one decode instance, is far from that bound.",
)
FIG12_WHAT_IF = (
    *[
        WhatIf(
            f"{ladder.title}, {system} with nothing reused",
            ladder,
            system,
            ladder.rates[:-1],
            f"{ladder.generator}:shared=0.001",
        )
        for ladder in FIG12
        for system in ("3P+1D", "2P+2D")
    ],
    *[
        WhatIf(
            f"{ladder.title}, 4 vLLM without overheads of a step",
            ladder,
            "4 vLLM",
            ladder.rates[:6],
            ladder.generator,
            ONE_BY_ONE,
            is_bare=True,
        )
        for ladder in FIG12
    ],
    WhatIf(
        "128k prompts, 4 vLLM without overheads of a step and without prefix caching",
        FIG12[3],
        "4 vLLM",
        FIG12[3].rates[:6],
        FIG12[3].generator,
        {"colocated.batch_max": 1},
        is_bare=True,
    ),
)
FIG12_REASONS = (
    "vLLM must have reused the shared half in the paper: at 128k one instance needs 28 s for a "
    "whole prompt and 15 s for 512 tokens even without any overhead, so that four of them, one "
    "request at a time, end at 0.09 req/s, and the paper shows 0.12 (see the table).",
    "vLLM one by one takes less here than in the paper because of the overheads that were "
    "calibrated on FAST'25 Figure 1, 17 ms a decode step and 5 ms for prefix caching: at 16k a "
    "request lasts 25 s, and 0.2 req/s on four instances leaves it 20 s at most. Without the "
    "overheads vLLM has 0.11 at 128k, and at 16k to 64k it is still over its bound at 0.2 req/s, "
    "where the paper's is just within. One set of overheads is kept for all figures.",
    "3P+1D takes more here than in the paper because it reuses the shared half: with nothing "
    "reused its limits at 16k and 32k are the paper's (see the table). 2P+2D then takes less than "
    "the paper's, so that this alone does not explain both.",
)
LADDER_TEXT = (
    f"Four nodes, profile {LLAMA2}, Poisson arrivals, {REQUESTS} requests a rate. The highest rate "
    f"at which, and up to which, the P90 TTFT is at most {TTFT_TIMES:g} times and the P90 TBT at "
    f"most {TBT_TIMES:g} times the value of {REFERENCE} at the lowest rate (the published curves "
    "start where this system's value at the lowest rate is the unit)."
)

EXPERIMENTS = (
    Experiment(
        "arxiv-fig11",
        "arXiv Figure 11: highest rate within the SLOs, public data sets",
        LADDER_TEXT + " The data sets are generators with the paper's mean lengths and reuse.",
        {**ladder_runs(FIG11, {}), **asked(FIG11_WHAT_IF)},
        partial(judge_ladders, FIG11, FIG11_WHAT_IF, (GAPS, *FIG11_REASONS)),
    ),
    Experiment(
        "arxiv-fig12",
        "arXiv Figure 12: highest rate within the SLOs, simulated data",
        LADDER_TEXT + " Half of each prompt is shared, 512 tokens come out. vLLM takes "
        "long requests one by one, as in the paper, and caches prefixes.",
        {**ladder_runs(FIG12, ONE_BY_ONE), **asked(FIG12_WHAT_IF)},
        partial(judge_ladders, FIG12, FIG12_WHAT_IF, (GAPS, *FIG12_REASONS)),
    ),
    Experiment(
        "arxiv-fig13",
        "arXiv Figure 13: TTFT and TBT on the real workload",
        f"20 nodes, profile {LLAMA2}: 10 prefill and 10 decode instances beside 20 colocated ones "
        "(prefill-first, least-loaded). Nothing is refused.",
        {
            **{
                system: ClusterRun(REAL, {"profile": LLAMA2, **overrides})
                for system, overrides in FIG13_SYSTEMS.items()
            },
            BARE_VLLM: ClusterRun(REAL, {"profile": LLAMA2, **FIG13_SYSTEMS["20 vLLM"]}, BARE),
        },
        judge_fig13,
    ),
)
