"""What does a prefill instance compute, in which order, and what does it reuse?

A prompt of 100 tokens takes 0.2 s, its KV 2.5 ms more; a block that is reused saves 10 ms.
"""

from __future__ import annotations

import pytest

from reference_cluster.request import Request
from tests.reference_cluster.small import a_config, a_request, served

SHARED = [f"block-{number}" for number in range(10)]


def starts(requests: list[Request]) -> list[float | None]:
    return [request.timeline.prefill_start_s for request in requests]


def ends(requests: list[Request]) -> list[float | None]:
    return [request.timeline.prefill_end_s for request in requests]


def test_prompts_are_computed_one_by_one_as_they_came() -> None:
    """0.2 s each, from 0 s on."""
    requests = [a_request(id) for id in range(3)]
    served(a_config(), requests)
    assert starts(requests) == pytest.approx([0.0, 0.2, 0.4])
    assert ends(requests) == pytest.approx([0.2, 0.4, 0.6])
    assert [request.prefill_busy_s for request in requests] == pytest.approx([0.2] * 3)
    assert [request.prefill for request in requests] == ["prefill-0"] * 3


def test_a_prompt_that_was_there_before_is_not_computed_again() -> None:
    """All but its last token: 0.101 s. String ids are as good as numbers."""
    first, again = (a_request(id, blocks=SHARED, arrived_s=5.0 * id) for id in range(2))
    served(a_config(), [first, again])
    assert (first.reused_tokens, again.reused_tokens) == (0, 99)
    assert again.prefill_busy_s == pytest.approx(0.101)


def test_only_the_common_beginning_is_reused() -> None:
    """4 blocks of 10 tokens: 0.1 + 0.06 s."""
    first = a_request(0, blocks=SHARED)
    other = a_request(1, blocks=[*SHARED[:4], *"efghij"], arrived_s=5.0)
    served(a_config(), [first, other])
    assert other.reused_tokens == 40
    assert other.prefill_busy_s == pytest.approx(0.16)


def test_a_prompt_still_in_the_queue_counts_as_cached() -> None:
    """Both come at once: the second will find what the first leaves, and is predicted to."""
    first, second = (a_request(id, blocks=SHARED) for id in range(2))
    served(a_config(), [first, second])
    assert second.reused_tokens == 99
    assert second.predicted_ttft_s == pytest.approx(0.2 + 0.101)
    assert ends([first, second]) == pytest.approx([0.2, 0.301])


def test_a_promise_that_is_not_kept_is_not_reused() -> None:
    """The first of the two above is cancelled in the queue: the second computes it all itself."""
    before, first = a_request(9, input_tokens=900), a_request(0, blocks=SHARED)
    second = a_request(1, blocks=SHARED)
    served(a_config(), [before, first, second], cancels=[(0.5, first)])
    assert first.status == "failed"
    assert first.timeline.prefill_start_s is None
    assert second.reused_tokens == 0
    assert starts([before, second]) == pytest.approx([0.0, 1.0])


def test_a_cancel_acts_between_chunks() -> None:
    """Chunks of 10 tokens end at 0.11, 0.12, 0.13 s ...: cancelled at 0.115, it stops at 0.12 s."""
    gone, following = a_request(0), a_request(1)
    config = a_config(prefill={"chunk_tokens": 10})
    served(config, [gone, following], cancels=[(0.115, gone)])
    assert gone.prefill_busy_s == pytest.approx(0.12)
    assert gone.prefilled_tokens == 20
    assert starts([following]) == pytest.approx([0.12])
    assert gone.timeline.finished_s == 0.115
    assert gone.timeline.prefill_end_s is None


def test_a_pool_keeps_as_much_of_a_prompt_as_fits() -> None:
    """5 blocks of 10 stay: the second time 50 tokens are reused."""
    first, again = (a_request(id, blocks=SHARED, arrived_s=5.0 * id) for id in range(2))
    served(a_config(prefill={"dram_tokens": 50}), [first, again])
    assert (first.reused_tokens, again.reused_tokens) == (0, 50)


