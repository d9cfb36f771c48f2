"""Are the frames for a closer look what metrics says, and what can be counted by hand?"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest

from mooncake_bench import explore, metrics
from mooncake_bench.records import REQUESTS, SAMPLES, Run, conform
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
    stages = explore.journey(row)
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
