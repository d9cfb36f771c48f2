"""Do transforms change what they say, and nothing else?"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.model import COLUMNS, build_frame
from workloads.statistics import prefix_hit_ratio
from workloads.trace import Trace, TraceError, generate, read_trace, write_mooncake
from workloads.transform import (
    bucket_width_s,
    cap_lengths,
    jitter,
    limit,
    sample,
    scale_lengths,
    sessions,
    speed,
    window,
)

BLOCK = 16


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Small traces: conversations over a shared system block, bucketed times, any id type."""
    n = draw(st.integers(1, 30))
    times = sorted(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)))
    tokens = draw(st.lists(st.integers(1, 8 * BLOCK), min_size=n, max_size=n))
    session = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    lists = [
        [0] + [1000 * (s + 1) + position for position in range(-(-length // BLOCK) - 1)]
        for s, length in zip(session, tokens, strict=True)
    ]
    flat = [value for ids in lists for value in ids]
    kind = draw(st.sampled_from(["int", "uint", "text"]))
    ids = pl.Series(flat, dtype=pl.Int64)
    if kind == "uint":
        ids = pl.Series([value + 2**63 for value in flat], dtype=pl.UInt64)
    elif kind == "text":
        ids = pl.Series([f"id-{value}" for value in flat])
    blocks = np.array([len(row) for row in lists], dtype=np.int64)
    frame = build_frame([3.0 * time for time in times], tokens, [5] * n, ids, blocks)
    return Trace(frame, "made-up", "0" * 64, BLOCK)


def check_law(trace: Trace) -> None:
    """What every trace promises its consumers."""
    frame = trace.frame
    assert tuple(frame.columns) == COLUMNS
    assert frame["request"].to_list() == list(range(frame.height))
    assert frame["arrival_s"].is_sorted()
    assert frame["arrival_s"].min() >= 0
    assert frame["input_tokens"].min() >= 1
    assert frame["output_tokens"].min() >= 1
    wanted = [math.ceil(tokens / trace.block_tokens) for tokens in frame["input_tokens"]]
    assert frame["hash_ids"].list.len().to_list() == wanted


@given(
    traces(),
    st.sampled_from(
        [
            lambda trace: window(trace, 0, 61),
            lambda trace: speed(trace, 3.7),
            lambda trace: jitter(trace, 4),
            lambda trace: cap_lengths(trace, 2 * BLOCK, 3),
            lambda trace: cap_lengths(trace, 2 * BLOCK + 5),
            lambda trace: cap_lengths(trace, 1),
            lambda trace: scale_lengths(trace, 2),
            lambda trace: sample(trace, 0.4, 1),
            lambda trace: limit(trace, 7),
        ]
    ),
)
@settings(max_examples=200, deadline=None)
def test_every_transform_keeps_the_law_and_is_noted(trace, transform) -> None:
    """Sorted, renumbered, lengths and ids in step, the same twice, the original untouched."""
    before = trace.frame.clone()
    after = transform(trace)
    check_law(after)
    assert len(after.transforms) == 1
    assert transform(trace).frame.equals(after.frame)
    assert trace.frame.equals(before)
    assert after.sha256 == trace.sha256


@given(traces(), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_back(trace, seed) -> None:
    """Any trace, jittered too, survives a round trip exactly."""
    trace = jitter(trace, seed)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "trace.jsonl"
        write_mooncake(trace, path)
        assert read_trace(path, block_tokens=BLOCK).frame.equals(trace.frame)


@given(traces(), st.floats(0.01, 1), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_a_sample_has_whole_sessions_only(trace, share, seed) -> None:
    """A session is in the sample with all of its requests, or not at all."""
    numbered = trace.frame.with_columns(pl.Series("session", sessions(trace)))
    # Rows keep arrival, lengths and ids: count each kind of row per session, before and after.
    key = ["arrival_s", "input_tokens", "hash_ids"]
    kept = sample(trace, share, seed).frame.select(key).to_dicts()
    for _, rows in numbered.group_by("session"):
        wanted = rows.select(key).to_dicts()
        found = [row for row in wanted if row in kept]
        assert len(found) in (0, len(wanted))


def test_a_window_counts_from_its_start(make_trace) -> None:
    """[1 s, 3 s) holds the rows at 1 s and 2.5 s, now at 0 and 1.5 s."""
    rows = [(time, 5, [i]) for i, time in enumerate((0, 1000, 2500, 3000))]
    trace = window(make_trace(*rows), 1, 3)
    assert trace.frame["arrival_s"].to_list() == [0.0, 1.5]
    assert trace.frame["hash_ids"].to_list() == [[1], [2]]
    assert trace.transforms == ("window 1-3 s",)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (lambda trace: window(trace, 50, 60), "holds no request .* within 0-3 s"),
        (lambda trace: window(trace, 2, 1), "holds no request"),
        (lambda trace: window(trace, math.nan, 1), "not a span"),
        (lambda trace: speed(trace, 0), "above 0"),
        (lambda trace: speed(trace, math.inf), "above 0"),
        (lambda trace: sample(trace, 0, 0), "above 0"),
        (lambda trace: sample(trace, 0.5, -1), "seed -1 is negative"),
        (lambda trace: limit(trace, 0), "1 or more"),
        (lambda trace: cap_lengths(trace, 0), "1 or more"),
        (lambda trace: scale_lengths(trace, 3), "cannot be divided by 3"),
    ],
)
def test_wishes_that_cannot_be_are_refused(make_trace, wish, says) -> None:
    """Each says what to give instead."""
    with pytest.raises(TraceError, match=says):
        wish(make_trace((0, 5, [1]), (3000, 5, [2])))


def test_jitter_spreads_a_bucket_and_keeps_the_order(make_trace) -> None:
    """1,000 requests at 0 s and 1,000 at 3 s: each bucket is filled, mean 1.5 s in."""
    rows = [(3000 * (i // 1000), 5, [i]) for i in range(2000)]
    trace = jitter(make_trace(*rows), 0)
    arrival_s = trace.frame["arrival_s"].to_numpy()
    assert trace.jittered
    assert trace.transforms == ("jitter within 3 s buckets, seed 0",)
    assert trace.frame["hash_ids"].explode().to_list() == list(range(2000))
    assert 0 <= arrival_s[0] < arrival_s[999] < 3 <= arrival_s[1000] < arrival_s[-1] < 6
    # The mean of 1,000 uniform shares of 3 s has a deviation of 0.027 s.
    assert arrival_s[:1000].mean() == pytest.approx(1.5, abs=0.12)
    assert not np.array_equal(arrival_s, jitter(make_trace(*rows), 1).frame["arrival_s"])


@pytest.mark.parametrize(
    ("stamps_s", "width_s"),
    [
        ([0, 0, 3, 6, 6, 9], 3),
        ([0, 3.001, 6, 8.999, 15, 18.001], 3),  # Mooncake's stamps wobble by a millisecond
        ([0, 9, 12, 18, 27], 3),  # sparse: the greatest common divisor
        ([0, 0.5, 0.75], 0.25),
        ([7, 7], 0),
    ],
)
def test_the_bucket_width_is_detected(stamps_s, width_s) -> None:
    """Also where stamps wobble or buckets are empty."""
    assert bucket_width_s(np.array(stamps_s, dtype=float)) == pytest.approx(width_s)


def test_jitter_leaves_fine_stamps_alone() -> None:
    """Arrivals stamped to the nanosecond have no bucket to spread over."""
    trace = generate("conversation-like", duration_s=60)
    assert jitter(trace, 0).frame.equals(trace.frame)


def test_a_cut_block_gets_an_id_of_its_own(make_trace) -> None:
    """Cut at 700: block two of both long rows becomes one new id, the short row keeps its own."""
    trace = make_trace((0, 1024, [1, 2]), (0, 1030, [1, 2, 3]), (0, 700, [1, 4]))
    assert cap_lengths(trace, 700).frame["hash_ids"].to_list() == [[1, 5], [1, 5], [1, 4]]
    # Cut between blocks: what is left is whole.
    assert cap_lengths(trace, 512).frame["hash_ids"].to_list() == [[1], [1], [1]]
    assert cap_lengths(trace, None, 2).frame["output_tokens"].to_list() == [2, 2, 2]
    assert cap_lengths(trace) is trace


def test_shorter_prompts_share_what_they_shared(make_trace) -> None:
    """At a 64th, 700 tokens of two blocks of 512 are 11 of two blocks of 8: ids stay."""
    trace = scale_lengths(make_trace((0, 1024, [1, 2]), (5, 700, [1, 3])), 64)
    assert trace.block_tokens == 8
    assert trace.frame["input_tokens"].to_list() == [16, 11]
    assert trace.frame["hash_ids"].to_list() == [[1, 2], [1, 3]]
    assert trace.transforms == ("lengths / 64",)


def test_fresh_ids_avoid_the_end_of_the_range(make_trace) -> None:
    """With the largest 64-bit id in use, a cut block takes a free small one."""
    trace = make_trace((0, 600, [0, 2**63 - 1]))
    assert cap_lengths(trace, 599).frame["hash_ids"].to_list() == [[0, 1]]


def test_a_session_is_a_shared_prefix_beyond_the_system_prompt(make_trace) -> None:
    """Ten rows share block 0; rows 0 and 7 share block 1 also: nine sessions."""
    rows = [(i, 1024, [0, 10 + i]) for i in range(10)]
    rows[0] = (0, 1536, [0, 1, 2])
    rows[7] = (7, 1536, [0, 1, 3])
    found = sessions(make_trace(*rows))
    assert found.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 7, 8]


def test_long_shared_tool_prompts_glue_nothing_together() -> None:
    """In toolagent-like traffic 12 and 5 blocks are common: still no session is large."""
    trace = generate("toolagent-like", duration_s=900)
    sizes = np.bincount(sessions(trace))
    assert sizes.max() < 50
    assert len(sizes) > 0.6 * trace.frame.height


@pytest.mark.parametrize("share", [0.05, 0.23, 0.6])
def test_a_sample_of_the_real_trace_keeps_share_and_reuse(conversation, share) -> None:
    """7,373 sessions; a sample has the share of requests and still the reuse of the whole."""
    found = sessions(conversation)
    assert found.max() + 1 == 7373
    part = sample(conversation, share, 0)
    assert part.frame.height == pytest.approx(share * 12_031, abs=43)  # the largest session
    whole = prefix_hit_ratio(conversation, None)
    assert prefix_hit_ratio(part, None) == pytest.approx(whole, abs=0.06)


def test_the_real_trace_is_jittered_within_its_3_s(conversation) -> None:
    """Every request stays in its own bucket."""
    moved = jitter(conversation, 0).frame["arrival_s"] - conversation.frame["arrival_s"]
    assert moved.min() >= 0
    assert moved.max() <= 3.0
    assert moved.mean() == pytest.approx(1.5, abs=0.05)
