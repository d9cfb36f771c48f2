"""What do people look at in a run beyond its summary? Frames for figures one can click. Pure.

Columns are selected before rows are filtered: a filter copies all that the frame has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.slo import Slo

TBT_STATISTICS = {
    "tbt_s": "mean of the longest 10 % of gaps",
    "tbt_s_p99": "99th percentile of gaps",
    "tbt_s_max": "longest gap",
    "tpot_s": "mean gap (TPOT)",
}
"""What may be held to the TBT bound; the first is the Mooncake paper's and the summary's."""


def judged(
    frame: pl.DataFrame, slo: Slo, by_class: Mapping[str, Slo], statistic: str = "tbt_s"
) -> dict[str, Any]:
    """`metrics.against_slo` with another statistic of TBT_STATISTICS held to the TBT bound."""
    return metrics.against_slo(with_statistic(frame, statistic), slo, by_class)


def with_statistic(frame: pl.DataFrame, statistic: str) -> pl.DataFrame:
    """A `per_request` frame whose tbt_s is that statistic of a request's gaps."""
    assert statistic in TBT_STATISTICS, statistic
    return frame.with_columns(pl.col(statistic).alias("tbt_s"))


def attainment_surface(
    frame: pl.DataFrame, ttft_bounds_s: Sequence[float], tbt_bounds_s: Sequence[float]
) -> pl.DataFrame:
    """Attainment at every pair of bounds (rising): ttft_bound_s, tbt_bound_s, attainment.

    Each is what `metrics.attained` says at these bounds; all pairs cost one pass over the rows.
    """
    finished = frame.select("status", "ttft_s", "tbt_s").filter(
        (pl.col("status") == "finished") & pl.col("ttft_s").is_not_null()
    )
    ttft, tbt = np.asarray(ttft_bounds_s, dtype=float), np.asarray(tbt_bounds_s, dtype=float)
    # The first bound that a request meets; those beyond the last are met by none.
    first_ttft = np.searchsorted(ttft, finished["ttft_s"].to_numpy(), side="left")
    first_tbt = np.searchsorted(tbt, finished["tbt_s"].fill_null(-1.0).to_numpy(), side="left")
    shape = (ttft.size + 1, tbt.size + 1)
    cells = np.bincount(
        np.ravel_multi_index((first_ttft, first_tbt), shape), minlength=shape[0] * shape[1]
    )
    met = cells.reshape(shape)[:-1, :-1].cumsum(axis=0).cumsum(axis=1)
    return pl.DataFrame(
        {
            "ttft_bound_s": np.repeat(ttft, tbt.size),
            "tbt_bound_s": np.tile(tbt, ttft.size),
            "attainment": met.ravel() / max(frame.height, 1),
        }
    )


