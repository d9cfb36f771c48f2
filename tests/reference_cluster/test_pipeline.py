"""How do prompts flow through a group of prefill nodes (CPP)?

Alone on one node a prompt takes 0.1 s and 1 ms a token; in a group of two every stage takes half a
chunk's computing, and the 0.1 s are spent in the first.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import CostModel
from reference_cluster.engines.modelled import ModelledEngine
from reference_cluster.policies.batching import chunks
from reference_cluster.request import Request
from reference_cluster.virtual_time import run_virtual
from tests.reference_cluster.small import ROUGH, SMALL, a_config, a_request, random_requests, served


def in_groups(nodes: int, groups: int = 1, chunk_tokens: int = 50, **prefill: Any) -> ClusterConfig:
    prefill |= {"nodes_per_group": nodes, "chunk_tokens": chunk_tokens}
    return a_config(prefill_instances=nodes * groups, prefill=prefill)


def ends(requests: list[Request]) -> list[float | None]:
    return [request.timeline.prefill_end_s for request in requests]


def test_a_prompt_flows_through_the_stages() -> None:
    """Chunks of 25 ms a stage: the first stage until 0.15 s, the second until 0.175 s."""
    request = a_request()
    served(in_groups(2), [request])
    assert request.timeline.prefill_end_s == pytest.approx(0.175)
    assert request.prefill_busy_s == pytest.approx(0.15)
    assert request.predicted_ttft_s == pytest.approx(0.175)


def test_the_next_prompt_starts_when_the_first_stage_is_free() -> None:
    """At 0.15 s, and ends 0.175 s later; the third as well."""
    requests = [a_request(id) for id in range(3)]
    served(in_groups(2), requests)
    assert [one.timeline.prefill_start_s for one in requests] == pytest.approx([0.0, 0.15, 0.3])
    assert ends(requests) == pytest.approx([0.175, 0.325, 0.475])
    assert requests[2].predicted_ttft_s == pytest.approx(0.475)


def test_a_small_rest_waits_behind_its_predecessor() -> None:
    """50 and 10 tokens: the rest is at the second stage at 0.13 s, which is busy until 0.15 s."""
    request = a_request(input_tokens=60)
    served(in_groups(2), [request])
    assert ends([request]) == pytest.approx([0.155])
    assert request.predicted_ttft_s == pytest.approx(0.155)


def test_one_chunk_gains_nothing() -> None:
    """It is in one stage at a time: 0.1 + 4 x 0.025 s."""
    request = a_request()
    served(in_groups(4, chunk_tokens=1000), [request])
    assert ends([request]) == pytest.approx([0.2])


def test_a_group_has_the_memory_of_its_nodes() -> None:
    """50 tokens a node: two keep a prompt of 100."""
    first, again = (a_request(id, blocks=range(10), arrived_s=5.0 * id) for id in range(2))
    cluster = served(in_groups(2, dram_tokens=50), [first, again])
    assert cluster.prefill[0].pool.capacity == 10
    assert again.reused_tokens == 99


def test_a_group_has_the_links_of_its_nodes() -> None:
    """1 MB/s a node; a decode node still takes 1 MB/s only: 10 ms after the prefill's end."""
    cluster = served(in_groups(2, groups=3), [a_request()])
    assert len(cluster.prefill) == 3
    assert [link.bytes_per_s for link in cluster.transport.sending] == [2e6] * 3 + [1e6]
    request = a_request()
    served(in_groups(2, layerwise=False), [request])
    assert request.timeline.transferred_s == pytest.approx(0.175 + 0.01)


@pytest.mark.parametrize("at_s", [0.05, 0.13, 0.16])
def test_a_cancel_at_any_stage_frees_all(at_s: float) -> None:
    """In the first stage's chunks and while the last one drains; the next starts in time."""
    gone, following = a_request(0), a_request(1)
    served(in_groups(2), [gone, following], cancels=[(at_s, gone)])
    assert (gone.status, following.status) == ("failed", "finished")
    assert gone.timeline.prefill_end_s is None
    assert following.timeline.prefill_start_s == pytest.approx(0.125 if at_s < 0.125 else 0.15)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    input_tokens=st.integers(1, 5000),
    reused_share=st.floats(0.0, 1.0),
    chunk_tokens=st.integers(1, 2000),
    stages=st.integers(1, 5),
)
def test_the_closed_form_is_what_the_stages_do(
    input_tokens: int, reused_share: float, chunk_tokens: int, stages: int
) -> None:
    """A prompt alone leaves the last stage when `prefill_s` says, the first when `occupied_s`."""
    cost = CostModel(ROUGH, stages=stages, chunk_tokens=chunk_tokens)

    async def flow() -> tuple[float, float]:
        engine = ModelledEngine(cost)
        request = a_request(input_tokens=input_tokens)
        request.reused_tokens = min(input_tokens - 1, int(reused_share * input_tokens))
        request.prefilled_tokens = request.reused_tokens
        end_s = 0.0
        for chunk in chunks(request, chunk_tokens):
            end_s = await engine.prefill(end_s, chunk)
            request.prefilled_tokens = chunk.end
        expected = (
            cost.occupied_s(input_tokens, request.reused_tokens),
            cost.prefill_s(input_tokens, request.reused_tokens),
        )
        assert (end_s, engine.drained_s(end_s)) == pytest.approx(expected)
        return expected

    occupied_s, prefill_s = run_virtual(flow())
    assert occupied_s <= prefill_s


def test_groups_of_one_are_no_groups() -> None:
    """200 random requests end at the same instants, whatever the chunks."""
    finished = []
    for config in (in_groups(1, groups=3), a_config(prefill_instances=3)):
        requests = random_requests(4, 200)
        served(config, requests, profile=ROUGH)
        finished.append([one.timeline.finished_s for one in requests])
    assert finished[0] == pytest.approx(finished[1], rel=1e-9)


def test_long_prompts_are_faster_and_short_ones_slower_in_a_group() -> None:
    """One long prompt: 0.1 + 5.05 s in a group of two, 10.1 s on one of two nodes."""
    long = a_request(input_tokens=10_000)
    served(in_groups(2, chunk_tokens=100), [long], profile=SMALL)
    alone = a_request(input_tokens=10_000)
    served(a_config(prefill_instances=2), [alone])
    assert long.timeline.prefill_end_s == pytest.approx(0.1 + 5.0 + 0.05)
    assert alone.timeline.prefill_end_s == pytest.approx(10.1)
