"""When do tokens come out of a decode instance? Steps of 0.1 s unless a test says otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from reference_cluster.decode import DecodeInstance
from reference_cluster.engines.modelled import ModelledEngine
from reference_cluster.policies.batching import DecodeBatch
from reference_cluster.request import Request, Sink
from reference_cluster.spans import Span, span_columns
from reference_cluster.virtual_time import run_virtual
from tests.reference_cluster.small import a_request, costs


def token_times(request: Request) -> list[float]:
    """When each token came: the first, then those of the spans, by the results schema's formula."""
    columns = span_columns([request])
    assert request.timeline.first_token_s is not None
    times = [request.timeline.first_token_s]
    for start_s, steps, gap_s, growth_s in zip(
        columns["start_s"],
        columns["steps"],
        columns["first_gap_s"],
        columns["growth_s"],
        strict=True,
    ):
        token = np.arange(steps)
        times.extend(start_s + (token + 1) * gap_s + growth_s * token * (token + 1) / 2)
    return times


Joins = list[tuple[float, Request]]


def decoded(
    joins: Joins,
    cancels: Joins | None = None,
    capacity_tokens: int = 100_000,
    batch_max: int = 256,
    look: Callable[[DecodeInstance], Coroutine[Any, Any, None]] | None = None,
    **decode_costs: float,
) -> None:
    """Let requests arrive with their KV at a decode instance, and run it till all is done."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        cost = costs(decode=decode_costs)
        ended: list[Request] = []
        instance = DecodeInstance(
            0, cost, ModelledEngine(cost), capacity_tokens, batch_max, None, ended.append
        )
        running = asyncio.create_task(instance.run(), name="decode-0")
        looking = asyncio.create_task(look(instance), name="look") if look else None
        for at_s, request in joins:
            if at_s > loop.time():  # Even sleep(0) would let the instance begin.
                await asyncio.sleep(at_s - loop.time())
            instance.expect(request)
            instance.join(request)
        for at_s, request in cancels or []:
            if at_s > loop.time():  # Even sleep(0) would let the instance begin.
                await asyncio.sleep(at_s - loop.time())
            request.is_cancelled = True
            instance.cancel(request)
        await asyncio.sleep(1000.0)
        if looking is not None:
            await looking
        instance.check_integrity()
        assert instance.batch.size == len(instance.waiting) == len(instance.expected) == 0
        assert instance.batch.context_tokens == instance.batch.kv_tokens == 0
        running.cancel()

    run_virtual(main())


def test_a_request_alone_gets_a_token_a_step() -> None:
    """The first is there when its KV is; 4 more, 0.1 s apart."""
    request = a_request(output_tokens=5)
    decoded([(2.0, request)])
    assert token_times(request) == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.4])
    assert request.timeline.decode_start_s == 2.0
    assert request.timeline.finished_s == pytest.approx(2.4)
    assert request.produced_tokens == 5
    assert request.status == "finished"


def test_a_join_waits_for_the_step_boundary() -> None:
    """A request that arrives mid-step takes part from the next step on, never before."""
    early, late = a_request(0, output_tokens=11), a_request(1, output_tokens=2)
    decoded([(0.0, early), (0.15, late)])
    assert late.timeline.decode_start_s == pytest.approx(0.2)
    assert token_times(late) == pytest.approx([0.15, 0.3])  # Its gap includes the wait.
    assert early.timeline.finished_s == pytest.approx(1.0)


def test_a_join_at_a_boundary_takes_part_at_once() -> None:
    """At 0.5 s, where a step ends."""
    early, late = a_request(0, output_tokens=11), a_request(1, output_tokens=2)
    decoded([(0.0, early), (0.5, late)])
    assert token_times(late) == pytest.approx([0.5, 0.6])


def test_company_makes_steps_longer() -> None:
    """0.1 s and 0.05 s a sequence: 0.15 s alone, 0.2 s in two, from the boundary at 0.3 s on."""
    early, late = a_request(0, output_tokens=6), a_request(1, output_tokens=3)
    decoded([(0.0, early), (0.2, late)], sequence_s=0.05)
    assert token_times(early) == pytest.approx([0.0, 0.15, 0.3, 0.5, 0.7, 0.85])
    assert token_times(late) == pytest.approx([0.2, 0.5, 0.7])


def test_context_makes_steps_longer() -> None:
    """0.1 s and 1 ms a token: 100 tokens of prompt, then one more each step."""
    request = a_request(input_tokens=100, output_tokens=4)
    decoded([(0.0, request)], context_token_s=1e-3)
    assert token_times(request) == pytest.approx([0.0, 0.2, 0.401, 0.603])


def test_whoever_is_done_leaves_between_steps() -> None:
    """Two tokens against four: the batch shrinks, and with it the steps."""
    short, long = a_request(0, output_tokens=3), a_request(1, output_tokens=5)
    decoded([(0.0, short), (0.0, long)], sequence_s=0.05)
    assert short.timeline.finished_s == pytest.approx(0.4)
    assert token_times(long) == pytest.approx([0.0, 0.2, 0.4, 0.55, 0.7])


def test_a_full_batch_makes_others_wait() -> None:
    """With room for one, the second decodes when the first is done; first come, first served."""
    requests = [a_request(id, output_tokens=3) for id in range(3)]
    decoded([(0.0, one) for one in requests], batch_max=1)
    assert [one.timeline.decode_start_s for one in requests] == pytest.approx([0.0, 0.2, 0.4])


def test_full_memory_makes_others_wait() -> None:
    """105 tokens each of 210: two at a time. A small one behind does not overtake."""
    big = [a_request(id, output_tokens=5) for id in range(3)]
    small = a_request(3, input_tokens=1, output_tokens=2)
    decoded([(0.0, one) for one in [*big, small]], capacity_tokens=210)
    starts = [one.timeline.decode_start_s for one in [*big, small]]
    assert starts == pytest.approx([0.0, 0.0, 0.4, 0.4])


def test_a_cancelled_request_leaves_at_the_next_step() -> None:
    """Cancelled at 0.25 s, it holds its place until 0.4 s; the other's steps are shorter then."""
    gone, other = a_request(0, output_tokens=50), a_request(1, output_tokens=5)
    decoded([(0.0, gone), (0.0, other)], cancels=[(0.25, gone)], sequence_s=0.05)
    assert gone.produced_tokens == 3
    assert gone.status == "waiting"  # The cluster, not the instance, says that it has failed.
    assert token_times(other) == pytest.approx([0.0, 0.2, 0.4, 0.55, 0.7])


