"""What do colocated instances do to each other's tokens? 100 tokens take 0.2 s, a step 0.1 s."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig
from reference_cluster.request import Request
from tests.reference_cluster.small import a_config, a_profile, a_request, served, with_cluster
from tests.reference_cluster.test_decode import token_times

SHARED = [f"block-{number}" for number in range(10)]


def colocated(**settings: Any) -> ClusterConfig:
    return a_config(system="colocated", colocated=settings)


CHUNKED = colocated(batching="chunked", step_tokens_max=30, batch_max=8)


def test_a_request_alone() -> None:
    """0.2 s of prefill, then a token each 0.1 s; nothing is transferred."""
    request = a_request(output_tokens=3)
    served(colocated(), [request])
    assert token_times(request) == pytest.approx([0.2, 0.3, 0.4])
    stamps = request.timeline
    assert stamps.prefill_end_s == stamps.transferred_s == stamps.first_token_s
    assert stamps.decode_start_s == stamps.first_token_s
    assert request.prefill == request.decode == "colocated-0"


def test_one_token_needs_no_decoding() -> None:
    """It is finished with its prefill."""
    request = a_request(output_tokens=1)
    served(colocated(), [request])
    assert request.timeline.finished_s == pytest.approx(0.2)
    assert request.timeline.decode_start_s is None
    assert request.memberships == []


def test_prefill_first_stalls_all_decoding() -> None:
    """The second prompt comes at 0.35 s and runs from 0.4 to 0.6 s; the first waits for it."""
    first, second = a_request(0, output_tokens=6), a_request(1, output_tokens=2, arrived_s=0.35)
    served(colocated(), [first, second])
    assert token_times(first) == pytest.approx([0.2, 0.3, 0.4, 0.7, 0.8, 0.9])
    assert token_times(second) == pytest.approx([0.6, 0.7])
    assert second.timeline.prefill_start_s == pytest.approx(0.4)


def test_chunked_steps_fill_their_budget_with_prompt() -> None:
    """30 tokens a step of 0.1 + 0.03 s, three times, and 10 in 0.11 s: the first token at 0.5 s."""
    request = a_request(output_tokens=2)
    served(CHUNKED, [request])
    assert token_times(request) == pytest.approx([0.5, 0.6])
    assert request.prefill_busy_s == pytest.approx(0.5)


def test_chunked_steps_go_on_decoding() -> None:
    """Beside one decode 29 tokens fit: 0.129 s three times, 0.113 s once. No gap is longer."""
    first, second = a_request(0, output_tokens=7), a_request(1, output_tokens=2, arrived_s=0.55)
    served(CHUNKED, [first, second])
    times = [0.5, 0.6, 0.729, 0.858, 0.987, 1.1, 1.2]
    assert token_times(first) == pytest.approx(times)
    assert token_times(second) == pytest.approx([1.1, 1.2])


def test_a_steps_budget_is_shared_in_order() -> None:
    """Two short prompts of 20: the first and half of the second in one step, then the rest."""
    first, second = (a_request(id, input_tokens=20, output_tokens=2) for id in range(2))
    served(CHUNKED, [first, second])
    assert first.timeline.first_token_s == pytest.approx(0.13)
    # The second step decodes the first request and computes 10 tokens.
    assert second.timeline.first_token_s == pytest.approx(0.13 + 0.11)
    assert first.prefill_busy_s == pytest.approx(0.13 * 2 / 3)


def test_chunks_beside_decodes_are_dearer() -> None:
    """With a factor of 2: 0.1 + 2 x 0.03 s a full step."""
    request = a_request(input_tokens=30, output_tokens=2)
    served(CHUNKED, [request], profile=a_profile(chunk_factor=2.0))
    assert request.timeline.first_token_s == pytest.approx(0.16)


def test_prefills_are_charged_with_what_they_add_to_a_step() -> None:
    """Beside one decode: 29, 29, 29 and 13 tokens of 1 ms; each step's 0.1 s are decoding's."""
    first, second = a_request(0, output_tokens=7), a_request(1, output_tokens=2, arrived_s=0.55)
    served(CHUNKED, [first, second])
    assert second.prefill_busy_s == pytest.approx(0.1)


def test_overheads_of_caching_and_mixing_add_up() -> None:
    """One step of 30 tokens: 0.1 + 0.01 + 0.005 + 0.03 s, and 0.02 s for the prompt's blocks."""
    request = a_request(input_tokens=30, output_tokens=2)
    overheads = {
        "prefix_caching_step_s": 0.01,
        "prefix_caching_prefill_s": 0.02,
        "chunked_step_s": 0.005,
    }
    settings = {"batching": "chunked", "step_tokens_max": 30, "batch_max": 8}
    config = colocated(prefix_caching=True, **settings)
    served(config, [request], profile=a_profile(overheads=overheads))
    assert token_times(request) == pytest.approx([0.165, 0.275])


