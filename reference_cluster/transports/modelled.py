"""How long does a transfer take on links that are shared? Max-min fair shares of each link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Link:
    """One direction of one node's NICs."""

    bytes_per_s: float
    flows: dict[int, ModelledFlow] = field(default_factory=dict)
    level: float = float("inf")  # No flow gets more than this of the link.

    def fill(self) -> None:
        """Set the fair level: capped flows take their cap, the rest share alike."""
        self.level = fair_level([flow.cap for flow in self.flows.values()], self.bytes_per_s)


def fair_level(caps: list[float], bytes_per_s: float) -> float:
    """The water level at which `sum(min(cap, level)) == bytes_per_s`; infinite if all caps fit."""
    left, sharers = bytes_per_s, len(caps)
    if sum(caps) <= bytes_per_s:
        return float("inf")
    for cap in sorted(caps):
        if cap * sharers >= left:
            return left / sharers
        left -= cap
        sharers -= 1
    return float("inf")  # They fit but for the rounding of their sum.


class ModelledFlow:
    """A transfer whose rate changes whenever others come and go."""

    def __init__(
        self,
        transport: ModelledTransport,
        id: int,
        links: tuple[Link, Link],
        size_bytes: float,
        cap: float,
        on_done: Callable[[], None],
    ) -> None:
        self.transport = transport
        self.id = id
        self.links = links
        self.left_bytes = size_bytes
        self.cap = cap
        self.on_done = on_done
        self.rate = 0.0
        self.since_s = transport.loop.time()
        self.timer: asyncio.TimerHandle | None = None

    def lift_cap(self) -> None:
        self.cap = float("inf")
        self.transport.share_out(self.links)

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.transport.remove(self)

    def set_rate(self) -> None:
        """Account for what was moved at the old rate, then go on at the new one."""
        sending, receiving = self.links
        rate = min(self.cap, sending.level, receiving.level)
        if rate == float("inf"):
            rate = min(sending.bytes_per_s, receiving.bytes_per_s)
        if rate == self.rate:
            return
        now_s = self.transport.loop.time()
        self.left_bytes = max(0.0, self.left_bytes - self.rate * (now_s - self.since_s))
        self.rate, self.since_s = rate, now_s
        if self.timer is not None:
            self.timer.cancel()
        end_s = now_s + self.left_bytes / rate
        self.timer = self.transport.loop.call_at(end_s, self.finish)

    def finish(self) -> None:
        self.transport.remove(self)
        self.on_done()


class ModelledTransport:
    """Every node has a sending and a receiving link; a flow gets the least share along its way."""

    def __init__(self, nodes: int, bytes_per_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.sending = [Link(bytes_per_s) for _ in range(nodes)]
        self.receiving = [Link(bytes_per_s) for _ in range(nodes)]
        self.started = 0
        self.moved_bytes = 0.0

    def widen(self, node: int, times: int) -> None:
        """This node stands for several, each with its links."""
        for link in (self.sending[node], self.receiving[node]):
            link.bytes_per_s *= times

    def start(
        self,
        source: int,
        target: int,
        size_bytes: float,
        on_done: Callable[[], None],
        cap_bytes_per_s: float | None = None,
    ) -> ModelledFlow:
        links = self.sending[source], self.receiving[target]
        cap = float("inf") if cap_bytes_per_s is None else cap_bytes_per_s
        flow = ModelledFlow(self, self.started, links, size_bytes, cap, on_done)
        self.started += 1
        self.moved_bytes += size_bytes
        for link in links:
            link.flows[flow.id] = flow
        self.share_out(links)
        return flow

    def remove(self, flow: ModelledFlow) -> None:
        for link in flow.links:
            del link.flows[flow.id]
        self.share_out(flow.links)

    def share_out(self, links: tuple[Link, Link]) -> None:
        """New levels for two links, and new rates for whoever uses them."""
        for link in links:
            link.fill()
        for flow in [flow for link in links for flow in link.flows.values()]:
            flow.set_rate()

    def available_bytes_per_s(self, source: int) -> float:
        link = self.sending[source]
        caps = [flow.cap for flow in link.flows.values()]
        return min(link.bytes_per_s, fair_level([*caps, float("inf")], link.bytes_per_s))

    def sent_bytes_per_s(self, node: int) -> float:
        return sum(flow.rate for flow in self.sending[node].flows.values())
