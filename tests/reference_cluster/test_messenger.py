"""When is a prompt's KV at the decode instance? 100 tokens have 10 kB, in 4 layers."""

from __future__ import annotations

import asyncio

import pytest

from reference_cluster.messenger import Messenger
from reference_cluster.transports.modelled import ModelledTransport
from reference_cluster.virtual_time import run_virtual
from tests.reference_cluster.small import a_request, costs

MB = 1e6
PREFILL_S = 0.2


def arrival(
    layerwise: bool, link: float = MB, prefilled_s: float = PREFILL_S, rivals: int = 0
) -> float:
    """When the KV of a prompt is there, whose prefill was to take 0.2 s and took `prefilled_s`."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        transport = ModelledTransport(2 + rivals, link)
        messenger = Messenger(transport, costs(), layerwise)
        for rival in range(rivals):
            transport.start(0, 2 + rival, 100 * link, lambda: None)
        arrived: asyncio.Future[float] = loop.create_future()
        handover = messenger.hand_over(
            a_request(), 0, 1, PREFILL_S, lambda: arrived.set_result(loop.time())
        )
        await asyncio.sleep(prefilled_s)
        handover.prefilled()
        return await arrived

    return run_virtual(main())


def test_layer_by_layer_only_the_last_layer_is_late() -> None:
    """3 of 4 layers leave during the prefill; the last one's 2.5 kB take 2.5 ms more."""
    assert arrival(layerwise=True) == pytest.approx(0.2025)


def test_serialised_everything_is_late() -> None:
    """All 10 kB leave after the prefill: 10 ms more."""
    assert arrival(layerwise=False) == pytest.approx(0.21)


def test_a_slow_link_is_used_from_the_prefills_beginning() -> None:
    """At 10 kB/s the 10 kB take 1 s, of which 0.2 s hide behind the prefill."""
    assert arrival(layerwise=True, link=1e4) == pytest.approx(1.0)
    assert arrival(layerwise=False, link=1e4) == pytest.approx(1.2)


def test_rivals_take_their_share_of_the_link() -> None:
    """One long rival: the stream's 37.5 kB/s still fit into its half, and its tail is doubled."""
    assert arrival(layerwise=True, rivals=1) == pytest.approx(0.205)
    assert arrival(layerwise=False, rivals=1) == pytest.approx(0.22)


def test_a_stream_ahead_of_a_late_prefill_waits_for_it() -> None:
    """The bytes were gone by 0.27 s, at their pace; the prefill's end at 0.5 s counts (live)."""
    assert arrival(layerwise=True, prefilled_s=0.5) == pytest.approx(0.5)


def test_a_cancelled_handover_frees_the_link_and_calls_nobody() -> None:
    """Before its prefill ends, layer-wise or not."""

    async def main(layerwise: bool) -> float:
        transport = ModelledTransport(2, MB)
        messenger = Messenger(transport, costs(), layerwise)
        handover = messenger.hand_over(a_request(), 0, 1, PREFILL_S, lambda: pytest.fail("called"))
        await asyncio.sleep(0.1)
        handover.cancel()
        await asyncio.sleep(10.0)
        return transport.sent_bytes_per_s(0)

    assert run_virtual(main(layerwise=True)) == 0.0
    assert run_virtual(main(layerwise=False)) == 0.0


def test_a_fetch_moves_the_prefix() -> None:
    """100 tokens are 10 kB: 10 ms."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        messenger = Messenger(ModelledTransport(2, MB), costs(), layerwise=True)
        done: asyncio.Future[float] = loop.create_future()
        messenger.fetch(100, 0, 1, lambda: done.set_result(loop.time()))
        return await done

    assert run_virtual(main()) == pytest.approx(0.01)
