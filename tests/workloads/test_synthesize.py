"""Do generated traces have the statistics that were published of the real ones?

The published values were measured on Mooncake's conversation trace (FAST'25 release,
12,031 requests); they are checked here on the trace itself where it is at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from workloads.statistics import (
    describe,
    length_quantiles,
    prefix_hit_ratio,
    prefix_hits,
    session_sizes,
    used_once_share,
)
from workloads.synthesize import GENERATORS, parameters_of
from workloads.trace import Trace, TraceError, generate, open_trace
from workloads.transform import window

INPUT = {"mean": 12_035, "p50": 6_909, "p90": 27_367, "p99": 85_401, "max": 126_195}
OUTPUT = {"mean": 343, "p50": 350, "p90": 597, "p99": 1_120, "max": 2_000}
CEILING = 0.374
USED_ONCE = 0.759
LRU = {
    10**5: 0.043,
    10**6: 0.054,
    2 * 10**6: 0.086,
    4 * 10**6: 0.178,
    5 * 10**6: 0.210,
    8 * 10**6: 0.266,
    10**7: 0.291,
    5 * 10**7: 0.371,
}


@pytest.fixture(scope="module")
def like() -> Trace:
    """An hour like the conversation trace."""
    return generate("conversation-like", seed=0)


def test_the_measuring_code_finds_the_published_values(conversation) -> None:
    """On the real trace every published number comes out to its last digit."""
    found = describe(conversation)
    assert found["requests"] == 12_031
    assert found["rate_rps"] == pytest.approx(3.40, abs=0.005)
    assert found["distinct_timestamps"] == 1180
    assert found["timestamp_bucket_s"] == 3.0
    assert found["requests_at_once_max"] == 28
    for name, value in INPUT.items():
        assert found["input_tokens"][name] == pytest.approx(value, abs=1)
    for name, value in OUTPUT.items():
        assert found["output_tokens"][name] == pytest.approx(value, abs=2)
    assert (found["blocks"], found["blocks_unique"]) == (288_500, 182_790)
    assert found["prefix_is_chained"]
    assert found["sessions"] == 7373
    assert found["blocks_used_once_share"] == pytest.approx(USED_ONCE, abs=0.001)
    assert found["prefix_hit_ceiling"] == pytest.approx(CEILING, abs=0.0006)
    for capacity, value in LRU.items():
        assert found["prefix_hit_lru"][str(capacity)] == pytest.approx(value, abs=0.0015)


def test_conversation_like_has_the_rate_and_the_lengths(like) -> None:
    """Means within 5 %, quantiles within 10 %."""
    assert like.rate_rps == pytest.approx(3.40, rel=0.01)
    for column, published in (("input_tokens", INPUT), ("output_tokens", OUTPUT)):
        found = length_quantiles(like, column)
        assert found["mean"] == pytest.approx(published["mean"], rel=0.05)
        for name in ("p50", "p90", "p99", "max"):
            assert found[name] == pytest.approx(published[name], rel=0.10), (column, name)


@pytest.mark.parametrize("seed", [0, 1])
def test_conversation_like_has_the_reuse(seed) -> None:
    """Ceiling and LRU curve within 0.025 of all tokens, blocks used once within 0.07."""
    trace = generate("conversation-like", seed=seed)
    assert prefix_hit_ratio(trace, None) == pytest.approx(CEILING, abs=0.025)
    for capacity, published in LRU.items():
        assert prefix_hit_ratio(trace, capacity) == pytest.approx(published, abs=0.025), capacity
    assert used_once_share(trace) == pytest.approx(USED_ONCE, abs=0.07)


def test_conversation_like_has_the_sessions(like) -> None:
    """About 0.61 sessions a request (real: 7,373 of 12,031), 69 % of them one request."""
    sizes = session_sizes(like)
    sessions = sum(sizes.values())
    assert sessions / like.frame.height == pytest.approx(7373 / 12_031, abs=0.03)
    assert sizes[1] / sessions == pytest.approx(5114 / 7373, abs=0.04)
    assert max(sizes) > 15  # the longest real one has 43


@pytest.mark.parametrize("start_s", [0, 60, 1800])
def test_a_window_of_75_s_has_the_rate_and_the_length_mix(like, start_s) -> None:
    """Short demos see the hour's mix: mean input within 20 %, median within 30 %, output 12 %."""
    part = window(like, start_s, start_s + 75)
    assert part.frame.height / 75 == pytest.approx(3.4, rel=0.2)
    found = length_quantiles(part, "input_tokens")
    assert found["mean"] == pytest.approx(INPUT["mean"], rel=0.2)
    assert found["p50"] == pytest.approx(INPUT["p50"], rel=0.3)
    assert part.frame["output_tokens"].mean() == pytest.approx(OUTPUT["mean"], rel=0.12)


