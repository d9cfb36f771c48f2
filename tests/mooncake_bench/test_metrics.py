"""Do the numbers mean what their definitions say? Checked against plain Python."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_bench import metrics, records
from mooncake_bench.records import RunInfo
from mooncake_bench.slo import Slo

INFO = RunInfo(name="a run", source="simulated", system="colocated", slo=Slo(1.0, 0.1))
NO_SPANS = pl.DataFrame(schema=records.SPANS)
NO_SAMPLES = pl.DataFrame(schema=records.SAMPLES)


def requests(*rows: Mapping[str, object]) -> pl.DataFrame:
    """Rows of REQUESTS; what is not given is a finished request of 100 input tokens at 0 s."""
    usual = {"arrival_s": 0.0, "input_tokens": 100, "status": "finished"}
    return records.conform(
        pl.DataFrame([{"request": i, **usual, **row} for i, row in enumerate(rows)]), "requests"
    )


def spans(*rows: tuple[int, float, int, float, float]) -> pl.DataFrame:
    """Rows of SPANS: request, start_s, steps, first_gap_s, growth_s."""
    return pl.DataFrame(list(rows), schema=records.SPANS, orient="row")


# --- The definitions, spelt out -----------------------------------------------------------------


@dataclass
class Plain:
    """A request with its spans, and its gaps by the formula of the schema, token by token."""

    first_token_s: float
    rows: list[tuple[float, int, float, float]]

    def gaps(self) -> list[float]:
        times = [self.first_token_s]
        for start, steps, first_gap, growth in self.rows:
            times += [start + (j + 1) * first_gap + growth * j * (j + 1) / 2 for j in range(steps)]
        return [later - earlier for earlier, later in pairwise(times)]

    def tbt(self) -> float | None:
        longest = sorted(self.gaps(), reverse=True)
        count = math.ceil(len(longest) / 10)
        return sum(longest[:count]) / count if count else None


@st.composite
def plain_requests(draw: st.DrawFn) -> Plain:
    first = draw(st.floats(0, 100))
    now, rows = first, []
    for _ in range(draw(st.integers(0, 5))):
        now += draw(st.floats(0, 2))
        steps = draw(st.integers(1, 40))
        gap, growth = draw(st.floats(0.001, 1)), draw(st.floats(0, 0.01))
        rows.append((now, steps, gap, growth))
        now += steps * gap + growth * steps * (steps - 1) / 2
    return Plain(first, rows)


@settings(deadline=None)
@given(st.lists(plain_requests(), max_size=6))
def test_gaps_and_tbt_are_those_of_the_definition(plain: list[Plain]) -> None:
    """Expanding all spans at once gives what walking through the tokens one by one gives."""
    # Rows of different requests lie in time order, mixed, as a run records them.
    rows = [(request, *row) for request, p in enumerate(plain) for row in p.rows]
    table = spans(*sorted(rows, key=lambda row: row[1]))
    frame = (
        requests(*[{"first_token_s": p.first_token_s} for p in plain])
        if plain
        else pl.DataFrame(schema=records.REQUESTS)
    )
    gaps = metrics.token_gaps(frame, table)
    tbt = metrics.per_request(frame, table)
    for request, p in enumerate(plain):
        expected = p.gaps()
        found = gaps.filter(pl.col("request") == request)["gap_s"].to_list()
        assert found == pytest.approx(expected, abs=1e-9)
        row = tbt.row(request, named=True)
        assert row["tbt_s"] == (None if p.tbt() is None else pytest.approx(p.tbt(), abs=1e-9))
        if expected:
            assert row["tbt_s_max"] == pytest.approx(max(expected), abs=1e-9)
            assert row["tbt_s_p99"] == pytest.approx(_quantile(expected, 0.99), abs=1e-9)
    assert gaps.height == sum(len(p.gaps()) for p in plain)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


# --- Cases by hand ------------------------------------------------------------------------------


def test_waiting_between_spans_is_a_gap() -> None:
    """First token at 1.0; tokens at 1.1, 1.2; a wait until 2.0; a token at 2.1: gaps .1 .1 .9."""
    frame = requests({"first_token_s": 1.0})
    gaps = metrics.token_gaps(frame, spans((0, 1.0, 2, 0.1, 0.0), (0, 2.0, 1, 0.1, 0.0)))
    assert gaps["gap_s"].to_list() == pytest.approx([0.1, 0.1, 0.9])


def test_times_come_to_their_requests_in_any_order() -> None:
    """Rows that are turned round, and in the middle a request without gaps."""
    frame = requests(*[{"first_token_s": 1.0}] * 3)
    table = spans((0, 1.0, 2, 0.1, 0.0), (2, 1.0, 2, 0.3, 0.0))
    found = metrics.with_tbt(frame.reverse(), metrics.request_tbt(frame, table))
    assert found["request"].to_list() == [2, 1, 0]
    assert found["tbt_s"].to_list() == [pytest.approx(0.3), None, pytest.approx(0.1)]


def test_thirty_gaps_have_a_longest_tenth_of_three() -> None:
    """0.1 x 30 is above 3 in floating point; the tail must still be 3 of gaps 1, 2, ... 30."""
    row = metrics.per_request(requests({"first_token_s": 0.0}), spans((0, 0.0, 30, 1.0, 1.0)))
    assert row["tbt_s"].to_list() == [pytest.approx((30 + 29 + 28) / 3)]


def test_a_request_of_one_token_meets_any_tbt_bound() -> None:
    """It has no gap; its TTFT alone decides."""
    frame = metrics.per_request(
        requests(
            {"first_token_s": 0.5, "finished_s": 0.5, "output_tokens": 1},
            {"first_token_s": 1.5, "finished_s": 1.5, "output_tokens": 1},
        ),
        NO_SPANS,
    )
    assert frame["tbt_s"].to_list() == [None, None]
    assert frame["tpot_s"].to_list() == [None, None]
    assert metrics.attained(frame, Slo(1.0, 0.001)).to_list() == [True, False]


def mixed_run() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Five offered: within, slow, late, rejected after its prefill, failed at once."""
    frame = requests(
        {"arrival_s": 0.0, "first_token_s": 0.5, "finished_s": 0.6, "output_tokens": 2},
        {"arrival_s": 1.0, "first_token_s": 1.5, "finished_s": 2.0, "output_tokens": 2},
        {"arrival_s": 2.0, "first_token_s": 4.0, "finished_s": 4.1, "output_tokens": 2},
        {
            "arrival_s": 3.0,
            "prefill_end_s": 3.4,
            "finished_s": 3.5,
            "status": "rejected",
            "reason": "tbt",
            "reused_tokens": 40,
        },
        {"arrival_s": 5.0, "finished_s": 5.0, "status": "failed", "reason": "reset"},
    )
    table = spans((0, 0.5, 1, 0.1, 0.0), (1, 1.5, 1, 0.5, 0.0), (2, 4.0, 1, 0.1, 0.0))
    return frame, table


