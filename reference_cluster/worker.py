"""What is a worker? The process of one instance: python -m reference_cluster.worker.

It runs the same instance class as the simulator, tells the Conductor what it does, and moves KV
to and from its peers by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reference_cluster.carriers import BytesCarrier, Carrier, ModelledCarrier
from reference_cluster.colocated import ColocatedInstance
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.decode import DecodeInstance
from reference_cluster.errors import ClusterError
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.kvpool.ssd_file import FileTier, SsdFile
from reference_cluster.launch.process import die_with_parent, read_cluster
from reference_cluster.messages import (
    VERSION,
    Beat,
    BlockEvent,
    Cancel,
    Check,
    Checked,
    Ended,
    Entered,
    FirstToken,
    Hello,
    Left,
    Members,
    Message,
    Peer,
    Prefilled,
    Resend,
    Serve,
    Spanned,
    Started,
    Who,
    request_of,
    stamps_of,
)
from reference_cluster.moves import DecodeEnd, PrefillEnd
from reference_cluster.parts import Parts
from reference_cluster.peers import Peers
from reference_cluster.policies.view import Holder
from reference_cluster.prefill import PrefillInstance, Queued
from reference_cluster.request import Block, Request, Sink
from reference_cluster.rpc import Line, Office
from reference_cluster.spans import Span
from reference_cluster.worker_memory import WorkerMemory

log = logging.getLogger(__name__)


class Worker:
    """What workers of all roles have in common: the line to the Conductor, peers, heartbeats."""

    def __init__(self, name: str, config: ClusterConfig, profile: Profile, directory: str) -> None:
        self.name = name
        self.id = int(name.rsplit("-", 1)[1])
        self.config = config
        # One step at a time: a live client gets each token when it exists.
        self.parts = Parts(config, profile, steps_max=1, is_worker=True)
        self.loop = asyncio.get_running_loop()
        self.identity = f"{name}.{os.getpid()}".encode()
        self.address = f"ipc://{directory}/{self.identity.decode()}"
        self.conductor = Line(f"ipc://{directory}/conductor", self.identity, self.receive)
        self.office = Office(self.address, self.asked)
        self.requests: dict[int, Request] = {}
        self.event_id = 0
        self.conductor_pid = 0  # Whom we have said hello to because it asked.
        self.cluster = directory.rsplit("mcb-", 1)[-1].rsplit("-", 1)[0]
        self.memory: WorkerMemory | None = None
        self.peers: Peers
        self.instance: Any

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self.peers = Peers(self.identity, group)
                await self.prepare(group)
                group.create_task(self.conductor.run(), name="line to the Conductor")
                group.create_task(self.office.run(), name="office")
                group.create_task(self.instance.run(), name=self.name)
                self.say_hello()
                group.create_task(self.beat(), name="heartbeat")
        finally:
            await self.close()

    async def prepare(self, group: asyncio.TaskGroup) -> None:
        """Make the instance, and what moves its bytes."""
        raise NotImplementedError

    async def open_memory(self, pool_blocks: int) -> None:
        """Register memory, where real bytes are moved."""
        if self.config.network.transport != "modelled":
            self.memory = await WorkerMemory.open(self.parts, pool_blocks, self.cluster)

    async def close(self) -> None:
        if hasattr(self, "instance"):  # Not where there was no memory for it.
            self.instance.engine.close()
        if self.memory is not None:
            await self.memory.close()
        self.peers.close()
        self.office.close()
        self.conductor.close()

    # ---- the Conductor -----------------------------------------------------------------------

    def tell(self, message: Message) -> None:
        self.conductor.tell(message)

    def say_hello(self) -> None:
        endpoint = self.memory.endpoint if self.memory is not None else None
        self.tell(Hello(VERSION, self.name, os.getpid(), self.address, endpoint))
        self.send_contents()

    async def beat(self) -> None:
        """Tell for ever that we live, and how we are."""
        while True:
            self.tell(self.report())
            await asyncio.sleep(self.config.workers.heartbeat_s)

    def report(self) -> Beat:
        pool = getattr(self.instance, "pool", None)
        return Beat(
            self.loop.time(),
            list(self.requests),
            pool.used if pool else 0,
            pool.reserved + len(pool.pins) if pool else 0,
            self.instance.engine.lag_s_max,
            self.counts(),
            pool.evictions if pool else 0,
        )

    def counts(self) -> dict[str, float]:
        return {}

    def receive(self, _: bytes, message: Message) -> None:
        """Something from the Conductor."""
        match message:
            case Members():
                for peer in self.peers.update(message):
                    if self.memory is not None and peer.endpoint is not None:
                        self.memory.transport.forget(peer.endpoint)
                    self.gone(peer)
            case Cancel():
                if message.id in self.requests:
                    self.cancel(self.requests[message.id])
            case Who() if message.pid != self.conductor_pid:
                self.conductor_pid = message.pid
                self.start_anew()
            case Resend():
                self.send_contents()
            case Check():
                self.tell(Checked(message.ask, self.problem()))
            case _:
                self.work(message)

    def start_anew(self) -> None:
        """A Conductor that does not know us knows none of our requests: nobody waits for them."""
        for request in list(self.requests.values()):
            self.cancel(request)
        self.say_hello()

    def problem(self) -> str:
        try:
            self.check_integrity()
        except AssertionError as error:
            return str(error)
        return ""

    def check_integrity(self) -> None:
        self.instance.check_integrity()

    def work(self, message: Message) -> None:
        """What only this role is asked to do."""

    def cancel(self, request: Request) -> None:
        request.is_cancelled = True
        request.status = "failed"
        self.instance.cancel(request)
        self.give_up(request)
        self.requests.pop(request.id, None)

    def give_up(self, request: Request) -> None:
        """Where its KV is not given back by the instance at its next boundary."""

    def gone(self, peer: Peer) -> None:
        """A peer is no member any more."""

    def asked(self, identity: bytes, message: Message) -> None:
        """Something from a peer."""

    # ---- the pool's contents -----------------------------------------------------------------

    def stored(self, blocks: Sequence[Block]) -> None:
        self.tell_event("stored", blocks)

    def removed(self, blocks: Sequence[Block]) -> None:
        self.tell_event("removed", blocks)

    def tell_event(self, kind: Any, blocks: Sequence[Any]) -> None:
        self.tell(BlockEvent(self.event_id, self.loop.time(), kind, tuple(blocks)))
        self.event_id += 1

    def send_contents(self) -> None:
        pool = getattr(self.instance, "pool", None)
        if pool is not None:
            self.tell_event("cleared", ())
            ssd = getattr(self.instance, "ssd", None)
            below = [*ssd.blocks.idle] if ssd is not None else []
            self.tell_event("stored", [*pool.pins, *pool.idle, *below])


class FirstTokenSink(Sink):
    """Tells the Conductor of a request's first token; of all others the batch tells."""

    def __init__(self, worker: Worker, id: int) -> None:
        self.worker = worker
        self.id = id

    def tokens(self, count: int) -> None:
        request = self.worker.requests[self.id]
        request.sink = None
        self.worker.tell(FirstToken(self.id, stamps_of(request)))


