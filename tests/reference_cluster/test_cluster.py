"""Does a request find its way through the whole cluster, and do the odd ones too?"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from reference_cluster.cluster import Cluster
from reference_cluster.cost_model import load_profile
from reference_cluster.request import Request, Sink
from reference_cluster.samples import SAMPLE_COLUMNS, Samples
from reference_cluster.simulate import simulate
from reference_cluster.virtual_time import run_virtual
from tests.reference_cluster.small import (
    SMALL,
    a_config,
    a_request,
    held,
    served,
    with_cluster,
)
from tests.reference_cluster.test_decode import token_times

BOTH = pytest.mark.parametrize("system", ["disaggregated", "colocated"])
A800 = load_profile("a800-llama3-70b")


def test_a_requests_journey() -> None:
    """0.2 s of prefill, the last layer's 2.5 ms, then 4 tokens 0.1 s apart."""
    request = a_request(output_tokens=5, arrived_s=1.0)
    served(a_config(), [request])
    stamps = dataclasses.astuple(request.timeline)[:9]  # Those in order.
    expected = [1.0, 1.0, 1.0, 1.0, 1.2, 1.2025, 1.2025, 1.2025, 1.6025]
    assert stamps == pytest.approx(expected)
    assert token_times(request) == pytest.approx([1.2025, 1.3025, 1.4025, 1.5025, 1.6025])
    assert (request.status, request.reason) == ("finished", None)
    assert (request.prefill, request.decode) == ("prefill-0", "decode-0")
    assert request.predicted_ttft_s == pytest.approx(0.2)
    assert request.predicted_tbt_s == pytest.approx(0.1)


def test_a_serialised_store_is_later() -> None:
    """Without layer-wise streaming all 10 kB leave after the prefill: 10 ms."""
    request = a_request()
    served(a_config(prefill={"layerwise": False}), [request])
    assert request.timeline.first_token_s == pytest.approx(0.21)


def test_one_token_needs_no_decode_instance() -> None:
    """It comes with the prefill's end; nothing is transferred."""
    request = a_request(output_tokens=1)
    cluster = served(a_config(), [request])
    assert dataclasses.astuple(request.timeline)[4:9] == (0.2, 0.2, 0.2, None, 0.2)
    assert request.produced_tokens == 1
    assert cluster.transport.moved_bytes == 0


# ---- cancelling ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("at_s", [0.0, 0.1, 0.201, 0.25, 0.6, 5.15])
def test_a_cancelled_request_fails_at_once_and_frees_all(system: str, at_s: float) -> None:
    """On arrival, in its prefill, its transfer, its first, any and its last step (`served` checks
    that nothing stays). Its record ends with the failure: no stamp is later."""
    request = a_request(output_tokens=51)
    following = a_request(1, arrived_s=20.0)
    cluster = served(a_config(system=system), [request, following], cancels=[(at_s, request)])
    assert (request.status, request.reason) == ("failed", "client disconnected")
    stamps = [stamp for stamp in dataclasses.astuple(request.timeline)[:9] if stamp is not None]
    assert stamps[-1] == request.timeline.finished_s == at_s
    assert stamps == sorted(stamps)
    assert cluster.counts == {"failed": 1, "finished": 1}
    assert following.timeline.prefill_start_s == 20.0


@BOTH
def test_cancelling_what_has_ended_changes_nothing(system: str) -> None:
    """A client may hang up after its last token."""
    request = a_request()
    cluster = served(a_config(system=system), [request], cancels=[(100.0, request)])
    assert request.status == "finished"
    assert cluster.counts == {"finished": 1}


class Heard(Sink):
    """What a client would be told."""

    def __init__(self) -> None:
        self.count = 0
        self.endings: list[str] = []

    def tokens(self, count: int) -> None:
        assert not self.endings, "no token comes after the end"
        self.count += count

    def ended(self, request: Request) -> None:
        self.endings.append(request.status)


@BOTH
@pytest.mark.parametrize("output_tokens", [1, 2, 7])
@pytest.mark.parametrize("steps_max", [None, 1])
def test_a_client_hears_of_each_token_and_of_one_end(
    system: str, output_tokens: int, steps_max: int | None
) -> None:
    """In spans or step by step."""
    request = a_request(output_tokens=output_tokens)
    request.sink = heard = Heard()
    served(a_config(system=system), [request], steps_max=steps_max)
    assert heard.count == output_tokens == request.produced_tokens
    assert heard.endings == ["finished"]


# ---- odd requests ----------------------------------------------------------------------------

ODD: dict[str, list[dict[str, Any]]] = {
    "none at all": [],
    "one output token at 0 s": [{"input_tokens": 1, "output_tokens": 1}],
    "a prompt of one token": [{"input_tokens": 1, "output_tokens": 9}],
    "126k tokens": [{"input_tokens": 126_195, "output_tokens": 2}],
    "28 at one instant": [{"id": id, "arrived_s": 3.0} for id in range(28)],
    "28 alike at one instant": [{"id": id, "blocks": ["a"]} for id in range(28)],
    "a shared block and nothing more": [
        {"id": id, "input_tokens": 600, "blocks": ["shared", f"own-{id}"]} for id in range(3)
    ],
    "a long sleep between": [{"id": id, "arrived_s": 1e6 * id} for id in range(2)],
}