def test_attainment_and_goodput_count_every_offered_request() -> None:
    """One of five is within TTFT 1 s and TBT 100 ms (the gap of .1 is at the bound, and counts)."""
    frame, table = mixed_run()
    # 1.1 - 1.0 style rounding would put a gap of exactly .1 beyond the bound: give it some room.
    info = RunInfo(name="r", source="simulated", system="colocated", slo=Slo(1.0, 0.1 + 1e-9))
    summary = metrics.summarise(info, frame, table, NO_SAMPLES)
    assert (summary["offered"], summary["finished"]) == (5, 3)
    assert (summary["rejected"], summary["failed"]) == (1, 1)
    assert summary["rejected_by_reason"] == {"tbt": 1}
    assert summary["attainment"] == pytest.approx(1 / 5)
    assert summary["attainment_of_finished"] == pytest.approx(1 / 3)
    assert summary["goodput_rps"] == pytest.approx(1 / 5.0)  # last arrival and last end: 5 s
    assert summary["missed_by"] == {
        "rejected": 1,
        "failed": 1,
        "late_first_token": 1,
        "slow_tokens": 1,
        "both": 0,
    }
    assert summary["attainment_by_tbt"]["0.3"] == pytest.approx(1 / 5)


def test_refused_work_is_priced() -> None:
    """100 tokens less 40 reused were computed for nothing; the refusal took half a second."""
    summary = metrics.summarise(INFO, *mixed_run(), NO_SAMPLES)
    assert summary["wasted_prefill_tokens"] == 60
    assert summary["time_to_rejection_s"]["p50"] == pytest.approx(0.5)


def test_requests_that_were_never_looked_up_do_not_dilute_the_hit_ratio() -> None:
    """A refusal on arrival reuses nothing, but says nothing about the cache either."""
    frame = requests(
        {"reused_tokens": 30, "first_token_s": 0.1, "finished_s": 0.1},
        {"reused_tokens": 0, "status": "rejected", "finished_s": 0.0},
    )
    assert metrics.summarise(INFO, frame, NO_SPANS, NO_SAMPLES)["prefix_hit_ratio"] == 0.3


