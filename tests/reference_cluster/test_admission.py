"""Who is refused, and with which word?"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from reference_cluster.cluster import Cluster
from reference_cluster.config import ConductorConfig, Slo
from reference_cluster.policies.admission import (
    AcceptAll,
    EarlyRejection,
    Rejected,
    make_admission,
)
from reference_cluster.policies.scheduling import Placement
from reference_cluster.policies.view import ClusterView
from reference_cluster.request import Request
from tests.reference_cluster.small import (
    ROOMY,
    a_config,
    a_profile,
    a_request,
    costs,
    served,
    with_cluster,
)

SLO = Slo(ttft_s=10.0, tbt_s=0.1)
REQUEST = a_request(input_tokens=100, output_tokens=5)


def decided(ttft_s: float, tbt_s: float, free_tokens: int = 105) -> Rejected | None:
    """What early rejection makes of a placement."""
    decode = replace(ROOMY, free_tokens=free_tokens)
    view = ClusterView(0.0, [], [decode], None, is_colocated=False)
    return EarlyRejection(SLO).admit(REQUEST, Placement(0, 0, ttft_s, tbt_s, 0), view)


def test_what_meets_both_slos_and_fits_is_admitted() -> None:
    """At the limits, exactly: 10 s, 0.1 s, 105 tokens of room for 100 + 5."""
    assert decided(10.0, 0.1) is None


def test_a_late_first_token_is_refused_until_the_queue_is_shorter() -> None:
    """25 s against 10 s: come again in 15 s; never sooner than in one."""
    assert decided(25.0, 0.05) == Rejected("ttft", 15.0)
    assert decided(10.5, 0.05) == Rejected("ttft", 1.0)


def test_slow_steps_are_refused() -> None:
    """The decode load is checked before a prefill would be wasted."""
    assert decided(1.0, 0.11) == Rejected("tbt", 1.0)


def test_no_room_is_refused() -> None:
    """One token too few on the decode instance."""
    assert decided(1.0, 0.05, free_tokens=104) == Rejected("capacity", 1.0)


def test_the_first_reason_is_given() -> None:
    """TTFT before TBT before room."""
    late = decided(25.0, 0.5, free_tokens=0)
    slow = decided(1.0, 0.5, free_tokens=0)
    assert late is not None
    assert slow is not None
    assert (late.reason, slow.reason) == ("ttft", "tbt")


def test_accept_all_accepts_all() -> None:
    """However late and full."""
    view = ClusterView(0.0, [], [], None, is_colocated=False)
    policy = make_admission(ConductorConfig(), SLO, costs())
    assert isinstance(policy, AcceptAll)
    assert policy.admit(REQUEST, Placement(0, 0, 1e9, 1e9, 0), view) is None


def statuses(requests: list[Request]) -> list[tuple[str, str | None]]:
    return [(request.status, request.reason) for request in requests]


def test_the_second_of_two_is_rejected_when_the_first_fills_the_ttft() -> None:
    """1.1 s each, at once, TTFT of 2 s: the second would take 2.2 s. It is told at once."""

    async def script(cluster: Cluster) -> list[Request]:
        requests = [a_request(id, input_tokens=1000) for id in range(2)]
        for request in requests:
            cluster.submit(request)
        assert requests[1].timeline.finished_s == 0.0
        await asyncio.sleep(10.0)
        return requests

    config = a_config(conductor={"admission": "early-rejection"}, slo={"ttft_s": 2, "tbt_s": 1})
    assert statuses(with_cluster(config, script)) == [("finished", None), ("rejected", "ttft")]


def test_a_request_is_checked_again_where_it_will_decode() -> None:
    """Alone, each step would take 0.1 + 0.1 s per sequence = 0.2 s. Two were let in while none
    decoded, and the second is refused at the decode instance, its prefill wasted: 0.3 > 0.25 s.
    """

    async def script(cluster: Cluster) -> list[Request]:
        requests = [a_request(id, output_tokens=50) for id in range(2)]
        for request in requests:
            cluster.submit(request)
        await asyncio.sleep(60.0)
        cluster.check_integrity()
        return requests

    config = a_config(
        prefill_instances=2, conductor={"admission": "early-rejection"}, slo={"tbt_s": 0.25}
    )
    requests = with_cluster(config, script, a_profile(decode={"sequence_s": 0.1}))
    assert sorted(statuses(requests), key=str) == [
        ("finished", None),
        ("rejected", "tbt-at-decode"),
    ]
    refused = next(one for one in requests if one.status == "rejected")
    assert refused.timeline.transferred_s == refused.timeline.finished_s
    assert refused.timeline.first_token_s is None
    assert refused.prefilled_tokens == 100


@pytest.mark.parametrize("system", ["disaggregated", "colocated"])
def test_what_fits_nowhere_is_too_large(system: str) -> None:
    """Even by accept-all, and at once: it could only wait for ever."""

    async def script(cluster: Cluster) -> Rejected | None:
        return cluster.submit(a_request(input_tokens=995, output_tokens=6))

    sections = {"decode": {"device_tokens": 1000}, "colocated": {"device_tokens": 1000}}
    config = a_config(system=system, **sections)
    assert with_cluster(config, script) == Rejected("too-large", 0.0)


# ---- load-based and predictive ---------------------------------------------------------------


def test_load_based_looks_at_the_prefill_alone() -> None:
    """Slow steps and full memory are only found out where it would decode."""
    view = ClusterView(0.0, [], [replace(ROOMY, free_tokens=0)], None, is_colocated=False)
    policy = make_admission(ConductorConfig(admission="load-based"), SLO, costs())
    assert policy.admit(REQUEST, Placement(0, 0, 9.0, 9.0, 0), view) is None
    assert policy.admit(REQUEST, Placement(0, 0, 12.0, 0.0, 0), view) == Rejected("ttft", 2.0)
    assert policy.is_rechecking


def placed(ttft_s: float, output_tokens: int = 50) -> Request:
    """One that was placed at 3 s and should have its first token `ttft_s` later."""
    request = a_request(output_tokens=output_tokens)
    request.timeline.placed_s, request.predicted_ttft_s = 3.0, ttft_s
    request.decode = ROOMY.name
    return request


def decoding() -> Request:
    """One that has decoded since 0 s."""
    request = placed(1.0)
    request.timeline.transferred_s = 0.0
    return request


@pytest.mark.parametrize(
    ("others", "decode_s", "batch"),
    [
        ([], 10.0, 1),
        ([decoding()], 10.0, 2),  # Until 10 s.
        ([decoding()], 7.0, 1),  # Done at 7 s, before it matters.
        ([placed(4.0)], 10.0, 2),  # From 7 s on.
        ([placed(6.0)], 10.0, 1),  # From 9 s on: too late to be in the way.
        ([placed(4.0, output_tokens=1)], 10.0, 1),  # Does not decode at all.
        ([decoding()], None, 2),  # Nobody has finished yet: nothing is taken to end.
        ([decoding(), decoding(), placed(4.0), placed(6.0)], 10.0, 4),
    ],
)
def test_predictive_looks_at_the_time_when_it_will_decode(
    others: list[Request], decode_s: float | None, batch: int
) -> None:
    """At 3 s, with a first token in 5 s: who will be decoding at 8 s? 0.1 + 0.01 s a sequence."""
    cost = costs(decode={"sequence_s": 0.01})
    view = ClusterView(3.0, [], [ROOMY], None, False, in_flight=others)
    config = ConductorConfig(admission="predictive", decode_s=decode_s)
    request = a_request()
    policy = make_admission(config, Slo(ttft_s=10.0, tbt_s=0.115), cost)
    rejected = policy.admit(request, Placement(0, 0, 5.0, 0.0, 0), view)
    assert request.predicted_tbt_s == pytest.approx(0.1 + 0.01 * batch)
    assert rejected == (Rejected("tbt", 1.0) if batch > 1 else None)


@pytest.mark.parametrize(("instances", "sequences"), [(1, 4.0), (2, 2.5), (3, 2.0)])
def test_predictive_spreads_who_decodes_over_the_instances(
    instances: int, sequences: float
) -> None:
    """Three others of 100 tokens, wherever they were placed, and this one where it will join."""
    cost = costs(decode={"sequence_s": 0.01, "context_token_s": 1e-4})
    elsewhere = decoding()
    elsewhere.decode = "decode-1"
    in_flight = [decoding(), elsewhere, decoding()]
    view = ClusterView(3.0, [], [ROOMY] * instances, None, False, in_flight=in_flight)
    request = a_request()
    config = ConductorConfig(admission="predictive", decode_s=99.0)
    make_admission(config, SLO, cost).admit(request, Placement(0, 0, 5.0, 0.0, 0), view)
    assert request.predicted_tbt_s == pytest.approx(0.1 + (0.01 + 1e-4 * 100) * sequences)


@pytest.mark.parametrize(
    ("admission", "reason"), [("early-rejection", "tbt-at-decode"), ("predictive", "tbt")]
)
def test_predictive_sees_who_is_still_being_prefilled(admission: str, reason: str) -> None:
    """A step takes 0.2 s for one sequence and 0.3 s for two, too long. Of two that come together
    early rejection prefills both, as nobody decodes yet, and one of them in vain.
    """
    requests = [a_request(id, output_tokens=50) for id in range(2)]
    config = a_config(prefill_instances=2, conductor={"admission": admission}, slo={"tbt_s": 0.25})
    served(config, requests, profile=a_profile(decode={"sequence_s": 0.1}))
    assert sorted(statuses(requests), key=str) == [("finished", None), ("rejected", reason)]


def test_predictive_refuses_late_first_tokens_and_full_memory_too() -> None:
    """As early rejection does."""
    policy = make_admission(ConductorConfig(admission="predictive"), SLO, costs())
    view = ClusterView(0.0, [], [replace(ROOMY, free_tokens=104)], None, False)
    assert policy.admit(REQUEST, Placement(0, 0, 12.0, 0.0, 0), view) == Rejected("ttft", 2.0)
    assert policy.admit(REQUEST, Placement(0, 0, 1.0, 0.0, 0), view) == Rejected("capacity", 1.0)


def test_the_conductor_learns_how_long_decodes_last() -> None:
    """1 s, then 2 s: a mean of 1.02 s, as it forgets slowly; one token teaches nothing."""
    requests = [
        a_request(id, output_tokens=output_tokens, arrived_s=10.0 * id)
        for id, output_tokens in enumerate([11, 21, 1])
    ]
    cluster = served(a_config(), requests)
    assert cluster.conductor.decode_s == pytest.approx(1.02)