def test_a_request_cancelled_in_its_last_step_does_not_finish() -> None:
    """It would have had all its tokens at 0.4 s."""
    request = a_request(output_tokens=5)
    decoded([(0.0, request)], cancels=[(0.35, request)])
    assert request.status == "waiting"
    assert request.timeline.finished_s is None


def test_a_cancelled_request_waits_no_more() -> None:
    """Behind a full batch: it is gone at once, not when its turn comes."""
    first, gone = a_request(0, output_tokens=50), a_request(1)

    async def look(instance: DecodeInstance) -> None:
        await asyncio.sleep(0.55)
        assert list(instance.waiting) == []
        assert instance.decode_view(0.55).expected == 0

    decoded([(0.0, first), (0.1, gone)], cancels=[(0.5, gone)], batch_max=1, look=look)
    assert gone.timeline.decode_start_s is None


def test_what_a_policy_sees_is_computed_at_now() -> None:
    """Mid-span, the context has grown by the steps done so far: the trap of simulating in spans.

    One request with 100 tokens decodes 1000 in a single span of 0.1 s steps. At 0.05, 10.05 and
    50.05 s it holds 0, 100 and 500 tokens more; at the span's end as many as it was to have.
    """
    request = a_request(input_tokens=100, output_tokens=1001)
    seen: list[int] = []

    async def look(instance: DecodeInstance) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            await asyncio.sleep(0.05)
            assert len(instance.batch.log) == 0, "the span has not ended"
            seen.append(instance.decode_view(loop.time()).context_tokens)
            await asyncio.sleep(9.95 if len(seen) == 1 else 39.95)

    decoded([(0.0, request)], look=look)
    assert seen == [100, 200, 600]