def test_stages_add_up_to_the_whole_time() -> None:
    """queue .1 + .2, load .1, prefill 1, transfer .2, delivery .1, decode queue .3, decode 2."""
    stamps = {
        "arrival_s": 1.0,
        "placed_s": 1.1,
        "fetched_s": 1.2,
        "prefill_start_s": 1.4,
        "prefill_end_s": 2.4,
        "transferred_s": 2.6,
        "first_token_s": 2.7,
        "decode_start_s": 3.0,
        "finished_s": 5.0,
    }
    stages = metrics.stage_means(metrics.per_request(requests(stamps), NO_SPANS))
    assert stages == pytest.approx(
        {
            "queue": 0.3,
            "reuse_load": 0.1,
            "prefill": 1.0,
            "transfer": 0.2,
            "decode_queue": 0.3,
            "decode": 2.0,
            "other": 0.1,
        }
    )
    assert sum(value or 0.0 for value in stages.values()) == pytest.approx(4.0)


def test_an_endpoint_without_stages_has_its_whole_ttft_in_other() -> None:
    """What is not reported is not guessed: the stages are null, and nothing gets lost."""
    frame = metrics.per_request(requests({"first_token_s": 2.0, "finished_s": 5.0}), NO_SPANS)
    stages = metrics.stage_means(frame)
    assert stages["prefill"] is None
    assert (stages["other"], stages["decode"]) == (2.0, 3.0)
    summary = metrics.summarise(INFO, frame.select(list(records.REQUESTS)), NO_SPANS, NO_SAMPLES)
    assert summary["wasted_prefill_tokens"] is None
    assert summary["prefix_hit_ratio"] is None


def test_lag_is_counted_in_ttft() -> None:
    """Sent half a second late: TTFT runs from the intended arrival."""
    frame = requests({"sent_s": 0.5, "first_token_s": 0.7, "finished_s": 0.7})
    summary = metrics.summarise(INFO, frame, NO_SPANS, NO_SAMPLES)
    assert summary["ttft_s"]["p50"] == pytest.approx(0.7)
    assert summary["ttft_from_send_s"]["p50"] == pytest.approx(0.2)
    assert summary["lag_s"]["p99"] == pytest.approx(0.5)


# --- Frames for figures -------------------------------------------------------------------------


def test_a_cumulative_curve_ends_at_the_share_that_was_served() -> None:
    """Three of five finished: the curve ends at .6, whatever the values."""
    frame = metrics.per_request(*mixed_run())
    curve = metrics.cumulative_shares(frame, "ttft_s")
    assert curve["value_s"].to_list() == pytest.approx([0.5, 0.5, 2.0])
    assert curve["share"].to_list() == pytest.approx([0.2, 0.4, 0.6])


def test_a_long_curve_is_thinned_out_but_keeps_its_ends() -> None:
    """1,000 values 0 .. 999 in at most 50 points."""
    frame = metrics.per_request(
        requests(*[{"first_token_s": float(i), "finished_s": float(i)} for i in range(1000)]),
        NO_SPANS,
    )
    curve = metrics.cumulative_shares(frame, "ttft_s", points=50)
    assert curve.height == 50
    assert (curve["value_s"][0], curve["value_s"][-1]) == (0.0, 999.0)
    assert curve["share"][-1] == 1.0


def test_the_attainment_curve_passes_through_the_attainments() -> None:
    """At every bound the curve is what `attained` counts."""
    frame = metrics.per_request(*mixed_run())
    bounds = [0.05, 0.2, 0.6]
    curve = metrics.attainment_curve(frame, Slo(1.0, 0.1), bounds)
    counted = [metrics.attained(frame, Slo(1.0, bound)).sum() / 5 for bound in bounds]
    assert curve["attainment"].to_list() == pytest.approx(counted)


def test_load_shows_the_spread_between_instances() -> None:
    """Loads .2 and .6 of two instances: mean .4, band from .2 to .6; roles are kept apart."""
    samples = records.conform(
        pl.DataFrame(
            {
                "time_s": [1.0, 1.0, 1.0],
                "instance": ["prefill-0", "prefill-1", "decode-0"],
                "role": ["prefill", "prefill", "decode"],
                "load": [0.2, 0.6, 0.9],
            }
        ),
        "samples",
    )
    rows = {row["role"]: row for row in metrics.load_over_time(samples, bins=1).to_dicts()}
    assert rows["prefill"]["mean"] == pytest.approx(0.4)
    assert (rows["prefill"]["low"], rows["prefill"]["high"]) == (0.2, 0.6)
    assert rows["decode"]["mean"] == 0.9
    assert metrics.load_over_time(NO_SAMPLES).height == 0


