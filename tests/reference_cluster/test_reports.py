"""What does the Conductor not know between two load reports? A prompt of 100 tokens takes 0.2 s."""

from __future__ import annotations

from typing import Any

import pytest

from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig
from reference_cluster.policies.view import ClusterView
from reference_cluster.request import Request
from reference_cluster.simulate import sleep_until
from tests.reference_cluster.small import (
    a_config,
    a_profile,
    a_request,
    random_requests,
    served,
    with_cluster,
)


def reporting(every_s: float, **fields: Any) -> ClusterConfig:
    conductor = {"report_every_s": every_s, "scheduling": "least-loaded"}
    return a_config(
        **{"prefill_instances": 2, "decode_instances": 2, **fields}, conductor=conductor
    )


def views(config: ClusterConfig, requests: list[Request], times: list[float]) -> list[ClusterView]:
    """What the Conductor would see at these times, after the requests have been let in at 0 s."""

    async def script(cluster: Cluster) -> list[ClusterView]:
        for request in requests:
            cluster.submit(request)
        seen = []
        for at_s in times:
            await sleep_until(at_s)
            seen.append(cluster.conductor.view(a_request(99), (), at_s))
        return seen

    return with_cluster(config, script)


def test_a_queue_looks_as_long_as_it_was_reported() -> None:
    """One prompt of 0.2 s at 0 s; prefill-0 reports at 1, 3, 5 s ..., when it is long done."""
    early, late = views(reporting(2.0), [a_request(0, output_tokens=1)], [0.9, 1.1])
    assert [one.queue_s for one in early.prefill] == pytest.approx([0.2, 0.0])
    assert [one.queue_s for one in late.prefill] == [0.0, 0.0]


def test_fresh_reports_are_those_of_the_moment() -> None:
    """Without a period the queue is empty when its prompt is done."""
    (view,) = views(reporting(0.0), [a_request(0, output_tokens=1)], [0.9])
    assert [one.queue_s for one in view.prefill] == [0.0, 0.0]


def test_the_conductor_knows_what_it_places_itself() -> None:
    """Four prompts at one instant, no report yet: two each, as their queues grow by 0.2 s each."""
    requests = [a_request(id) for id in range(4)]
    served(reporting(100.0), requests, profile=a_profile(decode={"sequence_s": 0.01}))
    assert [one.prefill for one in requests] == ["prefill-0", "prefill-1"] * 2
    assert [one.decode for one in requests] == ["decode-0", "decode-1"] * 2
    assert [one.predicted_ttft_s for one in requests] == pytest.approx([0.2, 0.2, 0.4, 0.4])


def test_what_has_been_done_since_is_not_known() -> None:
    """At 10 s all is idle, but prefill-0 is remembered with 0.2 s more than prefill-1."""
    long, later = a_request(0, 300), a_request(2, arrived_s=10.0)
    short = a_request(1)
    served(reporting(100.0), [long, short, later])
    assert later.prefill == "prefill-1"
    assert later.predicted_ttft_s == pytest.approx(0.4)


@pytest.mark.parametrize("system", ["disaggregated", "colocated"])
def test_decode_loads_age_too(system: str) -> None:
    """A request decodes from 0.2 s to 10.2 s. Reported at 1 s, it is still seen at 10.9 s."""
    config = reporting(10.0, system=system, colocated_instances=2)
    before, after, stale, fresh = views(
        config, [a_request(0, output_tokens=101)], [0.5, 5.1, 14.9, 15.1]
    )
    assert (before.decode[0].batch, before.decode[0].expected) == (0, 1)
    assert (after.decode[0].batch, after.decode[0].expected) == (1, 0)
    assert stale.decode[0] == after.decode[0]
    assert (fresh.decode[0].batch, fresh.decode[0].context_tokens) == (0, 0)
    if system == "colocated":
        assert stale.prefill[0].context_tokens == stale.decode[0].context_tokens > 100


def test_stale_reports_cost_waiting() -> None:
    """500 requests on 4 prefill instances: mean TTFT grows with the age of what is known."""
    means = []
    for every_s in (0.0, 1.0, 30.0):
        requests = random_requests(3, 500)
        served(reporting(every_s, prefill_instances=4), requests)
        waits = [one.timeline.first_token_s or 0.0 for one in requests]
        means.append(sum(waits) - sum(one.timeline.arrived_s for one in requests))
    assert means[0] < means[1] < means[2]