@BOTH
@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", ODD)
def test_odd_requests_finish(system: str, case: str) -> None:
    """Each runs clean through `simulate`, which checks the cluster's books at its end."""
    fields = {"system": system, "block_tokens": 512, "sample_every_s": 1e4}
    config = a_config(**fields, colocated={"prefix_caching": True})
    requests = [a_request(**one, block_tokens=512) for one in ODD[case]]
    simulated = simulate(config, A800, requests)
    assert [request.status for request in simulated.requests] == ["finished"] * len(requests)
    assert all(one.produced_tokens == one.output_tokens for one in requests)


@BOTH
@pytest.mark.timeout(30)
def test_a_prompt_larger_than_any_memory_is_rejected_and_never_waits(system: str) -> None:
    """1.4 M tokens; the next request is served."""
    requests = [a_request(0, 1_400_000, 5, block_tokens=512), a_request(1, block_tokens=512)]
    simulate(a_config(system=system, block_tokens=512), A800, requests)
    large, other = requests
    assert (large.status, large.reason) == ("rejected", "too-large")
    assert large.timeline.finished_s == 0.0
    assert large.timeline.placed_s is None
    assert other.status == "finished"


class Failing(Sink):
    """A bug of ours, where the first token is told."""

    def tokens(self, count: int) -> None:
        raise ZeroDivisionError("a bug")


@BOTH
@pytest.mark.timeout(30)
def test_a_crash_of_the_cluster_ends_the_run_with_its_cause(system: str) -> None:
    """In a task (colocated) or in a transfer's callback (disaggregated): no wait for ever."""
    request, other = a_request(output_tokens=9), a_request(1, arrived_s=5.0)
    request.sink = Failing()
    with pytest.raises((ZeroDivisionError, ExceptionGroup)) as caught:
        simulate(a_config(system=system), SMALL, [request, other])
    cause = caught.value
    while isinstance(cause, ExceptionGroup):
        cause = cause.exceptions[0]
    assert repr(cause) == "ZeroDivisionError('a bug')"


def test_requests_are_offered_at_their_arrival_exactly() -> None:
    """Also where x + (y - x) is a hair less than y: nothing happens before it has arrived."""
    times = (0.30858274026167415, 0.9081947771258078)
    assert times[0] + (times[1] - times[0]) < times[1]
    requests = [a_request(id, arrived_s=at_s) for id, at_s in enumerate(times)]
    simulate(a_config(), SMALL, requests)
    assert tuple(request.timeline.placed_s for request in requests) == times


# ---- looking at it ---------------------------------------------------------------------------


def test_samples_show_the_load_of_each_moment() -> None:
    """At 0.05 s one prompt runs (0.15 s left), one waits; at 0.25 s the first decodes."""
    config = a_config(sample_every_s=0.05, slo={"ttft_s": 1.0, "tbt_s": 0.2})
    requests = [a_request(id, output_tokens=3) for id in range(2)]
    cluster = served(config, requests)
    rows = {
        (round(row["time_s"], 3), row["instance"]): row
        for row in (dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in cluster.samples.rows)
    }
    busy = rows[0.05, "prefill-0"]
    assert (busy["role"], busy["queue"], busy["running"]) == ("prefill", 1, 1)
    assert busy["load"] == pytest.approx(0.15 + 0.2)
    assert busy["link_bytes_per_s"] == pytest.approx(37_500)  # 3 of 4 layers of 10 kB in 0.2 s.
    decoding = rows[0.25, "decode-0"]
    assert (decoding["running"], decoding["context_tokens"]) == (1, 100)
    assert decoding["load"] == pytest.approx(0.1 / 0.2)
    assert decoding["pool_used_blocks"] == 10  # 103 tokens.
    # One prompt is stored; the second's blocks come with its end.
    assert rows[0.25, "prefill-0"]["pool_used_blocks"] == 10
    assert rows[0.25, "prefill-0"]["pool_capacity_blocks"] == 10_000


def test_samples_stay_few() -> None:
    """A full table is thinned to every second moment, and the pace halved."""

    class Still:
        def sample(self, now_s: float) -> tuple[float]:
            return (now_s,)

    async def main() -> Samples:
        samples = Samples(every_s=1.0, rows_max=20)
        task = asyncio.create_task(samples.run([Still(), Still()]), name="samples")
        await asyncio.sleep(9.5)
        task.cancel()
        return samples

    samples = run_virtual(main())
    assert samples.every_s == 2.0
    assert [row[0] for row in samples.rows] == [0.0, 0.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("system", "breakage"),
    [
        ("disaggregated", lambda cluster: cluster.prefill[0].promised.update(a=1)),
        ("disaggregated", lambda cluster: cluster.prefill[0].pool.pins.update(a=1)),
        ("disaggregated", lambda cluster: setattr(cluster.decode[0].batch, "kv_tokens", 5)),
        ("disaggregated", lambda cluster: setattr(cluster.decode[0], "expected_kv_tokens", 5)),
        ("disaggregated", lambda cluster: cluster.transport.start(0, 1, 1e9, print)),
        ("colocated", lambda cluster: setattr(cluster.colocated[0].pool, "reserved", 5)),
        ("colocated", lambda cluster: cluster.colocated[0].memory.update({7: None})),
    ],
)
def test_the_integrity_check_sees_broken_books(system: str, breakage: Any) -> None:
    """Each part's books are looked at, and so does the tests' own `held`."""

    async def script(cluster: Cluster) -> None:
        await asyncio.sleep(1.0)
        assert held(cluster) == []
        cluster.check_integrity()
        breakage(cluster)
        assert held(cluster) != []
        with pytest.raises(AssertionError):
            cluster.check_integrity()

    with_cluster(a_config(system=system), script)