class BatchReporter:
    """Tells the Conductor what its mirror of our batch has to do."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def entered(self, request: Request, start_s: float) -> None:
        self.worker.tell(Entered(request.id, start_s))

    def spanned(self, span: Span) -> None:
        blocks = getattr(self.worker.instance, "running_blocks", 0)
        members = self.worker.instance.batch.members.items()
        self.worker.tell(
            Spanned(
                span.start_s,
                span.steps,
                span.first_gap_s,
                span.growth_s,
                span.end_s,
                blocks,
                [(id, one.request.output[-1]) for id, one in members if one.request.output],
                [*span.stopped],
            )
        )

    def left(self, request: Request) -> None:
        self.worker.tell(Left(request.id))


class PrefillWorker(Worker):
    """Prefills, lends what its pool holds to its peers, and sends KV to decode workers."""

    instance: PrefillInstance
    tier: FileTier | None = None

    async def prepare(self, group: asyncio.TaskGroup) -> None:
        await self.open_memory(self.parts.dram_blocks)
        self.instance = self.parts.prefill(
            self.id,
            self.stored,
            self.removed,
            self.fetch,
            self.hand_over,
            self.prefilled,
            self.file_tier if self.memory is not None else None,
        )
        self.carrier: Carrier
        if self.memory is None:
            self.carrier = ModelledCarrier(self.id, self.parts, self.instance)
        else:
            self.carrier = BytesCarrier(self.config, self.memory, self.instance)
        self.instance.keep = self.carrier.keep
        self.end = PrefillEnd(self, group, self.carrier)

    def file_tier(self, pool: BlockPool) -> FileTier | None:
        """The SSD below the pool, as a file that survives us."""
        directory = self.config.pool.ssd_directory
        if not self.parts.ssd_blocks or directory is None:
            return None
        assert self.memory is not None
        size, profile = self.memory.slots.block_bytes, self.parts.profile
        label = f"{profile.name} {profile.layers} {self.config.block_tokens}"
        engine = self.config.engine
        if engine.kind == "torch":  # The same prompt has other KV in another model.
            label += f" {engine.model} {engine.seed} {engine.dtype}"
        is_direct = self.config.pool.direct_io
        file = SsdFile.open(Path(directory) / self.name, size, label, is_direct)
        speed = profile.ssd_bytes_per_s
        self.tier = FileTier(pool, self.parts.ssd_blocks, size, speed, file)
        return self.tier

    async def close(self) -> None:
        if self.tier is not None:
            await self.tier.close()
        await super().close()

    def fetch(self, queued: Queued, best: Holder) -> None:
        self.end.fetch(queued, best)

    def work(self, message: Message) -> None:
        if isinstance(message, Serve):
            request = request_of(message.work)
            self.requests[request.id] = request
            self.instance.accept(request, message.placement)
        else:
            self.end.work(message)

    def hand_over(self, request: Request, prefill_s: float) -> Any:
        """The prefill begins: its KV starts to leave, unless none is needed."""
        self.tell(Started(request.id, self.instance.running_end_s, stamps_of(request)))
        return self.end.hand_over(request, prefill_s)

    def prefilled(self, request: Request, delivery: Any) -> None:
        self.tell(Prefilled(request.id, stamps_of(request)))
        self.carrier.end(request)
        self.instance.engine.forget(request)
        if request.id not in self.end.streams or request.is_cancelled:
            self.requests.pop(request.id, None)
        if delivery is not None and request.is_cancelled:
            delivery.cancel()
        elif delivery is not None:
            delivery.prefilled()

    def cancel(self, request: Request) -> None:
        super().cancel(request)
        self.end.cancel(request)

    def gone(self, peer: Peer) -> None:
        self.end.gone(peer)

    def asked(self, identity: bytes, message: Message) -> None:
        self.end.asked(identity, message)

    def counts(self) -> dict[str, float]:
        return self.end.counts()

    def check_integrity(self) -> None:
        super().check_integrity()
        self.end.check_integrity()


class DecodeWorker(Worker):
    """Takes in KV from prefill workers and decodes."""

    instance: DecodeInstance

    async def prepare(self, group: asyncio.TaskGroup) -> None:
        await self.open_memory(0)
        self.end = DecodeEnd(self, group, self.memory, self.arrived)
        self.instance = self.parts.decode(self.id, self.ended)
        if self.memory is not None:
            self.instance.engine.attach(self.memory.segment)
        self.instance.batch.observer = BatchReporter(self)

    def give_up(self, request: Request) -> None:
        self.instance.engine.forget(request)

    def arrived(self, request: Request) -> None:
        """All its KV is here."""
        request.sink = FirstTokenSink(self, request.id)
        request.timeline.transferred_s = self.loop.time()
        self.instance.join(request)

    def ended(self, request: Request) -> None:
        """By its last token, as the mirror knows by itself, or refused."""
        del self.requests[request.id]
        self.instance.engine.forget(request)
        if request.status == "rejected":
            self.tell(Ended(request.id, "rejected", request.reason or "unknown"))

    def cancel(self, request: Request) -> None:
        super().cancel(request)
        self.end.cancel(request)

    def gone(self, peer: Peer) -> None:
        self.end.gone(peer)

    def asked(self, identity: bytes, message: Message) -> None:
        self.end.asked(identity, message)

    def counts(self) -> dict[str, float]:
        return self.end.counts()

    def check_integrity(self) -> None:
        super().check_integrity()
        self.end.check_integrity()


class ColocatedWorker(Worker):
    """Does everything alone."""

    instance: ColocatedInstance

    async def prepare(self, group: asyncio.TaskGroup) -> None:
        self.instance = self.parts.colocated(
            self.id, self.stored, self.removed, self.ended, self.started
        )
        self.instance.batch.observer = BatchReporter(self)

    def work(self, message: Message) -> None:
        if isinstance(message, Serve):
            request = request_of(message.work, FirstTokenSink(self, message.work.id))
            self.requests[request.id] = request
            self.instance.accept(request, message.placement)

    def started(self, request: Request) -> None:
        self.tell(Started(request.id, self.instance.running_end_s, stamps_of(request)))

    def ended(self, request: Request) -> None:
        del self.requests[request.id]


ROLES: dict[str, type[Worker]] = {
    "prefill": PrefillWorker,
    "decode": DecodeWorker,
    "colocated": ColocatedWorker,
}


async def work(name: str, directory: str) -> None:
    """Be a worker until SIGTERM."""
    config, profile = read_cluster(directory)
    place = config.instance_names.index(name)
    if place < len(config.workers.cpus) and config.workers.cpus[place]:
        os.sched_setaffinity(0, config.workers.cpus[place])
    main = asyncio.current_task()
    assert main is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    worker = ROLES[name.rsplit("-", 1)[0]](name, config, profile, directory)
    with contextlib.suppress(asyncio.CancelledError):
        await worker.run()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reference_cluster.worker", description=__doc__)
    parser.add_argument("--name", required=True, help="prefill-0, decode-1, colocated-2, ...")
    parser.add_argument("--directory", required=True, help="where the cluster's processes meet")
    parser.add_argument("--parent", type=int, required=True, help="the process to die with")
    asked = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format=f"{asked.name}: %(message)s")
    die_with_parent(asked.parent)
    try:
        asyncio.run(work(asked.name, asked.directory))
    except ExceptionGroup as group:
        if isinstance(group.exceptions[0], ClusterError):
            sys.exit(f"{asked.name}: {group.exceptions[0]}")
        raise


if __name__ == "__main__":
    main()
