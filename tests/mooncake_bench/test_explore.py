"""Are the frames for a closer look what metrics says, and what can be counted by hand?"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest

from mooncake_bench import explore, metrics
from mooncake_bench.records import CHUNKS, REQUESTS, SAMPLES, Run, conform
from mooncake_bench.slo import Slo

ARun = Callable[..., Run]


def frame_of(run: Run) -> pl.DataFrame:
    return metrics.per_request(run.requests, run.spans)


def test_the_surface_is_attainment_at_every_pair(a_run: ARun) -> None:
    """Each cell is what `metrics.attained` says, with refused requests among the offered."""
    frame = frame_of(a_run("run", requests=200, reject=0.1))
    surface = explore.attainment_surface(frame, [0.0, 1.0, 30.0], [0.0, 0.05, 0.1])
    for ttft_s, tbt_s, share in surface.iter_rows():
        met = metrics.attained(frame, Slo(ttft_s, tbt_s)).sum()
        assert share == met / frame.height


def test_a_point_of_a_curve_knows_a_request_that_has_its_value(a_run: ARun) -> None:
    """What a click on the curve opens."""
    frame = frame_of(a_run("run", requests=900))
    curve = explore.cumulative(frame, "ttft_s")
    joined = curve.join(frame.select("request", "ttft_s"), on="request")
    assert joined.height == curve.height
    assert joined["value_s"].to_list() == joined["ttft_s"].to_list()


def test_the_slowest_points_are_never_sampled_away(a_run: ARun) -> None:
    """Of many requests a tenth of the points are the slowest, exactly."""
    frame = frame_of(a_run("run", requests=900))
    points = explore.points(frame, "ttft_s", most=100)
    assert points.height <= 100
    slowest = frame.sort("ttft_s", descending=True, nulls_last=True)["request"][:10]
    assert set(slowest) <= set(points["request"])


def test_stages_of_a_journey_lie_end_to_end(a_run: ARun) -> None:
    """From arrival to the end without a hole, in order."""
    row = frame_of(a_run("run", requests=20)).filter(status="finished").row(3, named=True)
    stages = explore.journey(row | {"transfer_start_s": None})
    assert stages["start_s"][0] == 0.0
    assert stages["end_s"][:-1].to_list() == stages["start_s"][1:].to_list()
    assert stages["end_s"][-1] == pytest.approx(row["e2e_s"])


def test_refusals_say_what_they_spared_and_wasted() -> None:
    """Refused on arrival: its whole input is spared. Failed after its prefill: that was wasted."""
    rows = {
        "request": [0, 1, 2],
        "arrival_s": [0.0, 1.0, 2.0],
        "input_tokens": [100, 200, 300],
        "reused_tokens": [None, 50, None],
        "prefill_end_s": [None, 1.5, None],
        "finished_s": [0.0, 2.0, 2.0],
        "status": ["rejected", "failed", "rejected"],
        "reason": ["ttft", "lost-decode", "ttft"],
    }
    found = explore.refused(conform(pl.DataFrame(rows), "requests")).drop("request")
    assert set(found.columns) <= {*REQUESTS, "requests", "spared_tokens", "wasted_tokens"}
    assert sorted(found.iter_rows()) == [
        ("failed", "lost-decode", 1, 0, 150),
        ("rejected", "ttft", 2, 400, 0),
    ]


def test_an_instance_that_says_nothing_is_found() -> None:
    """Samples each second of two instances; one of them has none from 4 s to 9 s."""
    rows = [
        (float(t), name) for t in range(12) for name in ("a", "b") if name == "a" or not 4 < t < 9
    ]
    frame = pl.DataFrame(rows, schema=["time_s", "instance"], orient="row")
    samples = conform(frame.with_columns(role=pl.lit("prefill")), "samples")
    assert set(samples.columns) == set(SAMPLES)
    assert explore.silences(samples).rows() == [("b", 4.0, 9.0)]


def test_a_prefill_in_chunks_and_a_transfer_behind_it_have_their_parts() -> None:
    """Two chunks; what of the transfer the prefill hid, and what came after."""
    row = dict.fromkeys(REQUESTS) | {"arrival_s": 10.0, "prefill": "prefill-0"}
    row |= {"decode": "decode-1", "prefill_start_s": 11.0, "prefill_end_s": 13.0}
    row |= {"transfer_start_s": 11.0, "transferred_s": 13.5}
    rows = [(1, 11.0, 12.5, 8192), (1, 12.5, 13.0, 800)]
    chunks = pl.DataFrame(rows, schema=CHUNKS, orient="row")
    found = explore.journey(row, chunks)
    assert found.select("stage", "start_s", "end_s").rows() == [
        ("prefill", 1.0, 2.5),
        ("prefill", 2.5, 3.0),
        ("transfer", 1.0, 3.0),
        ("transfer", 3.0, 3.5),
    ]
    assert found["part"][0] == "chunk 1 of 2, 8,192 tokens"
    assert found["where"].to_list() == ["prefill-0", "prefill-0", "to decode-1", "to decode-1"]
    assert explore.journey(row | {"decode": "prefill-0"}, chunks)["stage"].unique().len() == 1


def pools(*rows: tuple[float, str, int]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=["time_s", "instance", "evicted_blocks"], orient="row")
    role = pl.col("instance").str.extract(r"^(\w+)")
    return conform(frame.with_columns(role=role, pool_capacity_blocks=40), "samples")


def test_evictions_are_what_counts_have_grown_by() -> None:
    """Two pools, bins of 10 s: 3 and 5 blocks in the second; one instance begins anew at 20 s."""
    samples = pools(
        *((0.0, "prefill-0", 2), (15.0, "prefill-0", 5), (20.0, "prefill-0", 1)),
        *((0.0, "prefill-1", 0), (15.0, "prefill-1", 5), (20.0, "prefill-1", 5)),
    )
    found = explore.evictions_over_time(samples, bins=2)
    assert found.rows() == [(5.0, 0.0), (15.0, 0.8)]


def test_pools_are_those_that_keep_prefixes() -> None:
    """A decode instance's memory is none."""
    assert explore.pool_sizes(pools((0.0, "prefill-0", 0), (0.0, "prefill-1", 0))) == (40.0, 80.0)
    assert explore.pool_sizes(pools((0.0, "decode-0", 0))) is None


def test_replicas_are_a_mean_over_requests_that_found_some() -> None:
    """2 and 3 in the first half, nobody's prefix was known in the second."""
    rows = {"arrival_s": [0.0, 1.0, 9.0, 10.0], "prefix_replicas": [2.0, 3.0, None, None]}
    columns = {"request": range(4), "input_tokens": [1] * 4, "status": ["finished"] * 4}
    frame = conform(pl.DataFrame(rows | columns), "requests")
    assert explore.replicas_over_time(frame, bins=2).rows() == [(2.5, 2.5, 2)]