def cumulative(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """`metrics.cumulative_shares` with, at each point, a request that has that value."""
    curve = metrics.cumulative_shares(frame, column)
    holders = (
        frame.select("request", "status", pl.col(column).alias("value_s"))
        .filter(
            (pl.col("status") == "finished") & pl.col("value_s").is_in(curve["value_s"].implode())
        )
        .unique("value_s", keep="first", maintain_order=True)
    )
    # Looking few values up is cheaper than sorting a million requests by theirs.
    found = curve.join(holders, on="value_s", how="left", maintain_order="left")
    return found.select("value_s", "share", "request")


def _rows_of(frame: pl.DataFrame, column: str) -> npt.NDArray[np.int64]:
    """Positions of the finished requests that have a value."""
    has = (pl.col("status") == "finished") & pl.col(column).is_not_null()
    return np.flatnonzero(frame.select(has).to_series().to_numpy())


def quantiles_over_time(frame: pl.DataFrame, column: str, bins: int = 60) -> pl.DataFrame:
    """Of the requests that arrived in each bin and finished: time_s, p50, p90, p99, request.

    `time_s` is the middle of the bin, `request` the one with the largest value.
    """
    known = frame.select("request", "status", "arrival_s", column).filter(
        (pl.col("status") == "finished") & pl.col(column).is_not_null()
    )
    width = _width(frame["arrival_s"], bins)
    quantiles = [
        pl.col(column).quantile(share, "linear").alias(name)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    ]
    return (
        known.select("request", column, _bin("arrival_s", width, bins))
        .group_by("bin")
        .agg(*quantiles, pl.col("request").get(pl.col(column).arg_max()))
        .sort("bin")
        .select(_middle(width), "p50", "p90", "p99", "request")
    )


def points(frame: pl.DataFrame, column: str, most: int = 1500) -> pl.DataFrame:
    """Finished requests as points: request, input_tokens, reused_tokens, and `column`.

    Of more than `most` those with the largest values are all there (a tenth), and the rest is an
    even sample by row.
    """
    at = _rows_of(frame, column)
    if at.size > most:
        values = frame[column].to_numpy()[at]
        worst = np.argpartition(values, -most // 10)[-most // 10 :]
        even = np.linspace(0, at.size - 1, most - worst.size).astype(np.int64)
        at = at[np.union1d(worst, even)]
    return frame.select("request", "arrival_s", "input_tokens", "reused_tokens", column)[at]


def stage_table(frame: pl.DataFrame) -> pl.DataFrame:
    """`metrics.stage_means` as a frame: stage, seconds."""
    means = metrics.stage_means(frame)
    return pl.DataFrame(
        {"stage": list(means), "seconds": list(means.values())},
        schema={"stage": pl.String, "seconds": pl.Float64},
    )


def slowest(frame: pl.DataFrame, column: str, most: int = 12) -> pl.DataFrame:
    """The rows with the largest `column`, largest first."""
    rows = frame.select(column).with_row_index().drop_nulls().top_k(most, by=column)
    return frame[rows["index"].to_list()]


def load_map(
    samples: pl.DataFrame, worst: pl.DataFrame, column: str = "load", bins: int = 90
) -> pl.DataFrame:
    """Mean of a column of the samples by instance and time bin.

    Columns: role, instance, time_s, value, request. A bin without a sample has no row: nothing is
    known of the instance there. `request` is that of `worst_requests` with the same bins.
    """
    known = samples.filter(pl.col(column).is_not_null())
    if known.schema[column].is_float():
        known = known.filter(pl.col(column).is_finite())
    width = _width(samples["time_s"], bins)
    return (
        known.with_columns(_bin("time_s", width, bins))
        .group_by("role", "instance", "bin")
        .agg(pl.col(column).cast(pl.Float64).mean().alias("value"))
        .with_columns(_number_of("instance"))
        .join(worst, on=["instance", "bin"], how="left")
        .sort("role", "number", "instance", "bin")
        .select("role", "instance", _middle(width), "value", "request")
    )


def worst_requests(samples: pl.DataFrame, frame: pl.DataFrame, bins: int = 90) -> pl.DataFrame:
    """Of every instance and time bin of the samples one request: instance, bin, request.

    The one with the worst TTFT of those that began their prefill there in that bin, or, where none
    did, with the worst TBT of those that began to decode.
    """
    width = _width(samples["time_s"], bins)
    parts = [
        frame.select("request", place, at, by)
        .filter(pl.col(place).is_not_null() & pl.col(at).is_not_null())
        .group_by(pl.col(place).alias("instance"), _bin(at, width, bins))
        .agg(pl.col("request").get(pl.col(by).fill_null(0.0).arg_max()))
        for place, at, by in (
            ("prefill", "prefill_start_s", "ttft_s"),
            ("decode", "decode_start_s", "tbt_s"),
        )
    ]
    return pl.concat(parts).unique(["instance", "bin"], keep="first", maintain_order=True)


def silences(samples: pl.DataFrame) -> pl.DataFrame:
    """When an instance reported nothing though others did: instance, start_s, end_s.

    A silence is more than three of the run's usual intervals without a row of that instance.
    """
    schema = {"instance": pl.String, "start_s": pl.Float64, "end_s": pl.Float64}
    instants = samples["time_s"].unique().sort()
    if instants.len() < 3:
        return pl.DataFrame(schema=schema)
    usual = instants.diff().drop_nulls().median()
    assert isinstance(usual, float)
    ends = pl.DataFrame({"time_s": [instants[0], instants[-1]]})
    names = samples.select("instance").unique().join(ends, how="cross")
    return (
        pl.concat([samples.select("instance", "time_s"), names])
        .unique()
        .sort("instance", "time_s")
        .with_columns(end_s=pl.col("time_s").shift(-1).over("instance"))
        .filter(pl.col("end_s") - pl.col("time_s") > 3 * usual)
        .select("instance", pl.col("time_s").alias("start_s"), "end_s")
    )


def sources_over_time(frame: pl.DataFrame, bins: int = 60) -> pl.DataFrame:
    """Where prompts came from: time_s, own, fetched, computed (shares of the input tokens).

    `own` was in the instance's own cache, `fetched` came from another instance.
    """
    known = frame.select(
        *("status", "arrival_s", "prefill_end_s", "input_tokens", "reused_tokens"), "fetched_tokens"
    ).filter(
        pl.col("reused_tokens").is_not_null()
        & ((pl.col("status") == "finished") | pl.col("prefill_end_s").is_not_null())
    )
    width = _width(frame["arrival_s"], bins)
    fetched = pl.col("fetched_tokens").fill_null(0).sum()
    reused, inputs = pl.col("reused_tokens").sum(), pl.col("input_tokens").sum()
    return (
        known.with_columns(_bin("arrival_s", width, bins))
        .group_by("bin")
        .agg(
            own=(reused - fetched) / inputs,
            fetched=fetched / inputs,
            computed=(inputs - reused) / inputs,
        )
        .sort("bin")
        .select(_middle(width), "own", "fetched", "computed")
    )


def replicas_over_time(frame: pl.DataFrame, bins: int = 60) -> pl.DataFrame:
    """How many instances held a block that was asked for: time_s, replicas (mean), requests.

    Mean over the requests that arrived in the bin and found somebody with a part of their prefix,
    so that a block counts as often as it is asked for: hot ones most.
    """
    known = frame.filter(pl.col("prefix_replicas").is_not_null())
    width = _width(frame["arrival_s"], bins)
    return (
        known.with_columns(_bin("arrival_s", width, bins))
        .group_by("bin")
        .agg(pl.col("prefix_replicas").mean().alias("replicas"), pl.len().alias("requests"))
        .sort("bin")
        .select(_middle(width), "replicas", "requests")
    )


def evictions_over_time(samples: pl.DataFrame, bins: int = 60) -> pl.DataFrame:
    """Blocks that all pools together let go: time_s, blocks_per_s."""
    width = _width(samples["time_s"], bins)
    known = samples.filter(pl.col("evicted_blocks").is_not_null()).sort("instance", "time_s")
    # The count of an instance that was lost begins anew.
    fresh = pl.col("evicted_blocks").diff().over("instance").fill_null(0).clip(lower_bound=0)
    return (
        known.with_columns(fresh.alias("fresh"), _bin("time_s", width, bins))
        .group_by("bin")
        .agg(pl.col("fresh").sum() / width)
        .sort("bin")
        .select(_middle(width), pl.col("fresh").alias("blocks_per_s"))
    )


def pool_sizes(samples: pl.DataFrame) -> tuple[float, float] | None:
    """Blocks of one instance's KVCache pool (mean), and of all together; None where not known."""
    pools = samples.filter((pl.col("role") != "decode") & (pl.col("pool_capacity_blocks") > 0))
    if not pools.height:
        return None
    sizes = pools.group_by("instance").agg(pl.col("pool_capacity_blocks").max())
    total = float(sizes["pool_capacity_blocks"].sum())
    return total / sizes.height, total


def refused(frame: pl.DataFrame) -> pl.DataFrame:
    """Rejected and failed requests by status and reason: what each reason cost and spared.

    Columns: status, reason, requests, spared_tokens (input that was never computed),
    wasted_tokens (computed all the same), request (the first of them).
    """
    reused = pl.col("reused_tokens").fill_null(0)
    computed = pl.col("prefill_end_s").is_not_null()
    tokens = pl.col("input_tokens") - reused
    return (
        frame.filter(pl.col("status") != "finished")
        .with_columns(pl.col("reason").fill_null("no reason given"))
        .group_by("status", "reason")
        .agg(
            pl.len().cast(pl.Int64).alias("requests"),
            pl.when(computed).then(0).otherwise("input_tokens").sum().alias("spared_tokens"),
            pl.when(computed).then(tokens).otherwise(0).sum().alias("wasted_tokens"),
            pl.col("request").first(),
        )
        .sort(["requests", "reason"], descending=[True, False])
    )


def wasted_over_time(frame: pl.DataFrame, bins: int = 60) -> pl.DataFrame:
    """Prompt tokens computed for requests that did not finish: time_s, tokens_per_s."""
    width = _width(frame["arrival_s"], bins)
    lost = (pl.col("status") != "finished") & pl.col("prefill_end_s").is_not_null()
    tokens = pl.col("input_tokens") - pl.col("reused_tokens").fill_null(0)
    return (
        frame.select(
            *("status", "prefill_end_s", "input_tokens", "reused_tokens"),
            _bin("arrival_s", width, bins),
        )
        .group_by("bin")
        .agg(pl.when(lost).then(tokens).otherwise(0).sum().alias("tokens") / width)
        .sort("bin")
        .select(_middle(width), pl.col("tokens").alias("tokens_per_s"))
    )


def predictions(frame: pl.DataFrame, most: int = 2500) -> pl.DataFrame:
    """TTFT as the Conductor predicted it when it placed a request, and as it came.

    Columns: request, predicted_s (from arrival), ttft_s. At most about `most` rows, evenly by row.
    """
    predicted = pl.col("predicted_ttft_s") + (pl.col("placed_s") - pl.col("arrival_s"))
    known = frame.select("request", predicted.alias("predicted_s"), "ttft_s").drop_nulls()
    return known.gather_every(max(1, known.height // most))


def last_of_server(metrics_rows: pl.DataFrame, starts: Sequence[str]) -> pl.DataFrame:
    """Of the scraped series whose names begin so, the last value: name, labels, value."""
    wanted = pl.any_horizontal(pl.col("name").str.starts_with(start) for start in starts)
    last = metrics_rows.filter(wanted).sort("time_s").group_by("name", "labels").last()
    return last.sort("name", "labels").select("name", "labels", "value")


STAGES_OF_A_JOURNEY = (
    ("queue", "arrival_s", "placed_s"),
    ("reuse_load", "placed_s", "fetched_s"),
    ("queue", "fetched_s", "prefill_start_s"),
    ("prefill", "prefill_start_s", "prefill_end_s"),
    ("transfer", "prefill_end_s", "transferred_s"),
    ("other", "transferred_s", "first_token_s"),
    ("decode_queue", "first_token_s", "decode_start_s"),
    ("decode", "decode_start_s", "finished_s"),
)


def journey(row: Mapping[str, Any], chunks: pl.DataFrame | None = None) -> pl.DataFrame:
    """One request's stages in order: stage, where, part, start_s, end_s (both from its arrival).

    A stage whose start or end was not recorded has no row; one of no length is there. With
    `chunks` (records.CHUNKS, its own) a prefill in chunks has a row for each, and where it is known
    when its transfer began, that has one for what the prefill hid and one for the rest.
    """
    places = dict.fromkeys(("reuse_load", "prefill"), row["prefill"])
    places |= dict.fromkeys(("decode_queue", "decode"), row["decode"])
    found = []
    for stage, start, end in STAGES_OF_A_JOURNEY:
        begins, ends = row[start], row[end]
        # Whoever decodes where it was prefilled transfers nothing.
        is_moved = stage != "transfer" or row["prefill"] is None or row["prefill"] != row["decode"]
        if begins is not None and ends is not None and is_moved:
            where = places.get(stage) or ("Conductor" if start == "arrival_s" else row["prefill"])
            if stage == "transfer" and row["decode"] is not None:
                where = f"to {row['decode']}"
            parts = _parts_of(stage, row, chunks) or [("", begins, ends)]
            found += [(stage, where, *part) for part in parts]
    text, time = pl.String, pl.Float64
    schema = {"stage": text, "where": text, "part": text, "start_s": time, "end_s": time}
    frame = pl.DataFrame(found, schema=schema, orient="row")
    return frame.with_columns(pl.col("start_s", "end_s") - row["arrival_s"])


def _parts_of(
    stage: str, row: Mapping[str, Any], chunks: pl.DataFrame | None
) -> list[tuple[str, float, float]]:
    """(what, start, end) of each part of a stage; none where it has no parts."""
    if stage == "prefill" and chunks is not None:
        rows = chunks.select("tokens", "start_s", "end_s").iter_rows()
        return [
            (f"chunk {number} of {chunks.height}, {tokens:,} tokens", start_s, end_s)
            for number, (tokens, start_s, end_s) in enumerate(rows, start=1)
        ]
    began_s, hidden_s = row.get("transfer_start_s"), row["prefill_end_s"]
    if stage == "transfer" and began_s is not None:
        parts = [
            ("behind the prefill, layer by layer", began_s, hidden_s),
            ("after the prefill", max(began_s, hidden_s), row["transferred_s"]),
        ]
        return [part for part in parts if part[1] <= part[2]]
    return []


def gaps_of(row: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Of one request, each token after the first: time_s (from its arrival), gap_s."""
    gaps = metrics.token_gaps(row, spans)
    first_s = (row["first_token_s"] - row["arrival_s"]).item()
    return gaps.select((pl.col("gap_s").cum_sum() + (first_s or 0.0)).alias("time_s"), "gap_s")


def _width(times: pl.Series, bins: int) -> float:
    latest = times.max()
    return max(float(latest) if isinstance(latest, float) else 0.0, 1e-9) / bins


def _bin(column: str, width: float, bins: int) -> pl.Expr:
    return (pl.col(column) / width).floor().cast(pl.Int64).clip(0, bins - 1).alias("bin")


def _middle(width: float) -> pl.Expr:
    return ((pl.col("bin") + 0.5) * width).alias("time_s")


def _number_of(column: str) -> pl.Expr:
    """decode-10 after decode-9."""
    return pl.col(column).str.extract(r"(\d+)$").cast(pl.Int64).fill_null(-1).alias("number")
