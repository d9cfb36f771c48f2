"""How do bytes move by Mooncake's own Transfer Engine, over TCP or RDMA as the user chose?

The engine (pip install 'mooncake-bench[mooncake]', apt-get install libibverbs1 libnuma1) picks
RDMA or TCP by the devices it finds, whatever protocol it is asked for, and then returns success; so
it is forced, and looked at afterwards. It listens on every interface and serves without
credentials. A transfer in it cannot be stopped: one to a peer that hangs ends after the engine's
own MC_TRANSFER_TIMEOUT (5 s at least), and we wait for that. Even so, should the peer go on later,
the engine still writes what it had asked for into our memory: after a read that was not done in
time, the one promise of ByteTransport that it breaks, verify what is in these ranges.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from reference_cluster.transports.bytes import (
    Endpoint,
    Range,
    Segment,
    TransportError,
    check_batch,
    cut,
)
from reference_cluster.transports.threads import run_stoppable

log = logging.getLogger(__name__)

Protocol = Literal["tcp", "rdma"]
# In the classic engine these two decide; each makes it fail where it would take the other way.
FORCE = {"tcp": "MC_FORCE_TCP", "rdma": "MC_FORCE_HCA"}
# Between calls of so many bytes, some 10 ms each, a batch can be stopped.
CALL_BYTES_MAX = 16 << 20
CALL_RANGES_MAX = 1024

Call = Callable[[str, list[int], list[int], list[int]], int]


class MooncakeTransport:
    """One engine, with one segment registered; `device` names an RDMA device or leaves the choice.

    Over RDMA the engine also heeds MC_GID_INDEX and MC_CUSTOM_TOPO_JSON of the environment.
    """

    name = "mooncake"

    def __init__(
        self,
        protocol: Protocol = "tcp",
        host: str = "127.0.0.1",
        device: str = "",
        threads: int = 4,
    ) -> None:
        self.protocol, self.host, self.device = protocol, host, device
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="mooncake")
        self.stops: dict[threading.Event, Endpoint] = {}
        self.engine: Any = None

    async def start(self, segment: Segment) -> Endpoint:
        self.segment = segment
        self.engine = started(self.protocol, self.host, self.device)
        if self.engine.register_memory(segment.address, segment.size) != 0:
            raise TransportError(f"mooncake: {segment.name} cannot be registered")
        log.warning(
            "mooncake's engine listens on every interface and serves all who ask, whatever "
            "network.host says: keep this host inside a network that you trust"
        )
        address = f"{self.host}:{self.engine.get_rpc_port()}/{segment.address:x}"
        return Endpoint(self.name, address, segment.name, segment.size)

    async def read(
        self,
        peer: Endpoint,
        remote: Sequence[Range],
        local: Sequence[Range],
        deadline_s: float,
    ) -> None:
        await self.move(self.engine.batch_transfer_sync_read, peer, local, remote, deadline_s)

    async def write(
        self,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        await self.move(self.engine.batch_transfer_sync_write, peer, local, remote, deadline_s)

    async def move(
        self,
        call: Call,
        peer: Endpoint,
        local: Sequence[Range],
        remote: Sequence[Range],
        deadline_s: float,
    ) -> None:
        if check_batch(local, self.segment.size, remote, peer) == 0:
            return
        parts = list(cut(local, remote, CALL_BYTES_MAX, CALL_RANGES_MAX))
        stopped = threading.Event()
        work = functools.partial(move_parts, call, self.segment.address, peer, parts, stopped)
        self.stops[stopped] = peer
        try:
            await run_stoppable(self.executor, work, stopped.set, deadline_s, peer.segment)
        finally:
            del self.stops[stopped]

    def forget(self, peer: Endpoint) -> None:
        """What is under way ends after the engine's call that is."""
        for stopped, other in self.stops.items():
            if other == peer:
                stopped.set()

    async def close(self) -> None:
        for stopped in self.stops:
            stopped.set()
        self.executor.shutdown(wait=False, cancel_futures=True)
        if self.engine is not None:
            self.engine.unregister_memory(self.segment.address)
            self.engine = None  # The last reference: the engine ends, and with it its listeners.


def started(protocol: Protocol, host: str, device: str) -> Any:
    """An engine that does use the protocol asked for."""
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        remedy = "pip install 'mooncake-bench[mooncake]', apt-get install libibverbs1 libnuma1"
        raise TransportError(f"network.transport mooncake: {error}; {remedy}") from None
    for each, variable in FORCE.items():
        if each == protocol:
            os.environ[variable] = "1"
        else:
            os.environ.pop(variable, None)
    os.environ.setdefault("MC_TRANSFER_TIMEOUT", "5")
    devices_before = open_devices()
    engine = TransferEngine()
    code = engine.initialize(host, "P2PHANDSHAKE", protocol, device)
    if code != 0:
        reason = "no RDMA device that it can use" if protocol == "rdma" else "see its log above"
        raise TransportError(f"mooncake: the engine does not start over {protocol}: {reason}")
    used = "rdma" if open_devices() > devices_before else "tcp"
    if used != protocol:
        raise TransportError(f"mooncake: asked for {protocol}, but the engine uses {used}")
    return engine


def open_devices() -> int:
    """How many handles to RDMA devices this process has: what an engine over RDMA needs."""
    handles = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            handles += os.readlink(entry).startswith("/dev/infiniband/uverbs")
        except FileNotFoundError:  # The handle of this very listing.
            continue
    return handles


def move_parts(
    call: Call,
    base: int,
    peer: Endpoint,
    parts: Sequence[tuple[list[Range], list[Range]]],
    stopped: threading.Event,
) -> None:
    name, peer_base = peer.address.split("/")
    for ours, theirs in parts:
        if stopped.is_set():
            raise TransportError(f"{peer.segment} at {name}: the transfer was stopped")
        here = [base + one.offset for one in ours]
        there = [int(peer_base, 16) + one.offset for one in theirs]
        code = call(name, here, there, [one.length for one in ours])
        if code != 0:
            reason = f"{peer.segment} at {name}: the engine's code is {code}"
            raise TransportError(reason, peer_is_gone=not is_listening(name))


def is_listening(name: str) -> bool:
    """The engine has one code for every failure; whether its peer still lives, we look."""
    host, port = name.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=1.0) as probe:
            # A process that is about to die still takes connections, and then drops them.
            probe.settimeout(0.2)
            return probe.recv(1) != b""
    except ConnectionError:
        return False
    except OSError:
        return True  # Silence is what a living engine has for who says nothing.
