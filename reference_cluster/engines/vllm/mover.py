"""How do blocks come from other workers while the engine computes? On a loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from reference_cluster.engines.vllm.planner import Load
from reference_cluster.engines.vllm.store import Slots
from reference_cluster.transports.bytes import (
    ByteTransport,
    Endpoint,
    Segment,
    TransportError,
)

Fill = Callable[[int, memoryview], None]  # The engine's block gets these bytes.


class Mover:
    """Fetches what a load asks for, checks it, and hands it to the engine's memory."""

    def __init__(
        self,
        segment: Segment,
        slots: Slots,
        transport: ByteTransport,
        fill: Fill,
        deadline_s: float,
    ) -> None:
        self.segment = segment
        self.slots = slots
        self.transport = transport
        self.fill = fill
        self.deadline_s = deadline_s
        self.counts = {"loaded_blocks": 0, "fetched_bytes": 0, "lost_blocks": 0, "saved_blocks": 0}
        self.lock = threading.Lock()
        self.ended: set[str] = set()
        self.lost: set[int] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="kv-mover", daemon=True)

    def start(self) -> Endpoint:
        self.thread.start()
        starting = asyncio.run_coroutine_threadsafe(self.transport.start(self.segment), self.loop)
        return starting.result()

    def submit(self, load: Load) -> None:
        asyncio.run_coroutine_threadsafe(self.bring(load), self.loop)

    async def bring(self, load: Load) -> None:
        lost: set[int] = set()
        try:
            await self.fetch(load)
            for block_id, slot, key in load.blocks:
                payload = self.slots.get(slot, key)
                if payload is None:
                    lost.add(block_id)
                else:
                    self.fill(block_id, payload)
        except BaseException:
            lost = {block_id for block_id, _, _ in load.blocks}
            raise
        finally:
            # Whatever happened, the request must not wait for ever.
            with self.lock:
                self.counts["loaded_blocks"] += len(load.blocks) - len(lost)
                self.counts["lost_blocks"] += len(lost)
                self.ended.add(load.request)
                self.lost |= lost

    async def fetch(self, load: Load) -> None:
        """Bring the remote blocks into our slots; what fails shows when they are looked at."""
        if load.peer is None or not load.remote:
            return
        own = [slot for _, slot, _ in load.blocks[-len(load.remote) :]]
        remote = [self.slots.range_of(slot) for slot in load.remote]
        local = [self.slots.range_of(slot) for slot in own]
        try:
            await self.transport.read(load.peer, remote, local, self.deadline_s)
        except TransportError as error:
            if error.peer_is_gone:
                self.transport.forget(load.peer)
            return
        self.counts["fetched_bytes"] += len(own) * self.slots.slot_bytes

    def take_ended(self) -> tuple[set[str], set[int]]:
        """Requests whose loads have ended since the last call, and blocks that never came."""
        with self.lock:
            ended, self.ended = self.ended, set()
            lost, self.lost = self.lost, set()
        return ended, lost

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.transport.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.segment.close()