@pytest.mark.parametrize("growth", [0.0, 1e-5])
def test_what_a_policy_sees_mid_span_is_what_step_by_step_would_show(growth: float) -> None:
    """Also where steps grow: looked at every 0.37 s, in spans and in single steps."""

    async def seen(steps_max: int | None) -> list[tuple[int, int, int]]:
        loop = asyncio.get_running_loop()
        cost = costs(decode={"context_token_s": growth, "sequence_s": 0.003})
        engine = ModelledEngine(cost, steps_max)
        instance = DecodeInstance(0, cost, engine, 10**6, 256, None, lambda request: None)
        running = asyncio.create_task(instance.run(), name="decode-0")
        for number, at_s in enumerate([0.0, 3.3, 7.7]):
            loop.call_at(at_s, instance.join, a_request(number, output_tokens=200))
        views = []
        for _ in range(80):
            await asyncio.sleep(0.37)
            view = instance.decode_view(loop.time())
            views.append((view.batch, view.context_tokens, view.free_tokens))
        running.cancel()
        return views

    spans = run_virtual(seen(None))
    assert spans == run_virtual(seen(1))
    assert len(set(spans)) > 40


@pytest.mark.parametrize("decode_costs", [{"sequence_s": 0.05}, {"context_token_s": 0.0005}])
@pytest.mark.parametrize("gap_s", [0.01, 0.5])
def test_a_join_counts_those_who_wait_to_join(decode_costs: dict[str, float], gap_s: float) -> None:
    """0.1 s and 0.05 s a sequence (of about 100 tokens), at most 0.22 s: two may decode.

    The third of three is refused, be the others in the batch already or still waiting for the next
    step; and the cluster is told.
    """

    async def main() -> list[Request]:
        cost = costs(decode=decode_costs)
        ended: list[Request] = []
        instance = DecodeInstance(0, cost, ModelledEngine(cost), 10**6, 256, 0.22, ended.append)
        running = asyncio.create_task(instance.run(), name="decode-0")
        for number in range(3):
            request = a_request(number, output_tokens=20)
            instance.expect(request)
            instance.join(request)
            await asyncio.sleep(gap_s)
        running.cancel()
        return ended

    refused = [(one.id, one.status, one.reason) for one in run_virtual(main())]
    assert refused == [(2, "rejected", "tbt-at-decode")]


class Counting(Sink):
    """Counts the tokens that it is told of."""

    def __init__(self) -> None:
        self.count = 0
        self.calls = 0

    def tokens(self, count: int) -> None:
        self.count += count
        self.calls += 1


def test_a_listener_hears_of_every_token() -> None:
    """5 tokens: the first, then those of the span."""
    request = a_request(output_tokens=5)
    request.sink = sink = Counting()
    decoded([(0.0, request)])
    assert sink.count == 5


def test_a_batch_keeps_its_books() -> None:
    """Two join with 100 + 1 tokens of prompt and answer; what leaves takes its context along."""
    batch = DecodeBatch()
    one, two = a_request(0, output_tokens=3), a_request(1, output_tokens=9)
    for request in (one, two):
        request.produced_tokens = 1
        batch.join(request, 0.0)
    assert (batch.size, batch.context_tokens, batch.kv_tokens) == (2, 200, 103 + 109)
    assert batch.steps_until_leave == 2
    batch.remove(one)  # Cancelled: the heap still knows of it, the batch does not.
    assert batch.steps_until_leave == 8
    assert (batch.size, batch.context_tokens, batch.kv_tokens) == (1, 100, 109)


def test_a_span_says_whose_answers_have_stopped() -> None:
    """They leave before their length with the tokens they have, their context and memory freed."""
    batch = DecodeBatch()
    one, two = a_request(0, output_tokens=9), a_request(1, output_tokens=9)
    for request in (one, two):
        request.produced_tokens = 1
        batch.join(request, 0.0)
    assert batch.apply(Span(0.0, 1, 0.1, 0.0, 0.1, [0, 7])) == [one]
    assert (one.produced_tokens, one.finish_reason) == (2, "stop")
    assert (batch.size, batch.context_tokens, batch.kv_tokens) == (1, 101, 109)
    assert batch.apply(Span(0.1, 7, 0.1, 0.0, 0.8)) == [two]
    assert two.finish_reason == "length"