def test_a_short_trace_has_exactly_the_rate() -> None:
    """75 s at 3.4 requests/s are 255 requests."""
    trace = generate("conversation-like", duration_s=75)
    assert trace.frame.height == 255
    assert trace.duration_s < 75


def test_caches_are_cold_at_first(like) -> None:
    """Reuse grows over the first minutes as in the real trace: .18 of the first 4, then .34."""
    ceilings = [prefix_hit_ratio(window(like, *span), None) for span in ((0, 240), (0, 480))]
    assert ceilings[0] == pytest.approx(0.18, abs=0.05)
    assert ceilings[0] < ceilings[1] < CEILING


def test_cold_start_matches_the_real_one(like, conversation) -> None:
    """The first 4 minutes alone: prefix hits within 0.05 of the real trace's."""
    real, made = (prefix_hit_ratio(window(trace, 0, 240), None) for trace in (conversation, like))
    assert made == pytest.approx(real, abs=0.05)


def test_toolagent_like_has_the_shape() -> None:
    """Means within 3 %, ceiling within 0.02, three populations with their prompts and outputs."""
    trace = generate("toolagent-like", seed=0)
    frame = trace.frame
    assert frame.height == 23_608
    assert frame["input_tokens"].mean() == pytest.approx(8_596, rel=0.03)
    assert frame["output_tokens"].mean() == pytest.approx(182, rel=0.03)
    assert prefix_hit_ratio(trace, None) == pytest.approx(0.595, abs=0.02)
    first = frame.with_columns(pl.col("hash_ids").list.first().alias("first"))
    groups = {len(rows): rows for _, rows in first.group_by("first")}
    tool_b, tool_a, chat = (groups[size] for size in sorted(groups))
    shares = [len(rows) / frame.height for rows in (chat, tool_a, tool_b)]
    assert shares == pytest.approx([0.46, 0.39, 0.14], abs=0.015)
    assert [shared_blocks(rows) for rows in (chat, tool_a, tool_b)] == [1, 12, 5]
    assert tool_a["input_tokens"].is_between(6_200, 8_200).all()
    assert (tool_a["output_tokens"] == 3).mean() == pytest.approx(0.6, abs=0.02)
    assert tool_a["output_tokens"].is_in([3, *range(25, 51)]).all()
    assert tool_b["input_tokens"].mean() == pytest.approx(3_100, rel=0.03)
    assert tool_b["output_tokens"].is_between(16, 24).all()
    assert chat["output_tokens"].mean() == pytest.approx(395, rel=0.10)


def shared_blocks(rows: pl.DataFrame) -> int:
    """How many first blocks all rows have in common."""
    shortest = rows["hash_ids"].list.len().min()
    distinct = (rows["hash_ids"].list.get(place).n_unique() for place in range(shortest))
    return next((place for place, count in enumerate(distinct) if count > 1), shortest)


