"""Does a request go where the paper's Algorithm 1, or a simpler policy, would send it?

In the small profile a prompt of 1000 takes 1.1 s, or 0.2 s with 900 tokens reused, which take
0.09 s to fetch.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest

from reference_cluster.config import ConductorConfig
from reference_cluster.config import Scheduling as Name
from reference_cluster.policies.scheduling import (
    KVCacheCentric,
    LeastLoaded,
    LocalCacheAware,
    Placement,
    Random,
    Scheduling,
    make_scheduling,
    select_decode,
)
from reference_cluster.policies.view import ClusterView, DecodeView, Holder, PrefillView
from tests.reference_cluster.small import ROOMY, a_request, costs, decode_views, prefill_views

COST = costs()
CONFIG = ConductorConfig()


def a_view(
    *prefill: tuple[float, int],
    holder: Holder | None = None,
    context_tokens: tuple[int, ...] = (0, 0, 0),
) -> ClusterView:
    """Prefill instances as (queue_s, reused_tokens), and one empty decode instance."""
    instances = [
        PrefillView(id, queue_s, reused, context_tokens[id])
        for id, (queue_s, reused) in enumerate(prefill)
    ]
    prefill, decode = prefill_views(*instances), decode_views(ROOMY)
    return ClusterView(0.0, prefill, decode, holder, is_colocated=False)


def a_holder(id: int, tokens: int, bytes_per_s: float = 1e6) -> Holder:
    return Holder(id, tokens // 10, tokens, bytes_per_s)


def placed(policy: Scheduling, view: ClusterView, input_tokens: int = 1000) -> Placement:
    return policy.place(a_request(input_tokens=input_tokens), view)


def algorithm_1(view: ClusterView, threshold: float = 1.3, input_tokens: int = 1000) -> Placement:
    policy = KVCacheCentric(COST, ConductorConfig(balancing_threshold=threshold))
    return placed(policy, view, input_tokens)


# ---- Algorithm 1 -----------------------------------------------------------------------------


def test_a_prefix_is_fetched_to_where_the_queue_is_short() -> None:
    """Instance 1 has it and 10 s to do: 0 fetches. 0.09 s + 0.2 s beats 10.2 s; x/0 is over."""
    placement = algorithm_1(a_view((0.0, 0), (10.0, 900), holder=a_holder(1, 900)))
    assert placement.prefill == 0
    assert placement.fetch == a_holder(1, 900)
    assert placement.reused_tokens == 900
    assert placement.ttft_s == pytest.approx(0.29)


def test_an_idle_holder_does_it_itself() -> None:
    """0.2 s without a fetch beats 0.29 s with one."""
    placement = algorithm_1(a_view((0.0, 0), (0.0, 900), holder=a_holder(1, 900)))
    assert (placement.prefill, placement.fetch) == (1, None)
    assert placement.ttft_s == pytest.approx(0.2)


def test_nobody_fetches_what_nobody_has() -> None:
    """0/0 is not over the threshold: the shortest queue computes it all."""
    placement = algorithm_1(a_view((3.0, 0), (1.0, 0)))
    assert (placement.prefill, placement.fetch, placement.reused_tokens) == (1, None, 0)
    assert placement.ttft_s == pytest.approx(2.1)


@pytest.mark.parametrize(("best_tokens", "is_fetching"), [(130, False), (140, True)])
def test_a_prefix_must_be_longer_by_the_threshold(best_tokens: int, is_fetching: bool) -> None:
    """Own 100 at 1.3: a best of 130 is not worth a fetch, 140 is."""
    view = a_view((0.0, 100), (50.0, best_tokens), holder=a_holder(1, best_tokens))
    placement = algorithm_1(view)
    assert placement.prefill == 0
    assert (placement.fetch is not None) == is_fetching
    assert placement.reused_tokens == (best_tokens if is_fetching else 100)


def test_only_what_is_missing_is_fetched() -> None:
    """400 of 900 tokens are there: 500 x 100 bytes at 1 MB/s are 0.05 s, and 0.2 s of prefill."""
    placement = algorithm_1(a_view((0.0, 400), (10.0, 900), holder=a_holder(1, 900)))
    assert placement.ttft_s == pytest.approx(0.25)


def test_a_busy_link_makes_a_fetch_dearer() -> None:
    """At a tenth of the link 0.9 s + 0.2 s lose against a queue of 0.8 s and 0.2 s, just."""
    slow = a_holder(1, 900, bytes_per_s=1e5)
    assert algorithm_1(a_view((0.0, 0), (0.8, 900), holder=slow)).prefill == 1
    assert algorithm_1(a_view((0.0, 0), (1.0, 900), holder=slow)).prefill == 0


def test_a_queue_weighs_against_a_cache() -> None:
    """Without a fetch: 0.8 s + 0.2 s at the cache beat 1.1 s elsewhere, 1.0 s + 0.2 s do not."""
    policy = LocalCacheAware(COST, CONFIG)
    assert placed(policy, a_view((0.0, 0), (0.8, 900), holder=a_holder(1, 900))).prefill == 1
    placement = placed(policy, a_view((0.0, 0), (1.0, 900), holder=a_holder(1, 900)))
    assert (placement.prefill, placement.fetch) == (0, None)


def test_ties_go_to_the_lowest_id() -> None:
    """Three alike: number 0, whatever the hash seed."""
    assert algorithm_1(a_view((1.0, 0), (1.0, 0), (1.0, 0))).prefill == 0
    assert placed(LeastLoaded(COST, CONFIG), a_view((1.0, 0), (1.0, 0))).prefill == 0


def test_ties_go_to_the_emptiest_colocated_instance() -> None:
    """Equal queues, but instance 1 decodes less."""
    view = a_view((0.0, 0), (0.0, 0), (0.0, 0), context_tokens=(500, 10, 500))
    assert algorithm_1(view).prefill == 1
    assert placed(LeastLoaded(COST, CONFIG), view).prefill == 1


# ---- the others ------------------------------------------------------------------------------


def test_the_least_loaded_ignores_caches() -> None:
    """A queue shorter by 1 ms wins over a cache worth 0.9 s; its own cache is used all the same."""
    placement = placed(LeastLoaded(COST, CONFIG), a_view((0.500, 900), (0.499, 100)))
    assert (placement.prefill, placement.reused_tokens) == (1, 100)
    assert placement.ttft_s == pytest.approx(0.499 + 1.0)


def test_random_is_the_seeds() -> None:
    """The same seed chooses the same; every instance has its turn; another seed differs."""
    view = a_view((0.0, 0), (9.0, 0), (99.0, 0))

    def choices(seed: int) -> list[int]:
        policy = Random(COST, random.Random(seed))
        return [placed(policy, view).prefill for _ in range(60)]

    assert choices(7) == choices(7)
    assert choices(7) != choices(8)
    assert min(Counter(choices(7)).values()) > 10


@pytest.mark.parametrize("name", get_args(Name))
def test_every_name_makes_a_policy(name: Name) -> None:
    """Whatever the configuration may say is there."""
    policy = make_scheduling(ConductorConfig(scheduling=name), COST, seed=1)
    assert placed(policy, a_view((0.0, 0))).prefill == 0


# ---- the decode instance ---------------------------------------------------------------------

BY_CONTEXT = costs(decode={"sequence_s": 0.01, "context_token_s": 1e-4})


def chosen(*instances: DecodeView) -> int:
    return select_decode(a_request(input_tokens=100), decode_views(*instances), BY_CONTEXT).id


def test_the_shortest_step_is_chosen() -> None:
    """0.1 + 0.01 x 1 + 0.0001 x 900 = 0.2 s against 0.1 + 0.01 x 5 + 0.0001 x 100 = 0.16 s."""
    long, wide = (
        replace(ROOMY, batch=1, context_tokens=900),
        replace(ROOMY, batch=5, context_tokens=100),
    )
    assert chosen(long, wide) == 1
    assert chosen(wide, long) == 0


def test_what_is_on_its_way_counts() -> None:
    """An empty instance that expects 900 tokens is as busy as one that decodes them."""
    expecting = replace(ROOMY, expected=2, expected_tokens=900)
    assert chosen(expecting, replace(ROOMY, batch=1, context_tokens=900)) == 1


def test_full_instances_come_last() -> None:
    """Room first, even where steps are longer; a request of 105 tokens needs 105."""
    full, busy = replace(ROOMY, free_tokens=104), replace(ROOMY, batch=9, free_tokens=105)
    assert chosen(full, busy) == 1


def test_with_no_room_anywhere_the_shortest_step_is_chosen() -> None:
    """It will wait, but it has to wait somewhere; ties go to the lowest id."""
    full = replace(ROOMY, free_tokens=0)
    assert chosen(replace(full, batch=2), replace(full, batch=1)) == 1
    assert chosen(full, full) == 0


def test_the_predicted_tbt_is_the_first_steps() -> None:
    """One more in the batch with its prompt: 0.1 + 0.01 x 3 + 0.0001 x (500 + 1000) = 0.28 s."""
    view = a_view((0.0, 0))
    view.decode = decode_views(replace(ROOMY, batch=2, context_tokens=500))
    policy = LeastLoaded(BY_CONTEXT, CONFIG)
    assert placed(policy, view).tbt_s == pytest.approx(0.28)


def test_a_colocated_request_stays_where_it_starts() -> None:
    """Even where another instance would decode faster."""
    view = a_view((0.0, 0), (1.0, 0))
    view.is_colocated = True
    view.decode = decode_views(replace(ROOMY, batch=50), ROOMY)
    placement = placed(LeastLoaded(COST, CONFIG), view)
    assert (placement.prefill, placement.decode) == (0, 0)
