"""Records keep their order of stamps whatever a server claims, and come out whole."""

from array import array

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_bench.records import REQUESTS, SPANS, conform
from mooncake_bench.replay.assemble import build_chunks, build_frames, judge
from mooncake_bench.replay.client import ClientStats
from mooncake_bench.replay.live import LiveView
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.recorder import FAILED, FINISHED, REJECTED, Batch, Recorder, Verdict
from mooncake_bench.replay.schedule import Plan
from mooncake_bench.slo import Slo

ORDER = [
    *("sent_s", "placed_s", "fetched_s", "prefill_start_s", "prefill_end_s", "transferred_s"),
    *("first_token_s", "decode_start_s", "finished_s"),
]
ORIGIN = 1000.0


def a_plan(rows: int) -> Plan:
    return Plan(
        request=np.arange(rows),
        due_s=np.arange(rows) * 1.0,
        input_tokens=np.full(rows, 100),
        output_tokens=np.full(rows, 3),
        hash_ids=pl.Series([[row] for row in range(rows)]),
    )


def a_recorder(plan: Plan) -> Recorder:
    recorder = Recorder(plan.request, plan.due_s)
    recorder.origin = ORIGIN
    return recorder


def a_finish(row: int, at_s: list[float], **more) -> Verdict:
    times = array("d", (ORIGIN + one for one in at_s))
    return Verdict(row, FINISHED, times[-1], http_status=200, times=times, **more)


def batch_of(recorder: Recorder) -> Batch:
    batch = recorder.drain()
    assert batch is not None
    return batch


def test_three_tokens_are_two_spans_and_the_first_is_the_ttft():
    """Sent at 1.5, tokens at 2, 2.25 and 3: gaps of .25 and .75."""
    plan = a_plan(2)
    recorder = a_recorder(plan)
    recorder.sent(1, ORIGIN + 1.5)
    recorder.settle(a_finish(1, [2.0, 2.25, 3.0]))
    requests, spans = build_frames(plan, [batch_of(recorder)])
    row = requests.row(0, named=True)
    assert (row["request"], row["arrival_s"], row["sent_s"]) == (1, 1.0, 1.5)
    assert (row["first_token_s"], row["finished_s"], row["output_tokens"]) == (2.0, 3.0, 3)
    assert spans.rows() == [(1, 2.0, 1, 0.25, 0.0), (1, 2.25, 1, 0.75, 0.0)]
    assert conform(requests, "requests").schema == REQUESTS
    assert conform(spans, "spans").schema == SPANS


def test_records_from_several_drains_and_engines_come_out_in_order():
    """Batches mix; rows are sorted by request, a request's tokens stay in time order."""
    plan = a_plan(4)
    first, second = a_recorder(plan), a_recorder(plan)
    batches = []
    for recorder, row in ((first, 3), (second, 0), (first, 1)):
        recorder.sent(row, ORIGIN + row)
        recorder.settle(a_finish(row, [row + 0.5, row + 0.75, row + 1.5]))
        batches.append(batch_of(recorder))
    assert first.drain() is None
    requests, spans = build_frames(plan, batches)
    assert requests["request"].to_list() == [0, 1, 3]
    assert spans["request"].to_list() == [0, 0, 1, 1, 3, 3]
    assert spans["first_gap_s"].to_list() == [0.25, 0.75] * 3


def test_rows_without_a_record_are_left_out_or_counted_as_failed():
    """Not due yet when somebody stopped the run, or lost with their worker."""
    plan = a_plan(3)
    recorder = a_recorder(plan)
    recorder.settle(Verdict(1, REJECTED, ORIGIN + 1.5, "ttft", 429))
    batch = batch_of(recorder)
    assert build_frames(plan, [batch])[0]["request"].to_list() == [1]
    requests, spans = build_frames(plan, [batch], lost=np.arange(3))
    assert requests["status"].to_list() == ["failed", "rejected", "failed"]
    assert requests["reason"].to_list() == ["worker lost", "ttft", "worker lost"]
    assert requests["finished_s"].to_list() == [0.0, 1.5, 2.0]
    assert spans.is_empty()
    part, _ = build_frames(plan, [batch], lost=np.array([0, 1]))
    assert part["request"].to_list() == [0, 1]
    nothing, _ = build_frames(plan, [], lost=np.arange(3))
    assert nothing.height == 3


seconds = st.one_of(st.none(), st.floats(-5, 50), st.just("later"), st.booleans())


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys((*ORDER, "fetched_tokens"), seconds)),
    st.lists(st.floats(0.0, 9.0), min_size=1, max_size=5).map(sorted),
)
def test_stamps_never_decrease_whatever_the_server_claims(timeline, tokens):
    """The server's clock is another one: its stamps are kept between our own."""
    plan = a_plan(1)
    recorder = a_recorder(plan)
    recorder.sent(0, ORIGIN)
    recorder.settle(a_finish(0, tokens, timeline=timeline))
    row = build_frames(plan, [batch_of(recorder)])[0].row(0, named=True)
    stamps = [row[name] for name in ORDER if row[name] is not None]
    assert stamps == sorted(stamps)
    assert row["first_token_s"] == pytest.approx(tokens[0])