@pytest.mark.parametrize(("caching", "reused"), [(True, 99), (False, 0)])
def test_prefixes_are_reused_if_caching_is_on(caching: bool, reused: int) -> None:
    """The same prompt again: 0.101 s, or 0.2 s as before."""
    first, again = (a_request(id, blocks=SHARED, arrived_s=5.0 * id) for id in range(2))
    served(colocated(prefix_caching=caching), [first, again])
    assert again.reused_tokens == reused
    assert again.prefill_busy_s == pytest.approx(0.2 - reused * 1e-3)


def test_a_prompt_can_be_reused_while_its_request_decodes() -> None:
    """The first decodes until 5.2 s; the second comes at 1 s and shares its blocks."""
    first = a_request(0, blocks=SHARED, output_tokens=51)
    second = a_request(1, blocks=SHARED, arrived_s=1.05)
    served(colocated(prefix_caching=True), [first, second])
    assert second.reused_tokens == 99


def test_chunked_prefill_begins_after_what_is_reused() -> None:
    """60 tokens are cached; 40 are left: 30 and 10 in steps of 0.13 and 0.11 s."""
    first = a_request(0, 60, blocks=SHARED[:6], output_tokens=1)
    again = a_request(1, blocks=SHARED, arrived_s=5.0)
    settings = {"batching": "chunked", "step_tokens_max": 30, "batch_max": 8}
    served(colocated(prefix_caching=True, **settings), [first, again])
    assert again.reused_tokens == 60
    assert again.timeline.first_token_s == pytest.approx(5.24)


def waiting_for_memory(**settings: Any) -> list[Request]:
    """Two requests of 11 blocks each on an instance of 20."""
    requests = [a_request(id, output_tokens=5) for id in range(2)]
    served(colocated(device_tokens=200, **settings), requests)
    return requests


@pytest.mark.parametrize("caching", [True, False])
def test_full_device_memory_makes_others_wait(caching: bool) -> None:
    """The second starts when the first has ended, at 0.6 s; cached blocks give way to it."""
    first, second = waiting_for_memory(prefix_caching=caching)
    assert first.timeline.finished_s == pytest.approx(0.6)
    assert second.timeline.prefill_start_s == pytest.approx(0.6)


def test_a_full_batch_makes_others_wait() -> None:
    """One at a time: the second starts when the first has ended."""
    requests = [a_request(id, output_tokens=5) for id in range(2)]
    served(colocated(batch_max=1), requests)
    assert requests[1].timeline.prefill_start_s == pytest.approx(0.6)


def test_a_cancelled_request_waits_no_more() -> None:
    """It gives its place up while the first still holds the memory, and is predicted no more."""
    first, gone, third = (a_request(id, output_tokens=50) for id in range(3))
    last = a_request(4, arrived_s=2.0)
    config = colocated(device_tokens=200)
    served(config, [first, gone, third, last], cancels=[(1.0, gone), (1.5, third)])
    assert gone.timeline.prefill_start_s is None
    assert last.predicted_ttft_s == pytest.approx(0.2)


def test_a_request_cancelled_in_its_prefill_gives_nothing() -> None:
    """Its prompt is computed to the end of the go, and forgotten."""
    gone, following = a_request(0), a_request(1)
    served(colocated(), [gone, following], cancels=[(0.1, gone)])
    assert gone.timeline.first_token_s is None
    assert following.timeline.prefill_start_s == pytest.approx(0.2)


def test_free_memory_is_what_running_requests_will_not_need() -> None:
    """100 blocks, of which the one that decodes needs 15 (150 tokens), named or not."""
    for caching in (True, False):
        config = colocated(device_tokens=1000, prefix_caching=caching)
        assert free_tokens_during(config, output_tokens=50) == [850, 850, 1000]


def free_tokens_during(config: ClusterConfig, output_tokens: int) -> list[int]:
    """What the Conductor sees while one request prefills, decodes, and has gone."""

    async def script(cluster: Cluster) -> list[int]:
        cluster.submit(a_request(output_tokens=output_tokens))
        seen = []
        for nap_s in (0.1, 1.0, 100.0):
            await asyncio.sleep(nap_s)
            seen.append(cluster.colocated[0].decode_view(cluster.loop.time()).free_tokens)
        return seen

    return with_cluster(config, script)