@pytest.mark.parametrize(("thousands", "requests"), [(16, 3600), (32, 1800), (64, 900), (128, 450)])
def test_poisson_points(thousands, requests) -> None:
    """Fixed prompts, output 512, half of each shared; gaps are exponential."""
    trace = generate(f"poisson-{thousands}k")
    assert trace.frame.height == requests
    assert trace.frame["input_tokens"].unique().to_list() == [thousands * 1024]
    assert trace.frame["output_tokens"].unique().to_list() == [512]
    assert prefix_hit_ratio(trace, None) == pytest.approx(0.5, abs=0.002)
    gaps = np.diff(trace.frame["arrival_s"].to_numpy())
    # The deviation of exponential gaps is their mean; of 449 of them it is known to about 7 %.
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("name", "mean_in", "mean_out", "least", "most"),
    [("arxiv-summarization-like", 8_088, 229, 0, 0), ("leval-like", 19_019, 72, 0.8, 0.95)],
)
def test_public_data_set_points(name, mean_in, mean_out, least, most) -> None:
    """Average lengths within 4 % and the reuse of arXiv 2407.00079, Table 2."""
    trace = generate(name)
    assert trace.frame["input_tokens"].mean() == pytest.approx(mean_in, rel=0.04)
    assert trace.frame["output_tokens"].mean() == pytest.approx(mean_out, rel=0.04)
    assert least <= prefix_hit_ratio(trace, None) <= most


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("block_tokens", [512, 100, 16])
def test_every_generator_keeps_the_law(name, block_tokens) -> None:
    """Sorted times from 0 on, a block id per block, chained ids numbered by first use."""
    trace = generate(name, seed=3, block_tokens=block_tokens, duration_s=120.0)
    frame = trace.frame
    assert frame["arrival_s"].is_sorted()
    assert frame["arrival_s"].min() >= 0
    assert frame["arrival_s"].max() <= 120
    blocks = -(-frame["input_tokens"].to_numpy() // block_tokens)
    assert frame["hash_ids"].list.len().to_list() == blocks.tolist()
    assert frame["hash_ids"][0].to_list() == list(range(blocks[0]))
    assert describe(trace)["prefix_is_chained"]


@pytest.mark.parametrize("name", GENERATORS)
def test_an_id_has_one_length(name) -> None:
    """A partial last block is never the same id as a full one."""
    trace = generate(name, duration_s=600.0)
    lengths: dict[int, int] = {}
    for ids, tokens in trace.frame.select("hash_ids", "input_tokens").iter_rows():
        for place, block in enumerate(ids):
            length = min(512, tokens - 512 * place)
            assert lengths.setdefault(block, length) == length


def test_quantised_stamps_are_found_again() -> None:
    """quantise_s=3 gives the real trace's buckets."""
    trace = open_trace("conversation-like:quantise_s=3,duration_s=600")
    assert describe(trace)["timestamp_bucket_s"] == 3.0


def test_a_seed_fixes_everything_and_changes_everything() -> None:
    """Same seed, same trace and identity; another seed or parameter, another identity."""
    a, b = (generate("conversation-like", seed=5, duration_s=60) for _ in range(2))
    assert a.frame.equals(b.frame)
    others = [
        generate("conversation-like", seed=6, duration_s=60),
        generate("conversation-like", seed=5, duration_s=61),
        generate("conversation-like", seed=5, duration_s=60, block_tokens=256),
    ]
    assert len({a.sha256, *(trace.sha256 for trace in others)}) == 4
    assert a.sha256 == b.sha256
    assert not a.frame.equals(others[0].frame)


PROGRAM = """
import hashlib
from workloads.trace import open_trace
frame = open_trace("toolagent-like:duration_s=30", seed=2).frame
print(hashlib.sha256(frame.write_json().encode()).hexdigest())
"""


def test_every_process_generates_the_same() -> None:
    """No PYTHONHASHSEED changes a trace."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "7")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("conversation-lik", "did you mean conversation-like"),
        ("mooncake-toolagent", "trace fetch mooncake-toolagent"),
        ("conversation-like:rate=3", "no parameter 'rate'; it has duration_s, rate_rps"),
        ("conversation-like:rate_rps=fast", "write one like duration_s=600"),
        ("conversation-like:rate_rps=0", "rate_rps is 0; give a number above 0"),
        ("conversation-like:rate_rps=nan", "give a number above 0"),
        ("conversation-like:rate_rps=1e9", "ask for 1 to 10M"),
        ("poisson-16k:shared=1.5", "shared of at most 1"),
    ],
)
def test_wrong_names_and_parameters_are_refused(spec, says) -> None:
    """One line that says what there is."""
    with pytest.raises(TraceError, match=says) as error:
        open_trace(spec)
    assert "\n" not in str(error.value)


def test_parameters_are_listed_with_their_defaults() -> None:
    """For help texts; those of a point with its own length and rate are its own."""
    assert parameters_of("poisson-64k")["input_tokens"] == 65_536
    assert parameters_of("conversation-like")["duration_s"] == 3600


def test_lru_by_hand() -> None:
    """Two blocks of room: [1 2] fills it; [1 3] reuses 1, drops the deeper 2; [1 2] reuses 1."""
    codes, ends = [1, 2, 1, 3, 1, 2], [2, 4, 6]
    assert prefix_hits(codes, ends, 2) == [0, 1, 1]
    assert prefix_hits(codes, ends, None) == [0, 1, 2]
    assert prefix_hits(codes, ends, 0) == [0, 0, 0]