def test_refusals_are_rates_in_bins_of_arrival() -> None:
    """Two of one reason in the first of two bins of 5 s: .4 a second."""
    frame = metrics.per_request(
        requests(
            {"arrival_s": 1.0, "status": "rejected", "reason": "ttft"},
            {"arrival_s": 2.0, "status": "rejected", "reason": "ttft"},
            {"arrival_s": 10.0},
        ),
        NO_SPANS,
    )
    (row,) = metrics.refusals_over_time(frame, bins=2).to_dicts()
    assert row == {"time_s": 2.5, "status": "rejected", "reason": "ttft", "requests_per_s": 0.4}


def test_input_classes_hold_every_request_once() -> None:
    """Lengths 1..8, edges at the quartiles: an edge belongs to the class below it."""
    frame = metrics.per_request(
        requests(
            *[
                {"input_tokens": n, "first_token_s": float(n), "finished_s": float(n)}
                for n in range(1, 9)
            ]
        ),
        NO_SPANS,
    )
    assert metrics.input_quartiles([frame]) == (3, 4, 6)
    other = [stages["other"] for stages in metrics.stages_by_input(frame, (2, 4, 6))]
    assert other == [1.5, 3.5, 5.5, 7.5]


# --- Accounts, classes, windows -----------------------------------------------------------------


def test_every_offered_request_is_counted_once():
    """Finished, refused (after two retries), failed, given up twice, never sent: six in all."""
    frame = requests(
        {"sent_s": 0.1, "attempts": 1},
        {"sent_s": 0.1, "status": "rejected", "reason": "ttft", "attempts": 3},
        {"sent_s": 0.1, "status": "failed", "reason": "http 500", "attempts": 1},
        {"sent_s": 0.1, "status": "failed", "reason": "no token for 120 s", "attempts": 1},
        {"sent_s": 0.1, "status": "failed", "reason": "interrupted", "attempts": 1},
        {"status": "failed", "reason": "connection refused", "attempts": 0},
    )
    assert metrics.accounting(frame) == {
        "offered": 6,
        "sent": 5,
        "attempts": 7,
        "finished": 1,
        "rejected_early": 1,
        "failed_late": 1,
        "abandoned": 2,
        "not_sent": 1,
    }


def test_requests_of_a_class_are_held_to_its_bounds():
    """2 s is late for chat (1 s), and for no class (1 s), not for batch (60 s)."""
    late = {"first_token_s": 2.0, "finished_s": 2.0}
    frame = metrics.per_request(
        requests({"class": "chat", **late}, {"class": "batch", **late}, late), NO_SPANS
    )
    by_class = {"batch": Slo(60.0, 0.1)}
    assert metrics.attained(frame, INFO.slo, by_class).to_list() == [False, True, False]
    assert metrics.misses(frame, INFO.slo, by_class)["late_first_token"] == 2
    assert metrics.attained(frame, INFO.slo).to_list() == [False, False, False]


def test_a_measured_window_leaves_out_what_arrives_around_it():
    """Arrivals at 0, 10, 19 and 30 s, measured from 10 to 20 s: two requests, over 10 s."""
    rows = [
        {"arrival_s": at, "sent_s": at, "first_token_s": at + 0.5, "finished_s": at + 1.0}
        for at in (0.0, 10.0, 19.0, 30.0)
    ]
    info = RunInfo(
        name="x", source="external", system="external", slo=Slo(1.0, 0.1), measured_s=(10.0, 20.0)
    )
    summary = metrics.summarise(info, requests(*rows), NO_SPANS, NO_SAMPLES)
    assert summary["offered"] == 2
    assert summary["measured"] == {"start_s": 10.0, "end_s": 20.0, "excluded": 2}
    assert summary["duration_s"] == 10.0  # from 10 s to the finish of the request of 19 s
    assert summary["goodput_rps"] == 0.2
    assert summary["ttft_s"]["p50"] == 0.5
    whole = metrics.summarise(INFO, requests(*rows), NO_SPANS, NO_SAMPLES)
    assert whole["measured"] is None
    assert whole["offered"] == 4
