"""What exactly is TTFT, TBT, attainment, goodput here? Pure: frames in, numbers and frames out.

Percentiles interpolate linearly between the two nearest ranks, as numpy's default does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from mooncake_bench.accounting import accounting
from mooncake_bench.slo import TBT_BOUNDS_S, Slo

if TYPE_CHECKING:
    from mooncake_bench.records import RunInfo

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STAGES = ("queue", "reuse_load", "prefill", "transfer", "decode_queue", "decode", "other")
"""A finished request's stages in order. `other` is what they leave of its end-to-end time: the way
from the cluster to the client or, of an endpoint that reports no stages, its whole TTFT."""

# What summary.json says of a per-request time.
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def summarise(
    info: RunInfo, requests: pl.DataFrame, spans: pl.DataFrame, samples: pl.DataFrame
) -> dict[str, Any]:
    """Sum a run up: the content of summary.json, SI units, None where undefined.

    The frames have the columns of records.REQUESTS, SPANS and SAMPLES. Times of requests
    (`ttft_s`, `tbt_s`, ...) are over finished requests; `attainment` is over offered ones.
    `goodput_rps` divides by the span from 0 to the last arrival or the last finish, whichever is
    later, so that neither a drained queue nor a quick refusal of everything makes it look better.
    With `info.measured_s` only the requests that arrive in it count, and times start with it.
    """
    return summarise_frame(info, per_request(requests, spans), samples)


def summarise_frame(info: RunInfo, frame: pl.DataFrame, samples: pl.DataFrame) -> dict[str, Any]:
    """`summarise`, for who has the `per_request` frame already: it takes most of the time."""
    every = frame.height
    frame = windowed(frame, info.measured_s)
    finished = frame.filter(pl.col("status") == "finished")
    return {
        **_counts(frame),
        **_times(finished),
        **against_slo(frame, info.slo, info.slo_by_class),
        **_efficiency(frame, finished),
        **_refusals(frame),
        "accounting": accounting(frame),
        "measured": _measured_window(info.measured_s, every - frame.height),
        "lag_s": _spread(frame["sent_s"] - frame["arrival_s"]),
        "client_cpu": info.client.get("cpu"),
        "load_by_role": _load_by_role(samples),
        "valid": info.valid,
        "source": info.source,
    }


def measured(frame: pl.DataFrame, window_s: tuple[float, float] | None) -> pl.DataFrame:
    """The rows that arrive in [start, end), seconds; all of them without a window."""
    if window_s is None:
        return frame
    return frame.filter(pl.col("arrival_s") >= window_s[0], pl.col("arrival_s") < window_s[1])


def per_request(requests: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """`requests`, each row with its times in seconds, null where undefined.

    `ttft_s`: intended arrival to first token; `ttft_from_send_s`: from the actual send. `tbt_s`:
    mean of the longest tenth of the gaps between tokens, rounded up to whole gaps; `tbt_s_max`,
    `tbt_s_p99`: the longest gap, and the 99th percentile of them. `tpot_s`: first to last token
    over output_tokens - 1. `e2e_s`: intended arrival to the end. `queue_s` ... `other_s`: STAGES.
    """
    return with_tbt(requests, request_tbt(requests, spans))


def with_tbt(requests: pl.DataFrame, times: pl.DataFrame) -> pl.DataFrame:
    """`per_request`, for who has `request_tbt` already: it takes most of the time."""
    first = pl.col("first_token_s")
    return requests.hstack(_rows_of(times, requests["request"])).select(
        *requests.columns,
        (first - pl.col("arrival_s")).alias("ttft_s"),
        (first - pl.col("sent_s")).alias("ttft_from_send_s"),
        "tbt_s",
        "tbt_s_max",
        "tbt_s_p99",
        pl.when(pl.col("output_tokens") > 1)
        .then(pl.col("gaps_sum_s") / (pl.col("output_tokens") - 1))
        .alias("tpot_s"),
        (pl.col("finished_s") - pl.col("arrival_s")).alias("e2e_s"),
        *_stage_columns(),
    )


def _rows_of(times: pl.DataFrame, requests: pl.Series) -> pl.DataFrame:
    """For each request the row of `times`, whose requests rise, but for the request; or nulls."""
    columns = times.drop("request")
    if not times.height:
        return columns.clear(requests.len())
    # A join would build a table of all requests, and spoil the order.
    known, wanted = times["request"].to_numpy(), requests.to_numpy()
    at = np.minimum(np.searchsorted(known, wanted), known.size - 1)
    found = pl.Series(known[at] == wanted)
    return columns.select(pl.all().gather(pl.Series(at).set(~found, None)))


def request_tbt(requests: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """One row a request with a gap, rising: request, gaps, gaps_sum_s, tbt_s, tbt_s_max, tbt_s_p99.

    `tbt_s` is the Mooncake paper's TBT of a request: the mean of its longest 10 % of gaps, that is
    of the longest ceil(gaps / 10).
    """
    ids, counts, gaps = _expand(requests, spans)
    ends = np.cumsum(counts)
    begins = ends - counts
    totals = np.add.reduceat(gaps, begins) if ids.size else gaps
    # Sorted in place, one request after another: short sorts in cache beat one long sort.
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        gaps[begin:end].sort()
    # Whole numbers: ceil(0.1 * 30) is 4 in floating point.
    tail = (counts + 9) // 10
    return pl.DataFrame(
        {
            "request": ids,
            "gaps": counts,
            "gaps_sum_s": totals,
            "tbt_s": _tail_sums(gaps, ends - tail, ends) / tail,
            "tbt_s_max": gaps[ends - 1],
            "tbt_s_p99": _quantile_in_runs(gaps, begins, counts, 0.99),
        },
        schema_overrides={"request": pl.Int64},
    )


def token_gaps(requests: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """One row a gap between consecutive tokens of a request, in time order: request, gap_s.

    The gap before a span's first token runs from the token before it, the request's first token
    or the last of the span before, so waiting between spans counts. Spans of requests that are
    not in `requests` are left out.
    """
    ids, counts, gaps = _expand(requests, spans)
    return pl.DataFrame({"request": np.repeat(ids, counts), "gap_s": gaps})


def attained(frame: pl.DataFrame, slo: Slo, by_class: Mapping[str, Slo] | None = None) -> pl.Series:
    """For each row of `per_request`: did it finish with TTFT and TBT within the bounds?

    A finished request without gaps (one token of output) meets any TBT bound. Requests of a class
    in `by_class` are held to its bounds, all others to `slo`.
    """
    ttft_s, tbt_s = _bound("ttft_s", slo, by_class), _bound("tbt_s", slo, by_class)
    within = (
        (pl.col("status") == "finished")
        & (pl.col("ttft_s") <= ttft_s).fill_null(False)
        & (pl.col("tbt_s") <= tbt_s).fill_null(True)
    )
    return frame.select(within.alias("attained")).to_series()


def _bound(name: str, slo: Slo, by_class: Mapping[str, Slo] | None) -> pl.Expr:
    bounds = {key: getattr(one, name) for key, one in (by_class or {}).items()}
    general = pl.lit(getattr(slo, name))
    if not bounds:
        return general
    return pl.col("class").replace_strict(bounds, default=general, return_dtype=pl.Float64)


def misses(
    frame: pl.DataFrame, slo: Slo, by_class: Mapping[str, Slo] | None = None
) -> dict[str, int]:
    """How many offered requests missed the SLO, and by what; each is counted once.

    Keys: rejected, failed, and of the finished ones late_first_token, slow_tokens, both.
    """
    late = (pl.col("ttft_s") > _bound("ttft_s", slo, by_class)).fill_null(True)
    slow = (pl.col("tbt_s") > _bound("tbt_s", slo, by_class)).fill_null(False)
    finished = pl.col("status") == "finished"
    causes = {
        "rejected": pl.col("status") == "rejected",
        "failed": pl.col("status") == "failed",
        "late_first_token": finished & late & ~slow,
        "slow_tokens": finished & slow & ~late,
        "both": finished & late & slow,
    }
    row = frame.select(cause.sum().alias(name) for name, cause in causes.items()).row(0, named=True)
    return {name: int(count) for name, count in row.items()}


# --- Frames for figures -------------------------------------------------------------------------
# Groups keep their order: sums in another order differ in the last bit, and so would the page.


def cumulative_shares(frame: pl.DataFrame, column: str, points: int = 400) -> pl.DataFrame:
    """The share of *offered* requests that finished with `column` at most so much: value_s, share.

    Rejected and failed requests never reach any value, so the curve may end below 1. At most
    `points` rows, evenly spaced in share, the smallest and the largest value among them.
    """
    finished = frame.select("status", column).filter(pl.col("status") == "finished")
    values = np.sort(finished[column].drop_nulls().to_numpy())
    if not values.size:
        return pl.DataFrame(schema={"value_s": pl.Float64, "share": pl.Float64})
    ranks = np.unique(np.linspace(0, values.size - 1, min(points, values.size)).astype(np.int64))
    # Requests without a value of this kind (no gaps) meet every bound: the curve starts with them.
    without = finished.height - values.size if column == "tbt_s" else 0
    return pl.DataFrame(
        {"value_s": values[ranks], "share": (ranks + 1 + without) / max(frame.height, 1)}
    )


def attainment_curve(frame: pl.DataFrame, slo: Slo, bounds_s: Sequence[float]) -> pl.DataFrame:
    """Attainment at each TBT bound, with the TTFT bound of `slo`: tbt_bound_s, attainment."""
    in_time = frame.select("status", "ttft_s", "tbt_s").filter(
        (pl.col("status") == "finished") & (pl.col("ttft_s") <= slo.ttft_s).fill_null(False)
    )
    tbt = np.sort(in_time["tbt_s"].fill_null(0.0).to_numpy())
    met = np.searchsorted(tbt, np.asarray(bounds_s, dtype=np.float64), side="right")
    return pl.DataFrame(
        {
            "tbt_bound_s": np.asarray(bounds_s, dtype=np.float64),
            "attainment": met / max(frame.height, 1),
        }
    )


def stage_means(frame: pl.DataFrame) -> dict[str, float | None]:
    """Mean seconds in each of STAGES over the finished requests of a `per_request` frame."""
    columns = [f"{stage}_s" for stage in STAGES]
    finished = frame.select("status", *columns).filter(pl.col("status") == "finished")
    return {stage: _number(finished[f"{stage}_s"].mean()) for stage in STAGES}


def input_quartiles(frames: Sequence[pl.DataFrame]) -> tuple[int, int, int]:
    """The quartiles of input length over all requests of `frames`, in tokens."""
    lengths = np.concatenate([frame["input_tokens"].to_numpy() for frame in frames])
    assert lengths.size
    low, middle, high = np.quantile(lengths, (0.25, 0.5, 0.75))
    return round(low), round(middle), round(high)


def stages_by_input(frame: pl.DataFrame, edges: Sequence[int]) -> list[dict[str, float | None]]:
    """`stage_means` of the requests in each input-length class; an edge belongs to the lower one.

    `edges` rise; the answer has one more entry than `edges`.
    """
    bounds = [-1, *edges, np.iinfo(np.int64).max]
    return [
        stage_means(frame.filter(pl.col("input_tokens").is_between(low + 1, high)))
        for low, high in pairwise(bounds)
    ]


def load_over_time(samples: pl.DataFrame, bins: int = 120) -> pl.DataFrame:
    """Load by role and time bin: role, time_s (middle of the bin), mean, low, high.

    `mean` is over instances and samples of the bin; `low` and `high` are the lowest and highest
    *instance*, each averaged over the bin, so that they show imbalance rather than flicker.
    """
    width = _bin_width(samples["time_s"], bins)
    return (
        samples.filter(pl.col("load").is_finite())
        .with_columns(_bin("time_s", width, bins))
        .group_by("role", "instance", "bin", maintain_order=True)
        .agg(pl.col("load").mean())
        .group_by("role", "bin", maintain_order=True)
        .agg(
            pl.col("load").mean().alias("mean"),
            pl.col("load").min().alias("low"),
            pl.col("load").max().alias("high"),
        )
        .sort("role", "bin")
        .select("role", _middle(width), "mean", "low", "high")
    )


def hits_over_time(frame: pl.DataFrame, bins: int = 60) -> pl.DataFrame:
    """Reused over input tokens of the requests that arrived in each bin: time_s, hit_ratio."""
    known = _prefilled(frame)
    width = _bin_width(known["arrival_s"], bins)
    return (
        known.with_columns(_bin("arrival_s", width, bins))
        .group_by("bin", maintain_order=True)
        .agg(pl.col("reused_tokens").sum() / pl.col("input_tokens").sum())
        .sort("bin")
        .select(_middle(width), pl.col("reused_tokens").alias("hit_ratio"))
    )


def pool_fill_over_time(samples: pl.DataFrame, bins: int = 60) -> pl.DataFrame:
    """Used over capacity of all KVCache pools together: time_s, fill (0 to 1)."""
    pools = samples.drop_nulls(["pool_used_blocks", "pool_capacity_blocks"]).filter(
        pl.col("pool_capacity_blocks") > 0
    )
    width = _bin_width(pools["time_s"], bins)
    return (
        pools.with_columns(_bin("time_s", width, bins))
        .group_by("bin", maintain_order=True)
        .agg(pl.col("pool_used_blocks").sum() / pl.col("pool_capacity_blocks").sum())
        .sort("bin")
        .select(_middle(width), pl.col("pool_used_blocks").alias("fill"))
    )


def refusals_over_time(frame: pl.DataFrame, bins: int = 40) -> pl.DataFrame:
    """Rejected and failed requests by arrival: time_s, status, reason, requests_per_s."""
    width = _bin_width(frame["arrival_s"], bins)
    return (
        frame.select("status", "reason", "arrival_s")
        .filter(pl.col("status") != "finished")
        .with_columns(_bin("arrival_s", width, bins), pl.col("reason").fill_null("no reason given"))
        .group_by("status", "reason", "bin", maintain_order=True)
        .agg((pl.len() / width).alias("requests_per_s"))
        .sort("status", "reason", "bin")
        .select(_middle(width), "status", "reason", "requests_per_s")
    )


# --- Parts of the summary -----------------------------------------------------------------------


def _counts(frame: pl.DataFrame) -> dict[str, Any]:
    status = frame["status"]
    return {
        "offered": frame.height,
        "finished": int((status == "finished").sum()),
        "rejected": int((status == "rejected").sum()),
        "failed": int((status == "failed").sum()),
        "rejected_by_reason": _by_reason(frame, "rejected"),
        "failed_by_reason": _by_reason(frame, "failed"),
        "duration_s": _number(frame["finished_s"].max()),
        "offered_rps": _ratio(frame.height, _number(frame["arrival_s"].max())),
    }


def _times(finished: pl.DataFrame) -> dict[str, Any]:
    return {
        "ttft_s": _spread(finished["ttft_s"]),
        "ttft_from_send_s": _spread(finished["ttft_from_send_s"]),
        "tbt_s": _spread(finished["tbt_s"]),
        "max_tbt_s": _spread(finished["tbt_s_max"]),
        "tpot_s": _spread(finished["tpot_s"]),
        "e2e_s": _spread(finished["e2e_s"]),
        "stages_s": stage_means(finished),
    }


def against_slo(frame: pl.DataFrame, slo: Slo, by_class: Mapping[str, Slo]) -> dict[str, Any]:
    """The part of the summary that depends on the SLO, of a `windowed` frame."""
    met = int(attained(frame, slo, by_class).sum())
    finished = int((frame["status"] == "finished").sum())
    goodput = _ratio(met, _goodput_span(frame))
    return {
        "slo": {"ttft_s": slo.ttft_s, "tbt_s": slo.tbt_s},
        "attainment": _ratio(met, frame.height),
        "attainment_by_tbt": {
            str(bound): _ratio(int(attained(frame, Slo(slo.ttft_s, bound)).sum()), frame.height)
            for bound in TBT_BOUNDS_S
        },
        "missed_by": misses(frame, slo, by_class),
        "by_class": _by_class(frame, slo, by_class),
        "attainment_of_finished": _ratio(met, finished),
        "goodput_rps": goodput,
        # A ratio of rates: below the attainment where the run went on after the last arrival.
        "goodput_of_offered": _ratio(
            goodput, _ratio(frame.height, _number(frame["arrival_s"].max()))
        ),
    }


def _by_class(
    frame: pl.DataFrame, slo: Slo, by_class: Mapping[str, Slo]
) -> dict[str, dict[str, Any]]:
    """Attainment and times of each class of the trace; {} where it has none."""
    if "class" not in frame.columns:
        return {}
    found = {}
    for name in frame["class"].drop_nulls().unique().sort().to_list():
        rows = frame.select("class", "status", "ttft_s", "tbt_s").filter(pl.col("class") == name)
        finished = rows.filter(pl.col("status") == "finished")
        bounds = by_class.get(name, slo)
        found[name] = {
            "slo": {"ttft_s": bounds.ttft_s, "tbt_s": bounds.tbt_s},
            "offered": rows.height,
            "finished": finished.height,
            "attainment": _ratio(int(attained(rows, bounds).sum()), rows.height),
            "ttft_s": _spread(finished["ttft_s"]),
            "tbt_s": _spread(finished["tbt_s"]),
        }
    return found


def _measured_window(window_s: tuple[float, float] | None, excluded: int) -> dict[str, Any] | None:
    if window_s is None:
        return None
    return {"start_s": window_s[0], "end_s": window_s[1], "excluded": excluded}


def windowed(frame: pl.DataFrame, window_s: tuple[float, float] | None) -> pl.DataFrame:
    """The `measured` rows, their times counted from the window's start: rates are over it."""
    if window_s is None:
        return frame
    return measured(frame, window_s).with_columns(
        pl.col("arrival_s", "sent_s", "finished_s") - window_s[0]
    )


