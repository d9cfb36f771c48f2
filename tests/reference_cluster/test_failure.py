"""What becomes of requests whose instance is lost? Worked out by hand in virtual time, and by law.

The small profile: a prefill takes 0.1 s and 1 ms a token, a decode step 0.1 s; blocks of 10 tokens.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from reference_cluster.blocks import blocks_of_resumed
from reference_cluster.cluster import Cluster
from reference_cluster.request import Request, Sink
from tests.reference_cluster.small import (
    a_config,
    a_request,
    held,
    random_requests,
    served,
)


class Counting(Sink):
    """A client that counts its tokens."""

    def __init__(self) -> None:
        self.count = 0
        self.ends = 0

    def tokens(self, count: int) -> None:
        self.count += count

    def ended(self, request: Request) -> None:
        self.ends += 1


def lost(*names: str) -> Any:
    def act(cluster: Cluster) -> None:
        for name in names:
            cluster.lose(name)

    return act


def back(*names: str) -> Any:
    def act(cluster: Cluster) -> None:
        for name in names:
            cluster.rejoin(name)

    return act


def two_of_each(**fields: Any) -> Any:
    return a_config(prefill_instances=2, decode_instances=2, **fields)


def test_a_lost_prefill_is_done_again_elsewhere() -> None:
    """0.2 s for 100 tokens; lost at 0.1 s, begun anew on the other: the first token at 0.3 s."""
    request = a_request(output_tokens=2)
    cluster = served(two_of_each(), [request], looks=[(0.1, lost("prefill-0"))])
    assert (request.status, request.prefill) == ("finished", "prefill-1")
    assert request.timeline.first_token_s == pytest.approx(0.3, abs=0.01)
    assert request.replacements == 1
    assert cluster.counts == {"finished": 1}
    assert cluster.recovery.counts == {"lost_instances": 1, "replaced": 1}


def test_what_waits_at_a_lost_prefill_moves_too() -> None:
    """Three requests on one instance; all are served by the one that is left, in order."""
    requests = [a_request(id, output_tokens=1) for id in range(6)]
    served(two_of_each(), requests, looks=[(0.05, lost("prefill-0"))])
    assert {one.prefill for one in requests} == {"prefill-1"}
    assert [one.status for one in requests] == ["finished"] * 6


def test_a_lost_decode_instance_is_resumed_where_it_broke_off() -> None:
    """First token at 0.2 s and one each 0.1 s: 4 at 0.55 s. The other prefills 104 tokens, and
    reuses none of the last block: its next token is the fifth, and there are ten in all."""
    request = a_request(output_tokens=10)
    request.sink = sink = Counting()
    cluster = served(two_of_each(), [request], looks=[(0.55, lost("decode-0"))], steps_max=1)
    assert (request.status, request.decode) == ("finished", "decode-1")
    assert request.produced_tokens == sink.count == 10
    assert sink.ends == 1
    assert request.timeline.first_token_s == pytest.approx(0.2, abs=0.01)
    # The prompt's 10 blocks are in the pool; 4 tokens are computed: 0.104 s. Then 5 more steps.
    assert request.timeline.finished_s == pytest.approx(0.55 + 0.104 + 0.5, abs=0.03)
    assert cluster.recovery.counts["resumed"] == 1


@pytest.mark.parametrize("steps_max", [1, None])
def test_span_and_step_lose_the_same_tokens(steps_max: int | None) -> None:
    """A long span is cut at the loss: its whole steps count."""
    request = a_request(output_tokens=50)
    served(two_of_each(), [request], looks=[(1.05, lost("decode-0"))], steps_max=steps_max)
    assert request.produced_tokens == 50
    steps = [past - first for _, first, past in request.memberships]
    assert len(steps) == 2
    rows = [sum(log.steps[first:past]) for log, first, past in request.memberships]
    # 0.2 first token; 0.3 ... 1.0: 8 more before the loss at 1.05. The second's first comes by
    # its prefill, the other 40 by steps.
    assert rows == [8, 40]


def test_without_resuming_a_broken_stream_fails() -> None:
    """With the reason; what had no token yet is placed anew all the same."""
    streaming, waiting = a_request(0, output_tokens=10), a_request(1, 100, 10, 0.5)
    config = two_of_each(failure={"resume": False})
    served(config, [streaming, waiting], looks=[(0.55, lost("decode-0"))])
    assert (streaming.status, streaming.reason) == ("failed", "lost-decode")
    assert waiting.status == "finished"


def test_a_stream_that_is_refused_where_it_goes_on_has_failed() -> None:
    """The other instance finds itself too busy for it. The client has tokens: that is no 429."""
    request = a_request(output_tokens=10)

    def act(cluster: Cluster) -> None:
        cluster.decode[1].tbt_slo_s = 0.01
        cluster.lose("decode-0")

    served(two_of_each(), [request], looks=[(0.55, act)])
    assert (request.status, request.reason) == ("failed", "tbt-at-decode")
    assert request.produced_tokens == 4


def test_replacements_are_bounded() -> None:
    """Lost, and lost again: with one replacement allowed that is a failure."""
    request = a_request(output_tokens=2)
    config = two_of_each(failure={"replacements_max": 1})
    looks = [(0.1, lost("prefill-0")), (0.15, back("prefill-0")), (0.2, lost("prefill-1"))]
    served(config, [request], looks=looks)
    assert (request.status, request.reason) == ("failed", "lost-prefill")


def test_what_cannot_keep_its_ttft_any_more_is_rejected() -> None:
    """0.3 s are promised; after 0.15 s another 0.2 s are too many."""
    request = a_request(output_tokens=2)
    config = two_of_each(slo={"ttft_s": 0.3, "tbt_s": 1.0})
    served(config, [request], looks=[(0.15, lost("prefill-0"))])
    assert (request.status, request.reason) == ("rejected", "ttft-after-loss")


def test_the_only_instance_is_waited_for() -> None:
    """Lost at 0.1 s and back at 1 s: 0.2 s of prefill from then on. New ones are refused."""
    request, new = a_request(output_tokens=2), a_request(1, arrived_s=0.5)
    looks = [(0.1, lost("prefill-0")), (1.0, back("prefill-0"))]
    served(a_config(), [request, new], looks=looks)
    assert request.status == "finished"
    assert request.timeline.first_token_s == pytest.approx(1.2, abs=0.01)
    assert (new.status, new.reason) == ("rejected", "no-instance")


def test_nobody_waits_longer_than_the_slo() -> None:
    """No instance comes back: rejected 2 s after the arrival."""
    request = a_request(output_tokens=2)
    config = a_config(slo={"ttft_s": 2.0, "tbt_s": 1.0})
    served(config, [request], looks=[(0.1, lost("prefill-0"))])
    assert (request.status, request.reason) == ("rejected", "no-instance")
    assert request.timeline.finished_s == pytest.approx(2.0)


def test_a_client_can_leave_between_two_attempts() -> None:
    """While nobody can take it, and while another attempt is under way."""
    requests = [a_request(0, output_tokens=2), a_request(1, output_tokens=2)]
    looks = [(0.05, lost("prefill-0")), (1.0, back("prefill-0"))]
    cancels = [(0.5, requests[0]), (1.1, requests[1])]
    served(a_config(), requests, cancels, looks=looks)
    assert [one.reason for one in requests] == ["client disconnected"] * 2


def test_a_fetch_whose_holder_is_lost_is_computed() -> None:
    """The holder goes while the prefix is on its way: nobody waits for it, no pin stays."""
    shared = [("s", place) for place in range(20)]
    first = a_request(0, 200, 1, 0.0, shared)
    busy = a_request(1, 900, 1, 1.0)
    second = a_request(2, 210, 1, 1.01, [*shared, "own"])
    config = two_of_each(network={"link_bytes_per_s": 2e5}, conductor={"balancing_threshold": 1.0})
    seen = []

    def look(cluster: Cluster) -> None:
        seen.append(len(cluster.house.fetches))
        cluster.lose("prefill-0")

    served(config, [first, busy, second], looks=[(1.02, look)])
    assert seen == [1]
    assert [one.status for one in (first, busy, second)] == ["finished"] * 3
    assert second.reused_tokens == second.fetched_tokens == 0


def test_a_lost_pool_is_not_counted_on() -> None:
    """The index forgets it at once; after it is back it is as empty as a new one."""
    requests = [a_request(0, output_tokens=1), a_request(1, 100, 1, 2.0, a_request(0).blocks)]
    looks = [(1.0, lost("prefill-0")), (1.5, back("prefill-0"))]
    cluster = served(a_config(), requests, looks=looks)
    assert requests[1].reused_tokens == 0
    assert cluster.index.match(requests[0].blocks) == [10]


def test_a_colocated_instance_is_lost_with_all_it_does() -> None:
    """One decodes, one prefills, one waits: all three end elsewhere."""
    requests = [a_request(id, 100, 20, 0.3 * id) for id in range(3)]
    config = a_config(system="colocated", colocated_instances=2)
    cluster = served(config, requests, looks=[(0.75, lost("colocated-0"))])
    assert {one.decode for one in requests} == {"colocated-1"}
    assert [one.produced_tokens for one in requests] == [20] * 3
    assert cluster.counts == {"finished": 3}


def test_keys_of_resumed_prompts() -> None:
    """Full blocks of the prompt stay; what follows is the request's own, by length."""
    keys = blocks_of_resumed(["a", "b"], 15, 7, 10, id=3)
    assert keys[0] == "a"
    assert len(keys) == 3
    assert keys[:2] == blocks_of_resumed(["a", "b"], 15, 5, 10, id=3)
    assert keys[2] != blocks_of_resumed(["a", "b"], 15, 8, 10, id=3)[2]
    assert keys[1] != blocks_of_resumed(["a", "b"], 15, 7, 10, id=4)[1]


