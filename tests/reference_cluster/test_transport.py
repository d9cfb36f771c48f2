"""Do transfers share links as they should? Links of 1 MB/s, flows of 1 MB."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_cluster.transports.modelled import ModelledFlow, ModelledTransport, fair_level
from reference_cluster.virtual_time import run_virtual

MB = 1e6
Script = Callable[[ModelledTransport, Callable[[str], Callable[[], None]]], None]


def end_times(*steps: tuple[float, Script], nodes: int = 4) -> dict[str, float]:
    """Run scripts at their times; when each named flow ended."""
    ends: dict[str, float] = {}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport = ModelledTransport(nodes, MB)

        def ended(name: str) -> Callable[[], None]:
            return lambda: ends.__setitem__(name, loop.time())

        for at_s, script in steps:
            loop.call_at(at_s, script, transport, ended)
        await asyncio.sleep(100.0)
        assert not any(link.flows for link in [*transport.sending, *transport.receiving])

    run_virtual(main())
    return ends


def starts(
    name: str, source: int, target: int, size: float = MB, cap: float | None = None
) -> Script:
    """A script that starts one flow."""

    def start(transport: ModelledTransport, ended: Callable[[str], Callable[[], None]]) -> None:
        transport.start(source, target, size, ended(name), cap)

    return start


def test_a_flow_alone_has_the_whole_link() -> None:
    """1 MB at 1 MB/s; half of it in half the time; nothing in no time."""
    assert end_times((0.0, starts("a", 0, 1))) == {"a": 1.0}
    assert end_times((3.0, starts("a", 0, 1, size=MB / 2))) == {"a": 3.5}
    assert end_times((3.0, starts("a", 0, 1, size=0.0))) == {"a": 3.0}


def test_two_flows_share_a_sending_link() -> None:
    """Both at half the speed: 2 s each."""
    ends = end_times((0.0, starts("a", 0, 1)), (0.0, starts("b", 0, 2)))
    assert ends == pytest.approx({"a": 2.0, "b": 2.0})


def test_two_flows_share_a_receiving_link() -> None:
    """From two nodes to one: 2 s each."""
    ends = end_times((0.0, starts("a", 0, 2)), (0.0, starts("b", 1, 2)))
    assert ends == pytest.approx({"a": 2.0, "b": 2.0})


def test_flows_on_other_links_do_not_matter() -> None:
    """0 -> 1 and 1 -> 0 use two directions each: nobody waits."""
    ends = end_times((0.0, starts("a", 0, 1)), (0.0, starts("b", 1, 0)))
    assert ends == {"a": 1.0, "b": 1.0}


def test_rates_change_when_others_come_and_go() -> None:
    """a is half done when b comes: the other half takes 1 s. Then b has half left, and the link."""
    ends = end_times((0.0, starts("a", 0, 1)), (0.5, starts("b", 0, 2)))
    assert ends == pytest.approx({"a": 1.5, "b": 2.0})


def test_what_a_capped_flow_leaves_goes_to_the_others() -> None:
    """a takes 0.25 MB/s and 4 s; b has 0.75 MB/s and 4/3 s."""
    ends = end_times((0.0, starts("a", 0, 1, cap=0.25 * MB)), (0.0, starts("b", 0, 2)))
    assert ends == pytest.approx({"a": 4.0, "b": 4 / 3})


def test_a_lifted_cap_shares_like_the_rest() -> None:
    """At 1 s a has 0.75 MB left and b 0.25; at half each b ends at 1.5 s, then a at 2.0 s."""
    flows: list[ModelledFlow] = []

    def start(transport: ModelledTransport, ended: Callable[[str], Callable[[], None]]) -> None:
        flows.append(transport.start(0, 1, MB, ended("a"), 0.25 * MB))
        transport.start(0, 2, MB, ended("b"))

    ends = end_times((0.0, start), (1.0, lambda *_: flows[0].lift_cap()))
    assert ends == pytest.approx({"a": 2.0, "b": 1.5})


def test_a_cancelled_flow_gives_its_share_back_and_never_ends() -> None:
    """b has moved 0.25 MB when a goes, and the link to itself for the other 0.75 s."""
    flows: list[ModelledFlow] = []

    def start(transport: ModelledTransport, ended: Callable[[str], Callable[[], None]]) -> None:
        flows.append(transport.start(0, 1, MB, ended("a")))
        transport.start(0, 2, MB, ended("b"))

    ends = end_times((0.0, start), (0.5, lambda *_: flows[0].cancel()))
    assert ends == pytest.approx({"b": 1.25})


def test_the_conductor_is_told_what_one_more_would_get() -> None:
    """All of an empty link, half beside one, what a capped one leaves; and what flows now."""

    async def main() -> list[float]:
        transport = ModelledTransport(3, MB)
        seen = [transport.available_bytes_per_s(0)]
        one = transport.start(0, 1, MB, lambda: None)
        seen += [transport.available_bytes_per_s(0), transport.sent_bytes_per_s(0)]
        one.cancel()
        transport.start(0, 1, MB, lambda: None, 0.25 * MB)
        seen += [transport.available_bytes_per_s(0), transport.sent_bytes_per_s(0)]
        return [*seen, transport.sent_bytes_per_s(1), transport.available_bytes_per_s(1)]

    rates = [1.0, 0.5, 1.0, 0.75, 0.25, 0.0, 1.0]
    assert run_virtual(main()) == pytest.approx([rate * MB for rate in rates])


CAPS = st.lists(st.floats(0.0, 10.0) | st.just(math.inf), min_size=1, max_size=8)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(caps=CAPS, bytes_per_s=st.floats(0.01, 20.0))
def test_the_fair_level_uses_the_link_up_and_no_more(caps: list[float], bytes_per_s: float) -> None:
    """The water filling equation, or every cap fits."""
    level = fair_level(caps, bytes_per_s)
    carried = sum(min(cap, level) for cap in caps)
    if math.isinf(level):
        assert carried <= bytes_per_s * (1 + 1e-12)
    else:
        assert carried == pytest.approx(bytes_per_s)


def test_caps_that_fill_a_link_to_the_last_bit_share_it() -> None:
    """Sums of floats depend on their order: a full link must not look overfull and divide by 0."""
    rng = random.Random(1)
    for _ in range(2000):
        caps = [rng.uniform(0.0, 1.0) for _ in range(rng.randint(1, 8))]
        full = sum(sorted(caps, reverse=True))
        carried = sum(min(cap, fair_level(caps, full)) for cap in caps)
        assert carried == pytest.approx(full)


FLOWS = st.lists(
    st.tuples(
        st.floats(0.0, 5.0),
        st.integers(0, 2),
        st.integers(0, 2),
        st.floats(0.0, 2.0),
        st.booleans(),
    ),
    max_size=12,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(flows=FLOWS)
def test_no_link_carries_more_than_it_can_and_all_flows_end(
    flows: list[tuple[float, int, int, float, bool]],
) -> None:
    """Whoever sends what to whom, when, capped or not; and never faster than the link alone."""
    began: dict[str, tuple[float, float]] = {}
    overfull: list[float] = []
    steps: list[tuple[float, Script]] = []
    for number, (at_s, source, target, size_mb, is_capped) in enumerate(flows):
        began[str(number)] = (at_s, size_mb)
        cap = 0.3 * MB if is_capped else None
        steps.append((at_s, starts(str(number), source, target, size_mb * MB, cap)))

    def look(transport: ModelledTransport, _: object) -> None:
        for link in [*transport.sending, *transport.receiving]:
            rate = sum(flow.rate for flow in link.flows.values())
            if rate > MB * (1 + 1e-9):
                overfull.append(rate)

    looks: list[tuple[float, Script]] = [(at_s / 4, look) for at_s in range(80)]
    ends = end_times(*steps, *looks)
    assert not overfull
    assert ends.keys() == began.keys()
    for name, (at_s, size_mb) in began.items():
        assert ends[name] >= at_s + size_mb - 1e-9