def _efficiency(frame: pl.DataFrame, finished: pl.DataFrame) -> dict[str, Any]:
    known = _prefilled(frame)
    return {
        "output_tokens_per_s": _ratio(
            _number(frame["output_tokens"].sum()), _number(frame["finished_s"].max())
        ),
        "prefix_hit_ratio": _ratio(
            _number(known["reused_tokens"].sum()), _number(known["input_tokens"].sum())
        ),
        "prefill_busy_s_mean": _number(finished["prefill_busy_s"].mean()),
    }


def _prefilled(frame: pl.DataFrame) -> pl.DataFrame:
    """Requests whose prompt was worked on, and of which it is known how much was reused."""
    # One refused on arrival reused nothing because it was never looked up: it does not count.
    worked_on = (pl.col("status") == "finished") | pl.col("prefill_end_s").is_not_null()
    columns = ("status", "arrival_s", "prefill_end_s", "input_tokens", "reused_tokens")
    return frame.select(columns).filter(worked_on & pl.col("reused_tokens").is_not_null())


def _refusals(frame: pl.DataFrame) -> dict[str, Any]:
    rejected = frame.filter(pl.col("status") == "rejected")
    wasted = frame.filter((pl.col("status") != "finished") & pl.col("prefill_end_s").is_not_null())
    computed = wasted["input_tokens"] - wasted["reused_tokens"].fill_null(0)
    # An endpoint that reports no prefill cannot be said to have wasted none.
    reported = frame["prefill_end_s"].count() > 0
    return {
        "wasted_prefill_tokens": int(computed.sum()) if reported else None,
        "time_to_rejection_s": _spread(rejected["e2e_s"]),
        "retry_after_s": _spread(
            rejected["retry_after_s"] if "retry_after_s" in frame.columns else pl.Series([])
        ),
    }