SYSTEMS: list[dict[str, Any]] = [
    {"prefill_instances": 2, "decode_instances": 2},
    {"prefill_instances": 3, "decode_instances": 1, "prefill": {"dram_tokens": 1000}},
    {"system": "colocated", "colocated_instances": 3, "colocated": {"prefix_caching": True}},
]


@pytest.mark.parametrize("seed", range(60))
def test_every_request_ends_whatever_is_lost_when(seed: int) -> None:
    """20 losses at random moments, some of all instances at once; SLOs of 8 s."""
    rng = random.Random(seed)
    fields = SYSTEMS[seed % len(SYSTEMS)]
    admission = rng.choice(["accept-all", "early-rejection", "predictive"])
    conductor = {"admission": admission, "report_every_s": rng.choice([0.0, 0.5])}
    config = a_config(**fields, slo={"ttft_s": 8.0, "tbt_s": 10.0}, conductor=conductor, seed=seed)
    requests = random_requests(seed, 60, mean_gap_s=0.15)
    for request in requests:
        request.sink = Counting()
    looks = []
    for _ in range(20):
        at_s, name = rng.uniform(0, 12), rng.choice(config.instance_names)
        looks += [(at_s, lost(name)), (at_s + rng.expovariate(1.0), back(name))]
    looks.append((40.0, back(*config.instance_names)))
    cluster = served(config, requests, looks=looks)
    assert cluster.counts.total() == len(requests)
    for request in requests:
        check(request, admission)
    assert not held(cluster)


def check(request: Request, admission: str) -> None:
    """The laws that one request must keep, however often it was lost."""
    assert isinstance(request.sink, Counting)
    assert request.sink.ends == 1
    assert request.has_ended
    stamps = request.timeline
    if request.status == "finished":
        assert request.sink.count == request.output_tokens == request.produced_tokens
        order = [stamps.arrived_s, stamps.placed_s, stamps.prefill_start_s, stamps.prefill_end_s]
        order += [stamps.transferred_s, stamps.first_token_s, stamps.finished_s]
        assert order == sorted(order, key=lambda at_s: at_s or 0.0)
    else:
        assert request.reason