def test_the_oldest_prompt_makes_room() -> None:
    """Room for two prompts, three come: the first is gone when it comes again, from its end."""
    prompts = [a_request(id, arrived_s=5.0 * id) for id in range(3)]
    again = a_request(3, blocks=prompts[0].blocks, arrived_s=20.0)
    cluster = served(a_config(prefill={"dram_tokens": 250}), [*prompts, again])
    # 25 blocks: the third's 10 evicted the first's last 5.
    assert again.reused_tokens == 50
    assert cluster.prefill[0].pool.evictions == 5 + 5


# ---- fetching --------------------------------------------------------------------------------


def fetching(*more: Request, cancel_s: float | None = None) -> Request:
    """A request whose prefix of 10,000 tokens is fetched, from 20 s on, by prefill-1.

    The first leaves the prefix at prefill-0, where another then computes until 29.1 s.
    """
    blocks = list(range(1000))
    first = a_request(100, 10_000, 1, blocks=blocks)
    busy = a_request(101, 9_000, 1, arrived_s=20.0)
    wanting = a_request(102, 10_000, 1, blocks=blocks, arrived_s=20.0)
    config = a_config(prefill_instances=2, conductor={"scheduling": "kvcache-centric"})
    cancels = [(cancel_s, wanting)] if cancel_s else []
    served(config, [first, busy, wanting, *more], cancels)
    assert (first.prefill, busy.prefill, wanting.prefill) == ("prefill-0", "prefill-0", "prefill-1")
    return wanting


def test_a_prefix_is_fetched_before_the_prefill() -> None:
    """9,999 tokens are 0.9999 s on the link, then 0.101 s for the last one."""
    wanting = fetching()
    assert wanting.fetched_tokens == wanting.reused_tokens == 9_999
    stamps = wanting.timeline
    assert stamps.fetched_s == stamps.prefill_start_s == pytest.approx(20.9999)
    assert stamps.prefill_end_s == pytest.approx(21.1009)
    assert wanting.predicted_ttft_s == pytest.approx(0.9999 + 0.101)


def test_a_fetch_does_not_hold_up_others() -> None:
    """A prompt that comes during the fetch is computed first, from 20.1 to 20.3 s."""
    other = a_request(103, arrived_s=20.1, output_tokens=1)
    wanting = fetching(other)
    assert other.prefill == "prefill-1"
    assert starts([other, wanting]) == pytest.approx([20.1, 20.9999])


def test_a_cancel_during_a_fetch_leaves_nothing_behind() -> None:
    """The fetch goes on to its end, which nobody waits for; then all is free again (`served`
    checks), and the record of the failure says nothing that came after it."""
    wanting = fetching(cancel_s=20.5)
    assert wanting.status == "failed"
    stamps = wanting.timeline
    assert (stamps.fetched_s, stamps.prefill_start_s, stamps.finished_s) == (None, None, 20.5)


# ---- what is recorded of it ------------------------------------------------------------------


def test_the_chunks_of_a_prompt_are_recorded_and_when_its_kv_began_to_leave() -> None:
    """100 tokens in chunks of 40: 0.1 s and 1 ms a token; its first layer leaves at once."""
    request = a_request(0)
    served(a_config(prefill={"chunk_tokens": 40}), [request])
    starts_s, ends_s, tokens = zip(*request.timeline.chunks, strict=True)
    assert tokens == (40, 40, 20)
    assert starts_s == pytest.approx((0.0, 0.14, 0.18))
    assert ends_s == pytest.approx((0.14, 0.18, 0.2))
    assert request.timeline.transfer_start_s == 0.0


def test_a_prompt_computed_in_one_go_has_no_chunks() -> None:
    """Its prefill's start and end say it all; sent whole, its KV leaves at that end."""
    request = a_request(0)
    served(a_config(prefill={"layerwise": False}), [request])
    assert request.timeline.chunks == ()
    assert request.timeline.transfer_start_s == request.timeline.prefill_end_s