def test_the_servers_stamps_are_put_on_our_clock():
    """Sent at 2.0; placed .25 later; the prefill's end claimed after the token came: clipped."""
    plan = a_plan(1)
    recorder = a_recorder(plan)
    recorder.sent(0, ORIGIN + 2.0)
    timeline = {"placed_s": 0.25, "prefill_end_s": 9.0, "decode_start_s": 1.5, "prefill": "p-1"}
    recorder.settle(a_finish(0, [3.0, 4.0], timeline=timeline | {"prefill_busy_s": 0.5}))
    row = build_frames(plan, [batch_of(recorder)])[0].row(0, named=True)
    assert (row["placed_s"], row["fetched_s"], row["prefill_end_s"]) == (2.25, None, 3.0)
    assert (row["decode_start_s"], row["prefill_busy_s"], row["prefill"]) == (3.5, 0.5, "p-1")


def test_chunks_of_a_prefill_are_put_on_our_clock():
    """Sent at 2.0: [start, end, tokens] since the receipt; nothing ends after the first token."""
    plan = a_plan(2)
    recorder = a_recorder(plan)
    for row, chunks in enumerate(([[0.1, 0.4, 512], [0.4, 9.0, 88]], [["a", 1, 2]])):
        recorder.sent(row, ORIGIN + 2.0)
        timeline = {"transfer_start_s": 0.25, "chunks": chunks}
        recorder.settle(a_finish(row, [3.0, 4.0], timeline=timeline))
    batch = batch_of(recorder)
    assert build_chunks([batch]).rows() == [(0, 2.1, 2.4, 512), (0, 2.4, 3.0, 88)]
    assert build_frames(plan, [batch])[0]["transfer_start_s"].to_list() == [2.25, 2.25]
    assert build_chunks([]).height == 0


def stats(**changes) -> ClientStats:
    plain = {"planned": 2, "wall_s": 2.0, "cpu_share": 0.3, "loop_lag_p99_s": 0.001}
    return ClientStats(**plain | {"loop_lag_max_s": 0.002, "connections": 2} | changes)


def finished(lag_s: float = 0.0, output_tokens: int = 3) -> tuple[Plan, pl.DataFrame]:
    plan = a_plan(2)
    recorder = a_recorder(plan)
    for row in range(2):
        recorder.sent(row, ORIGIN + row + lag_s)
        recorder.settle(a_finish(row, [row + 1.0] * output_tokens))
    return plan, build_frames(plan, [batch_of(recorder)])[0]


def test_a_prompt_client_is_valid_and_says_how_prompt():
    """Lag and CPU are told with the bounds that they were held against."""
    plan, requests = finished(lag_s=0.01)
    client, invalid, warnings = judge(ReplayOptions(), plan, requests, [stats()])
    assert (invalid, warnings) == ([], [])
    assert client["lag_s"]["p99"] == pytest.approx(0.01)
    assert (client["cpu"], client["cpu_bound"], client["lag_bound_s"]) == (0.3, 0.9, 0.1)


@pytest.mark.parametrize(
    ("lag_s", "one", "word"),
    [
        (0.2, stats(), "late"),
        (0.0, stats(cpu_share=0.95), "95% of a core"),
        (0.0, stats(interrupted_at_s=1.0), "interrupted"),
    ],
)
def test_a_client_past_its_bounds_makes_the_run_invalid(lag_s, one, word):
    """One sentence with what happened, the bound, and what to do."""
    plan, requests = finished(lag_s)
    _, (reason,), _ = judge(ReplayOptions(), plan, requests, [stats(), one])
    assert word in reason
    assert reason.endswith(".")
    assert ";" in reason  # the remedy


def test_other_counts_of_output_tokens_are_told():
    """Asked for 3, got 2: the run stands, with a warning."""
    plan, requests = finished(output_tokens=2)
    _, invalid, (warning,) = judge(ReplayOptions(), plan, requests, [stats()])
    assert not invalid
    assert warning.startswith("2 of 2 finished requests")


def test_the_live_view_counts_goodput_as_the_result_will():
    """Gaps .1 x 9 and .5: TBT is the mean of the longest 10 % of 10 gaps, the one of .5."""
    plan = a_plan(4)
    recorder = a_recorder(plan)
    even = [0.5 + 0.1 * step for step in range(11)]
    recorder.settle(a_finish(0, even))
    recorder.settle(a_finish(1, [*(1 + at for at in even[:-1]), 1 + even[-2] + 0.5]))
    recorder.settle(a_finish(2, [2.5]))
    recorder.settle(Verdict(3, FAILED, ORIGIN + 3.5, "reset"))
    view = LiveView(Slo(ttft_s=1.0, tbt_s=0.2), planned=4)
    view.add(batch_of(recorder))
    shown = view.snapshot(elapsed_s=4.0)
    assert (shown["finished"], shown["failed"], shown["output_tokens"]) == (3, 1, 23)
    # Requests 0 and 2 (one token: no gaps) meet both bounds.
    assert (shown["attainment"], shown["goodput_rps"]) == (0.5, 0.5)
    assert shown["recent_ttft_s"]["p50"] == pytest.approx(0.5)
    assert shown["recent_tbt_s"]["p50"] == pytest.approx(0.3)
