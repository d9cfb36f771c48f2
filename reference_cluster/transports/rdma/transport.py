"""How do bytes move between processes with RDMA, one-sidedly and without the peer's processor?

transport.py  the front: one segment, many peers
link.py       the way to one peer: paths over devices, failover
visitors.py   who may come to us
control.py    what both sides say before RDMA begins
verbs.py      registered memory and queue pairs, by pyverbs
devices.py    which devices there are, and which are near
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence

from reference_cluster.transports.bytes import (
    Endpoint,
    Range,
    Segment,
    TransportError,
    check_batch,
    cut,
)
from reference_cluster.transports.rdma.devices import chosen, own_numa_node, usable_devices
from reference_cluster.transports.rdma.link import Link
from reference_cluster.transports.rdma.verbs import CHAIN_BYTES, CHAIN_RANGES, Nic, Operation
from reference_cluster.transports.rdma.visitors import Visitors

PEERS_MAX = 256
# What a cancelled transfer, or one at its deadline, gives the devices to end what they have.
SETTLE_S = 0.1


class RdmaTransport:
    """Reads and writes peers' registered memory over reliable queue pairs, kept for each peer.

    `preferred` devices share the load, `secondary` ones step in when those fail; unnamed, the
    topology says which are which. Peers come to a TCP port of `address` to be let in.
    """

    name = "rdma"

    def __init__(
        self,
        address: str = "127.0.0.1",
        preferred: Sequence[str] = (),
        secondary: Sequence[str] = (),
    ) -> None:
        self.address = address
        self.devices = chosen(usable_devices(), preferred, secondary, own_numa_node())
        self.links: dict[Endpoint, Link] = {}  # The least recently used first.

    async def start(self, segment: Segment) -> Endpoint:
        self.size = segment.size
        self.preferred, self.secondary = (
            [Nic(device, segment) for device in devices] for devices in self.devices
        )
        key = secrets.token_bytes(16)
        nics = [*self.preferred, *self.secondary]
        self.visitors = Visitors(key, nics, segment.address)
        address = await self.visitors.listen(self.address)
        return Endpoint(self.name, address, segment.name, segment.size, key)

    async def read(
        self,
        peer: Endpoint,
        remote: Sequence[Range],
        local: Sequence[Range],
        deadline_s: float,
    ) -> None:
        await self.move(Operation.READ, peer, local, remote, deadline_s)

    async def write(
        self,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        await self.move(Operation.WRITE, peer, local, remote, deadline_s)

    async def move(
        self,
        operation: Operation,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        total = check_batch(local, self.size, remote, peer)
        work = deque(cut(local, remote, CHAIN_BYTES, CHAIN_RANGES))
        if not work:
            return
        settle_s = min(SETTLE_S, deadline_s / 10)
        try:
            async with asyncio.timeout(deadline_s - settle_s):
                await self.link_to(peer).move(operation, work, settle_s)
        except TimeoutError:
            what = f"{operation.name} of {total} bytes"
            raise TransportError(
                f"{peer.segment} at {peer.address}: {what} not done within {deadline_s:g} s"
            ) from None

    def link_to(self, peer: Endpoint) -> Link:
        """The pool's link to this peer, or a new one; the longest unused makes room for it."""
        link = self.links.pop(peer, None)
        if link is None or not link.is_up:
            link = Link(peer, self.preferred, self.secondary)
        self.links[peer] = link
        if len(self.links) > PEERS_MAX:
            idle = next((other for other in self.links.values() if not other.users), None)
            if idle is not None and idle is not link:
                self.forget(idle.peer)
        return link

    def forget(self, peer: Endpoint) -> None:
        link = self.links.pop(peer, None)
        if link is not None:
            link.close(f"{peer.segment} was forgotten")

    async def close(self) -> None:
        for peer in list(self.links):
            self.forget(peer)
        await self.visitors.close()
        for nic in (*self.preferred, *self.secondary):
            nic.close()
