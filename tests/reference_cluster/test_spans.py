"""Is a span exactly what its steps would have been? Every run twice: in spans, and step by step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile, load_profile
from reference_cluster.request import Request
from reference_cluster.simulate import simulate
from reference_cluster.spans import span_columns
from tests.reference_cluster.small import ROUGH, a_config, random_requests
from tests.reference_cluster.test_decode import token_times

TOLERANCE_S = 1e-9

CLUSTERS: dict[str, dict[str, Any]] = {
    "disaggregated": {"prefill_instances": 2, "decode_instances": 2},
    "disaggregated, early rejection": {
        "prefill_instances": 2,
        "decode_instances": 2,
        "conductor": {"admission": "early-rejection"},
        "slo": {"ttft_s": 1.5, "tbt_s": 0.036},
    },
    "disaggregated, little memory": {
        "decode": {"device_tokens": 2000, "batch_max": 4},
        "prefill": {"dram_tokens": 500},
    },
    "prefill-first": {"system": "colocated", "colocated_instances": 2},
    "prefill-first, caching": {
        "system": "colocated",
        "colocated": {"prefix_caching": True, "device_tokens": 3000},
    },
    "chunked": {
        "system": "colocated",
        "colocated": {"batching": "chunked", "step_tokens_max": 200, "batch_max": 16},
    },
    "chunked, caching, early rejection": {
        "system": "colocated",
        "colocated_instances": 2,
        "colocated": {
            "batching": "chunked",
            "step_tokens_max": 200,
            "batch_max": 16,
            "prefix_caching": True,
        },
        "conductor": {"admission": "early-rejection"},
        "slo": {"ttft_s": 1.5, "tbt_s": 0.036},
    },
}


def outcome(request: Request) -> tuple[Any, ...]:
    """What must be the same, whatever the clock's steps."""
    return (
        request.status,
        request.reason,
        request.prefill,
        request.decode,
        request.reused_tokens,
        request.fetched_tokens,
        request.produced_tokens,
    )


def moments(request: Request) -> list[float]:
    """Every time that a run reports of a request: stamps, predictions, tokens."""
    predicted = [request.predicted_ttft_s, request.predicted_tbt_s, request.prefill_busy_s]
    times = [*dataclasses.astuple(request.timeline)[:10], *predicted]  # All but the chunks.
    if request.timeline.first_token_s is not None:
        times += token_times(request)
    return [float("nan") if time is None else time for time in times]


def assert_spans_are_steps(
    config: ClusterConfig, profile: Profile, spans: list[Request], steps: list[Request]
) -> None:
    """Run the same requests both ways, and compare all there is."""
    simulate(config, profile, spans)
    simulate(config, profile, steps, is_step_by_step=True)
    assert [*map(outcome, spans)] == [*map(outcome, steps)]
    for one, other in zip(spans, steps, strict=True):
        np.testing.assert_allclose(moments(one), moments(other), rtol=0, atol=TOLERANCE_S)
    span_rows, step_rows = (len(span_columns(requests)["steps"]) for requests in (spans, steps))
    assert span_rows <= step_rows


@pytest.mark.parametrize("cluster", CLUSTERS)
@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 25),
    mean_gap_s=st.sampled_from([0.01, 0.1, 0.5]),
)
def test_a_span_is_its_steps(cluster: str, seed: int, count: int, mean_gap_s: float) -> None:
    """The same outcomes, and every time to 1e-9 s."""
    config = a_config(**CLUSTERS[cluster])
    one, other = (random_requests(seed, count, mean_gap_s) for _ in range(2))
    assert_spans_are_steps(config, ROUGH, one, other)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_spans_are_steps_in_a_long_busy_run(cluster: str) -> None:
    """500 requests, many at once, with the default profile's coefficients where sums grow long."""
    config = a_config(**CLUSTERS[cluster])
    one, other = (random_requests(11, 500, 0.12, output_max=120) for _ in range(2))
    assert_spans_are_steps(config, ROUGH, one, other)
    statuses = {request.status for request in one}
    assert ("rejected" in statuses) == ("early rejection" in cluster)
    assert max(map(len, (request.memberships for request in one))) == 1


def test_spans_save_rows() -> None:
    """What they are for: fewer than one row in 5 tokens where requests come now and then."""
    requests = random_requests(3, 100, 2.0, output_max=500)
    simulate(a_config(), load_profile("a800-llama3-70b"), requests)
    columns = span_columns(requests)
    assert sum(columns["steps"]) == sum(request.produced_tokens - 1 for request in requests)
    assert len(columns["steps"]) < sum(columns["steps"]) / 5


def test_no_spans_are_an_empty_table() -> None:
    """Nobody decoded: all columns are there, and empty."""
    columns = span_columns(random_requests(1, 2))
    assert {name: len(column) for name, column in columns.items()} == dict.fromkeys(
        ["request", "start_s", "steps", "first_gap_s", "growth_s"], 0
    )
