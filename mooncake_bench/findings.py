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
    groups: list[tuple[object, list[Run]]] = []
    for run in runs:
        likeness = _likeness(run.info)
        mates = (mates for like, mates in groups if like == likeness and _same_rate(mates[0], run))
        found = next(mates, None)
        if found is None:
            groups.append((likeness, [run]))
        else:
            found.append(run)
    return [Comparison(tuple(_sides(group))) for _, group in groups]


def headline(comparison: Comparison) -> str:
    """Who met the SLOs for how many requests, and what that is in goodput: one sentence."""
    ranked = contenders(comparison)
    slo = comparison.slo
    rate = comparison.offered_rps
    at = f"At {rate:.3g} req/s of {comparison.trace_name}, " if rate else ""
    bounds = f"TTFT ≤ {seconds(slo.ttft_s)} and TBT ≤ {seconds(slo.tbt_s)}"
    first = ranked[0]
    if not any(side.frame.height for side in ranked):
        return f"No request was offered to {_listed([side.name for side in ranked])}."
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
    ratio = first.goodput_rps / second.goodput_rps
    # Near 1 two digits would hide the difference.
    return (
        f"{ratio:.3g} times the goodput" if _is_close(ratio) else f"{ratio:.2g} times the goodput"
    )


def remarks(comparison: Comparison) -> list[str]:
    """What follows from the numbers, and what does not: a few sentences."""
    found = [_answer(comparison), *_reasons(comparison), _room(comparison), *_fairness(comparison)]
    return [sentence for sentence in found if sentence]


@dataclass(frozen=True, slots=True)
class Ladder:
    """One system under the same traffic at several rates."""

    short: str
    name: str
    system: str
    points: pl.DataFrame  # offered_rps (rising), attainment


def ladders(groups: Sequence[Comparison]) -> list[tuple[Comparison, list[Ladder]]]:
    """Systems that met one trace at two rates or more, by trace, kind and SLO.

    Each entry carries the first of its comparisons, for the names of its traffic and its SLO.
    """
    kinds: dict[tuple[object, ...], tuple[Comparison, dict[str, list[Side]]]] = {}
    for group in groups:
        kind, trace, _, slo = _likeness(group.sides[0].run.info)
        _, systems = kinds.setdefault((kind, trace, slo), (group, {}))
        for side in group.sides:
            systems.setdefault(side.short, []).append(side)
    found = [
        (first, [_ladder(sides) for sides in systems.values()]) for first, systems in kinds.values()
    ]
    # A single rate is already told by its own comparison.
    return [(first, rungs) for first, rungs in found if any(r.points.height > 1 for r in rungs)]


def capacity(ladder: Ladder) -> str:
    """The highest rate up to which every tried rate was within the target: one sentence."""
    rates, shares = ladder.points["offered_rps"], ladder.points["attainment"]
    held = 0
    while held < len(shares) and shares[held] >= TARGET_ATTAINMENT:
        held += 1
    target = percent(TARGET_ATTAINMENT)
    if held == 0:
        return f"{ladder.name} was below {target} already at {rates[0]:.3g} req/s."
    if held == len(shares):
        return f"{ladder.name} held {target} up to {rates[-1]:.3g} req/s, the highest rate tried."
    return (
        f"{ladder.name} held {target} at {rates[held - 1]:.3g} req/s and no longer at "
        f"{rates[held]:.3g} req/s: its capacity is between."
    )


def is_tie(first: Side, second: Side) -> bool:
    """Whether the attainments differ by less than a point, or than chance with so few requests.

    Chance: two standard errors of a difference of shares, as if requests were independent. They
    are not, which makes the real uncertainty larger: only repeated runs (`compare`) measure it.
    """
    lead = first.attainment - second.attainment
    # More requests within their SLOs, but at a lower rate: only the run's last requests differ.
    if lead * (first.goodput_rps - second.goodput_rps) <= 0:
        return True
    share = (first.attainment + second.attainment) / 2
    count = min(first.frame.height, second.frame.height)
    error = math.sqrt(2 * share * (1 - share) / count)
    return abs(lead) < max(0.01, 2 * error)


def _answer(comparison: Comparison) -> str:
    ranked = contenders(comparison)
    if {side.run.info.system for side in ranked[:2]} != {"disaggregated", "colocated"}:
        return ""
    first, second = ranked[0], ranked[1]
    if first.attainment == second.attainment == 0:
        return "Neither system serves this traffic at this rate: offer less, or add instances."
    if is_tie(first, second):
        return "On this evidence disaggregation makes no difference for this traffic at this rate."
    if (
        first.goodput_rps
        and second.goodput_rps
        and _is_close(first.goodput_rps / second.goodput_rps)
    ):
        side = "ahead" if first.attainment > second.attainment else "behind"
        return f"For this traffic at this rate, disaggregation is {side}, but by little."
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
        counts = metrics.misses(side.frame, comparison.slo, side.run.info.slo_by_class)
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
    hits = {side.name: side.run.summary.get("prefix_hit_ratio") for side in comparison.sides}
    known = {name: hit for name, hit in hits.items() if hit is not None}
    without = [name for name, hit in known.items() if hit == 0]
    best = max(known, key=lambda name: known[name], default="")
    if without and known[best] > 0.02:
        found.append(
            f"{_listed(without)} reused no prefix, {best} {percent(known[best])} of its input: "
            "part of the difference is reuse, which the other could have too (prefix caching)."
        )
    return found


def _is_close(ratio: float) -> bool:
    return 0.9 < ratio < 1.1


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


def _same_rate(first: Run, second: Run) -> bool:
    """Within a few percent: jitter moves the last arrival, another speed moves it further."""
    rates = [run.summary.get("offered_rps") or 0.0 for run in (first, second)]
    return max(rates) <= 1.03 * min(rates)


def _sides(runs: Sequence[Run]) -> list[Side]:
    shorts = [_short_name(run) for run in runs]
    # Two runs of one shape differ in something else: there the run's own name tells them apart.
    shorts = [
        _telling_name(run, short) if shorts.count(short) > 1 else short
        for short, run in zip(shorts, runs, strict=True)
    ]
    return [_side(run, short) for run, short in zip(runs, shorts, strict=True)]


def _telling_name(run: Run, short: str) -> str:
    """The run's own name, behind its shape unless it begins with that."""
    name = run.info.name
    return name if name.startswith(short) else f"{short} ({name})"


def _side(run: Run, short: str) -> Side:
    is_disaggregated = run.info.system == "disaggregated"
    return Side(
        run=run,
        frame=metrics.measured(metrics.per_request(run.requests, run.spans), run.info.measured_s),
        short=short,
        name=f"disaggregated {short}" if is_disaggregated else short,
        attainment=run.summary.get("attainment") or 0.0,
        goodput_rps=run.summary.get("goodput_rps") or 0.0,
    )


def _short_name(run: Run) -> str:
    config = run.info.config.get("cluster", run.info.config)
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


def _ladder(sides: Sequence[Side]) -> Ladder:
    points = pl.DataFrame(
        {
            "offered_rps": [side.run.summary.get("offered_rps") for side in sides],
            "attainment": [side.attainment for side in sides],
        },
        schema={"offered_rps": pl.Float64, "attainment": pl.Float64},
    )
    first = sides[0]
    system = first.run.info.system
    return Ladder(first.short, first.name, system, points.drop_nulls().sort("offered_rps"))


def _seen(run: Run, role: str) -> int:
    return run.samples.filter(pl.col("role") == role)["instance"].n_unique()


def _share_or_none(side: Side) -> str:
    return "none" if side.attainment == 0 else percent(side.attainment)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