def _load_by_role(samples: pl.DataFrame) -> dict[str, dict[str, float | None]]:
    loads = samples.group_by("role", maintain_order=True).agg(
        pl.col("load").mean().alias("mean"), pl.col("load").max().alias("max")
    )
    return {
        role: {"mean": _number(mean), "max": _number(most)}
        for role, mean, most in loads.sort("role").iter_rows()
    }


def _by_reason(frame: pl.DataFrame, status: str) -> dict[str, int]:
    reasons = frame.filter(pl.col("status") == status)["reason"].fill_null("no reason given")
    counts = reasons.value_counts(name="requests").sort(
        ["requests", "reason"], descending=[True, False]
    )
    return {reason: int(requests) for reason, requests in counts.iter_rows()}


def _goodput_span(frame: pl.DataFrame) -> float | None:
    ends = [_number(frame["arrival_s"].max()), _number(frame["finished_s"].max())]
    return max((end for end in ends if end is not None), default=None)


def _spread(series: pl.Series) -> dict[str, float | None]:
    """Mean, p50, p90 and p99 of the values that are not null."""
    values = series.drop_nulls().to_numpy()
    if not values.size:
        return {"mean": None, **dict.fromkeys(_QUANTILES)}
    points = np.quantile(values, list(_QUANTILES.values())).tolist()
    return {"mean": _number(values.mean()), **dict(zip(_QUANTILES, points, strict=True))}


