"""Which of a server's own metrics say how busy it was, whatever server it is? Pure."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True, slots=True)
class Gauge:
    """One thing that servers tell, each under its own name."""

    key: str
    title: str
    names: tuple[str, ...]
    is_share: bool = False
    """Averaged over a server's instances; counts are summed."""


GAUGES = (
    Gauge(
        "server-running",
        "Requests that the server works on",
        (
            *("vllm:num_requests_running", "sglang:num_running_reqs"),
            *("dynamo_frontend_inflight_requests", "tgi_batch_current_size"),
        ),
    ),
    Gauge(
        "server-waiting",
        "Requests that wait in the server",
        (
            *("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
            *("dynamo_frontend_queued_requests", "tgi_queue_size"),
        ),
    ),
    Gauge(
        "server-cache",
        "KVCache in use in the server",
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
        is_share=True,
    ),
)


def over_time(metrics: pl.DataFrame, gauge: Gauge) -> pl.DataFrame:
    """The gauge over a frame of records.SERVER_METRICS, all series together: time_s, value.

    Values hold until the next row of their series. No rows where the server tells no such thing.
    """
    told = set(metrics["name"].unique())
    name = next((one for one in gauge.names if one in told), None)
    if name is None:
        return pl.DataFrame(schema={"time_s": pl.Float64, "value": pl.Float64})
    wide = (
        metrics.filter(pl.col("name") == name)
        .pivot(on="labels", index="time_s", values="value", aggregate_function="last")
        .sort("time_s")
        .fill_null(strategy="forward")
    )
    series = pl.all().exclude("time_s")
    together = pl.mean_horizontal(series) if gauge.is_share else pl.sum_horizontal(series)
    end_s = metrics["time_s"].max()
    frame = wide.select("time_s", together.alias("value"))
    # The last value holds to the end of the run, where other series still change.
    return pl.concat([frame, frame.tail(1).with_columns(time_s=pl.lit(end_s, pl.Float64))])
