"""What do the numbers of two or more runs say, in plain words?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from mooncake_bench import metrics
from mooncake_bench.records import Run, RunInfo
from mooncake_bench.slo import Slo, percent, seconds

TARGET_ATTAINMENT = 0.9
"""DistServe's: a system takes a load if at least so many of its requests meet their SLOs."""


@dataclass(frozen=True, slots=True)
class Side:
    """One run of a comparison, with the per-request frame and the names it goes by."""

    run: Run
    frame: pl.DataFrame  # metrics.per_request
    short: str  # "8P+8D", "16 colocated"
    name: str  # "disaggregated 8P+8D", "16 colocated"
    attainment: float
    goodput_rps: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs that met the same requests under the same SLO, all live or all simulated."""

    sides: tuple[Side, ...]

    @property
    def slo(self) -> Slo:
        return self.sides[0].run.info.slo

    @property
    def is_simulated(self) -> bool:
        return self.sides[0].run.info.source == "simulated"

    @property
    def trace_name(self) -> str:
        return str(self.sides[0].run.info.trace.get("name", "an unnamed trace"))

    @property
    def offered_rps(self) -> float | None:
        rates = [side.run.summary.get("offered_rps") for side in self.sides]
        return max((rate for rate in rates if rate), default=None)


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Group runs that may be compared, in the order in which they were given."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_likeness(run.info), []).append(run)
    return [Comparison(tuple(_sides(group))) for group in groups.values()]


def headline(comparison: Comparison) -> str:
    """Who met the SLOs for how many requests, and what that is in goodput: one sentence."""
    ranked = contenders(comparison)
    slo = comparison.slo
    rate = comparison.offered_rps
    at = f"At {rate:.3g} req/s of {comparison.trace_name}, " if rate else ""
    bounds = f"TTFT ≤ {seconds(slo.ttft_s)} and TBT ≤ {seconds(slo.tbt_s)}"
    first = ranked[0]
    shares = f"{first.name} met {bounds} for {percent(first.attainment)} of requests"
    if len(ranked) == 1:
        sentence = f"{at}{shares}: {first.goodput_rps:.3g} req/s of goodput."
    else:
        second = ranked[1]
        sentence = (
            f"{at}{shares}, {second.name} for {_share_or_none(second)}: {verdict(comparison)}."
        )
    return sentence[0].upper() + sentence[1:]


def verdict(comparison: Comparison) -> str:
    """The comparison in a few words: "4.6 times the goodput", "too close to call ..."."""
    ranked = contenders(comparison)
    if len(ranked) == 1:
        return f"{percent(ranked[0].attainment)} within SLO"
    first, second = ranked[0], ranked[1]
    if first.attainment == second.attainment == 0:
        return "neither serves this load"
    if is_tie(first, second):
        return f"too close to call with {first.frame.height:,} requests"
    if second.goodput_rps == 0:
        return f"{first.goodput_rps:.3g} req/s of goodput against none"
    if first.goodput_rps == 0:
        return f"no goodput against {second.goodput_rps:.3g} req/s"
    return f"{first.goodput_rps / second.goodput_rps:.2g} times the goodput"


def remarks(comparison: Comparison) -> list[str]:
    """What follows from the numbers, and what does not: a few sentences."""
    found = [_answer(comparison), *_reasons(comparison), _room(comparison), *_fairness(comparison)]
    return [sentence for sentence in found if sentence]


def is_tie(first: Side, second: Side) -> bool:
    """Whether the attainments differ by less than a point, or than chance with so few requests.

    Chance: two standard errors of a difference of shares, as if requests were independent. They
    are not, which makes the real uncertainty larger: only repeated runs (`compare`) measure it.
    """
    share = (first.attainment + second.attainment) / 2
    count = min(first.frame.height, second.frame.height)
    error = math.sqrt(2 * share * (1 - share) / count) if count else 1.0
    return abs(first.attainment - second.attainment) < max(0.01, 2 * error)


def _answer(comparison: Comparison) -> str:
    ranked = contenders(comparison)
    if {side.run.info.system for side in ranked[:2]} != {"disaggregated", "colocated"}:
        return ""
    first, second = ranked[0], ranked[1]
    if first.attainment == second.attainment == 0:
        return "Neither system serves this traffic at this rate: offer less, or add instances."
    if is_tie(first, second):
        return "On this evidence disaggregation makes no difference for this traffic at this rate."
    if first.attainment > second.attainment:
        return "For this traffic at this rate, disaggregation pays."
    return "For this traffic at this rate, disaggregation does not pay."


def _reasons(comparison: Comparison) -> list[str]:
    words = {
        "slow_tokens": "came within the TTFT bound but with tokens too far apart",
        "late_first_token": "got their first token too late",
        "both": "were late and then slow",
        "rejected": "were rejected",
        "failed": "failed",
    }
    sentences = []
    for side in contenders(comparison)[:2]:
        counts = metrics.misses(side.frame, comparison.slo)
        offered = max(side.frame.height, 1)
        parts = [
            f"{percent(count / offered)} {words[cause]}"
            for cause, count in sorted(counts.items(), key=lambda item: -item[1])
            if count / offered >= 0.005
        ]
        if parts:
            sentences.append(f"Of the requests offered to {side.name}, {_listed(parts)}.")
    return sentences


def _room(comparison: Comparison) -> str:
    """What one load says of capacity: a bound from below, or from above."""
    rate = comparison.offered_rps
    if rate is None:
        return ""
    able = [s.name for s in comparison.sides if s.attainment >= TARGET_ATTAINMENT]
    unable = [s.name for s in comparison.sides if s.attainment < TARGET_ATTAINMENT]
    parts = []
    if able:
        parts.append(f"{_listed(able)} can take at least {rate:.3g} req/s of it")
    if unable:
        parts.append(f"{_listed(unable)} less than that" if able else _less_than(unable, rate))
    target = f"With {percent(TARGET_ATTAINMENT)} of requests within their SLOs as the target"
    more = "; replay it faster to find where each gives in" if not unable else ""
    return f"{target}, {', and '.join(parts)}{more}."


def _less_than(names: list[str], rate: float) -> str:
    return f"{_listed(names)} can take less than {rate:.3g} req/s of it"


def _fairness(comparison: Comparison) -> list[str]:
    found = []
    counts = {side.name: n for side in comparison.sides if (n := _instances(side.run))}
    if len(set(counts.values())) > 1:
        sizes = _listed([f"{name} has {count}" for name, count in counts.items()])
        found.append(f"Not the same hardware: {sizes} instances.")
    if len({side.run.summary.get("offered") for side in comparison.sides}) > 1:
        found.append("Not the same number of requests was offered to each; a run was cut short.")
    return found


def contenders(comparison: Comparison) -> list[Side]:
    """The best disaggregated side, then the best colocated one; else all, best first."""
    ranked = sorted(comparison.sides, key=lambda side: -side.attainment)
    best: dict[str, Side] = {}
    for side in ranked:
        best.setdefault(side.run.info.system, side)
    if "disaggregated" in best and "colocated" in best:
        return [best["disaggregated"], best["colocated"]]
    return ranked


def _likeness(info: RunInfo) -> tuple[object, ...]:
    """What must be alike for two runs to be compared; seeds (of jitter, of sampling) need not."""
    kind = "simulated" if info.source == "simulated" else "live"
    transforms = tuple(
        re.sub(r",? *seed \d+", "", str(step)) for step in info.trace.get("transforms") or ()
    )
    return kind, info.trace.get("sha256", info.trace.get("name")), transforms, info.slo


def _sides(runs: Sequence[Run]) -> list[Side]:
    shorts = [_short_name(run) for run in runs]
    # Two runs of one shape differ in something else: there the run's own name tells them apart.
    shorts = [
        f"{short} ({run.info.name})" if shorts.count(short) > 1 else short
        for short, run in zip(shorts, runs, strict=True)
    ]
    return [_side(run, short) for run, short in zip(runs, shorts, strict=True)]


def _side(run: Run, short: str) -> Side:
    is_disaggregated = run.info.system == "disaggregated"
    return Side(
        run=run,
        frame=metrics.per_request(run.requests, run.spans),
        short=short,
        name=f"disaggregated {short}" if is_disaggregated else short,
        attainment=run.summary.get("attainment") or 0.0,
        goodput_rps=run.summary.get("goodput_rps") or 0.0,
    )


def _short_name(run: Run) -> str:
    config = run.info.config
    if run.info.system == "colocated":
        count = config.get("colocated_instances") or _seen(run, "colocated")
        return f"{count} colocated" if count else run.info.name
    prefill = config.get("prefill_instances") or _seen(run, "prefill")
    decode = config.get("decode_instances") or _seen(run, "decode")
    if run.info.system == "disaggregated" and prefill and decode:
        return f"{prefill}P+{decode}D"
    return run.info.name


def _instances(run: Run) -> int | None:
    """How many instances the run had, if it says."""
    match = re.match(r"(\d+)P\+(\d+)D|(\d+) colocated", _short_name(run))
    return sum(int(count) for count in match.groups() if count) if match else None


def _seen(run: Run, role: str) -> int:
    return run.samples.filter(pl.col("role") == role)["instance"].n_unique()


def _share_or_none(side: Side) -> str:
    return "none" if side.attainment == 0 else percent(side.attainment)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