def _ratio(part: float | None, whole: float | None) -> float | None:
    if part is None or not whole:
        return None
    return part / whole


def _number(value: Any) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(value)


# --- From spans to gaps -------------------------------------------------------------------------


def _expand(requests: pl.DataFrame, spans: pl.DataFrame) -> tuple[Ints, Ints, Floats]:
    """(ids, gaps of each id, all gaps): ids rise; the gaps of an id are together, in time order."""
    rows = _spans_in_order(requests, spans)
    steps = rows["steps"].to_numpy()
    request = rows["request"].to_numpy()
    begins = np.cumsum(steps) - steps
    # In place, so that no more than two arrays of one number a token are alive at once.
    gaps = np.arange(steps.sum(), dtype=np.float64)
    gaps -= np.repeat(begins.astype(np.float64), steps)
    gaps *= np.repeat(rows["growth_s"].to_numpy(), steps)
    gaps += np.repeat(rows["first_gap_s"].to_numpy(), steps)
    gaps[begins] = rows["lead_s"].to_numpy()
    firsts = np.flatnonzero(np.diff(request, prepend=-1)) if request.size else begins
    counts = np.add.reduceat(steps, firsts) if request.size else steps
    return request[firsts], counts, gaps


def _spans_in_order(requests: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Spans sorted by request, each with `lead_s`: the gap that ends with its first token."""
    steps, gap = pl.col("steps"), pl.col("first_gap_s")
    end = pl.col("start_s") + steps * gap + pl.col("growth_s") * steps * (steps - 1) / 2
    follows = pl.col("request") == pl.col("request").shift(1)
    before = pl.when(follows.fill_null(False)).then(end.shift(1)).otherwise("first_token_s")
    return (
        spans.filter(steps > 0)
        .join(requests.select("request", "first_token_s"), on="request", how="inner")
        .sort("request", "start_s", maintain_order=True)
        .select(
            "request",
            "steps",
            "first_gap_s",
            "growth_s",
            # With no first token nothing came before: the span's own gap is all that is known.
            (pl.col("start_s") + gap - before).fill_null(gap).alias("lead_s"),
        )
    )


def _tail_sums(sorted_gaps: Floats, begins: Ints, ends: Ints) -> Floats:
    if not begins.size:
        return np.zeros(0)
    # reduceat sums between consecutive indices: keep every other one, and let the last run out.
    edges = np.column_stack([begins, ends]).ravel()[:-1]
    sums: Floats = np.add.reduceat(sorted_gaps, edges)[::2]
    return sums


def _quantile_in_runs(sorted_gaps: Floats, begins: Ints, counts: Ints, share: float) -> Floats:
    position = share * (counts - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, counts - 1)
    low, high = sorted_gaps[begins + below], sorted_gaps[begins + above]
    value: Floats = low + (high - low) * (position - below)
    return value


# --- Expressions --------------------------------------------------------------------------------


def _stage_columns() -> list[pl.Expr]:
    first, finished = pl.col("first_token_s"), pl.col("finished_s")
    decode_start = pl.coalesce("decode_start_s", "first_token_s")
    stages = {
        # From arrival to placement, and in the prefill instance's queue.
        "queue": (pl.col("placed_s") - pl.col("arrival_s"))
        + (pl.col("prefill_start_s") - pl.col("fetched_s")),
        "reuse_load": pl.col("fetched_s") - pl.col("placed_s"),
        "prefill": pl.col("prefill_end_s") - pl.col("prefill_start_s"),
        "transfer": pl.col("transferred_s") - pl.col("prefill_end_s"),
        "decode_queue": decode_start - first,
        "decode": finished - decode_start,
    }
    known = pl.sum_horizontal(list(stages.values()))
    stages["other"] = finished - pl.col("arrival_s") - known
    return [expression.alias(f"{name}_s") for name, expression in stages.items()]


def _bin_width(times: pl.Series, bins: int) -> float:
    # A run of no length still has one bin.
    return max(_number(times.max()) or 0.0, 1e-9) / bins


def _bin(column: str, width: float, bins: int) -> pl.Expr:
    # The last instant belongs to the last bin.
    return (pl.col(column) / width).floor().cast(pl.Int64).clip(0, bins - 1).alias("bin")


def _middle(width: float) -> pl.Expr:
    return ((pl.col("bin") + 0.5) * width).alias("time_s")
